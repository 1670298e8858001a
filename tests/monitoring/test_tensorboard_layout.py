"""TensorBoard data other than scalar curves, read back with TensorBoard's own reader."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from ds_gpt2.engine.monitors import Monitors
from ds_gpt2.monitoring.monitor import Histogram, Monitor
from ds_gpt2.monitoring.reference_curves import REFERENCE, REFERENCE_CURVE
from ds_gpt2.monitoring.tensorboard_layout import open_dashboard
from ds_gpt2.run_dir.metrics import read_metrics

# The writer's thread ends when its disk is full; which test reports it depends on garbage collection.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
HYPER_PARAMETERS = {"schedule.max_lr": 6e-4, "model.preset": "124M", "run.seed": 1337, "model.layers": None}


class TensorBoardMonitor:
    """Replaces DeepSpeed's monitor, which requires a process group; the writer is the real one."""

    def __init__(self, folder: Path) -> None:
        self.summary_writer = SummaryWriter(str(folder))

    def write_events(self, events: list[tuple[str, float, int]], flush: bool) -> None:
        for tag, value, step in events:
            self.summary_writer.add_scalar(tag, value, step)


def _monitor(folder: Path, start_step: int = 0) -> Monitor:
    master = SimpleNamespace(tb_monitor=TensorBoardMonitor(folder / "events"))
    return Monitor(Monitors(master), folder / "metrics.jsonl", start_step)


def _read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0})
    events.Reload()
    return events


def test_layout_settings_hyper_parameters_and_marks_are_written(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path)
    open_dashboard(monitor, "run:\n  seed: 1337\n", HYPER_PARAMETERS, compare=False)
    monitor.mark_start(7, "resumed from rolling_step_000007")
    monitor.close()
    events = _read(tmp_path / "events")
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["loss"] == ["train/loss$", "val/loss$", "val/loss_ema$"]
    assert events.Tensors("config/text_summary")[0].tensor_proto.string_val[0] == b"    run:\n      seed: 1337\n"
    marks = [(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors("marks/start/text_summary")]
    assert marks == [(7, b"    resumed from rolling_step_000007\n")]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    values = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert values == {"schedule.max_lr": 6e-4, "model.preset": "124M", "run.seed": 1337}
    assert not (tmp_path / "events" / REFERENCE).exists()


def test_the_reference_curve_is_written_once_beside_the_run(tmp_path: Path) -> None:
    for start_step in (0, 5):
        monitor = _monitor(tmp_path, start_step)
        open_dashboard(monitor, "", {}, compare=True)
        monitor.close()
    folder = tmp_path / "events" / REFERENCE
    assert len(list(folder.iterdir())) == 1
    shown = {event.step: event.value for event in _read(folder).Scalars("val/loss")}
    assert shown == pytest.approx(REFERENCE_CURVE)


def test_a_histogram_goes_to_tensorboard_and_not_to_the_records(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path)
    spread = Histogram([-1.0, 0.0, 2.0], [0.0, 3.0, 5.0], minimum=-0.5, maximum=1.5, total=4.0, squares=9.0)
    monitor.write(3, {"grad/wte.weight": spread, "train/loss": 2.0})
    monitor.close()
    (shown,) = _read(tmp_path / "events").Histograms("grad/wte.weight")
    value = shown.histogram_value
    assert (shown.step, value.num, value.min, value.max, value.sum, value.sum_squares) == (3, 8.0, -0.5, 1.5, 4.0, 9.0)
    assert (list(value.bucket_limit), list(value.bucket)) == ([-1.0, 0.0, 2.0], [0.0, 3.0, 5.0])
    assert "grad/" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_full_disk_delays_events_without_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    monitor = _monitor(tmp_path)
    write = RecordWriter.write
    written: list[bytes] = []

    def write_two_more(writer: RecordWriter, data: bytes) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(data)
        write(writer, data)

    monitor.write(1, {"train/loss": 3.0, "val/loss": 3.5})
    monitor.flush()
    monkeypatch.setattr(RecordWriter, "write", write_two_more)
    for step in (2, 3):
        monitor.write(step, {"train/loss": 3.0 - step / 10, "val/loss": 3.4, "samples/0": "text"})
        monitor.flush()
    monkeypatch.setattr(RecordWriter, "write", write)
    monitor.write(4, {"train/loss": 2.6})
    monitor.close()
    assert log_messages == [
        "cannot write TensorBoard's events: [Errno 28] No space left on device; training continues and retries",
        "recovered: can write TensorBoard's events again",
    ]
    events = _read(tmp_path / "events")
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in ("train/loss", "val/loss")}
    assert shown == {
        "train/loss": [(1, 3.0), (2, pytest.approx(2.8)), (3, pytest.approx(2.7)), (4, pytest.approx(2.6))],
        "val/loss": [(1, 3.5), (2, pytest.approx(3.4)), (3, pytest.approx(3.4))],
    }
    assert [event.step for event in events.Tensors("samples/0/text_summary")] == [2, 3]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_without_tensorboard_nothing_is_written(tmp_path: Path) -> None:
    monitor = Monitor(Monitors(SimpleNamespace(tb_monitor=None)), tmp_path / "metrics.jsonl", 0)
    open_dashboard(monitor, "", {}, compare=True)
    monitor.mark_start(1, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
