import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ds_gpt2.engine.monitors import Monitors
from ds_gpt2.monitoring.monitor import Histogram, Monitor, StepMetrics, from_plain, to_plain


class Service:
    """Stands for a monitor of DeepSpeed: records batches of events, or fails if ``is_down``."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, float, int]]] = []
        self.is_down = False

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        if self.is_down:
            raise ConnectionError("no route to host")
        self.batches.append(events)


def _monitor(file: Path, start_step: int = 0) -> tuple[Monitor, Service]:
    service = Service()
    master = SimpleNamespace(tb_monitor=None, wandb_monitor=service)
    return Monitor(Monitors(master), file, start_step), service


def _records(file: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    records = [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]
    assert all(abs(record.pop("time") - time.time()) < 60 for record in records)
    return records


def test_scalars_are_sent_in_one_batch_and_written_to_the_file(tmp_path: Path) -> None:
    monitor, service = _monitor(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        monitor.write(step, {"train/loss": 2.5 / step, "samples/0": "text\nin two lines"})
    monitor.close()
    assert service.batches == [[("train/loss", 2.5, 1), ("train/loss", 1.25, 2)]]
    assert _records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 2.5, "samples/0": "text\nin two lines"},
        {"step": 2, "train/loss": 1.25, "samples/0": "text\nin two lines"},
    ]


def test_infinity_and_nan_are_valid_json(tmp_path: Path) -> None:
    monitor, _ = _monitor(tmp_path / "metrics.jsonl")
    monitor.write(1, {"train/grad_norm": float("inf"), "train/loss": float("nan")})
    monitor.close()
    assert _records(tmp_path / "metrics.jsonl") == [{"step": 1, "train/grad_norm": None, "train/loss": None}]


def test_metrics_survive_a_checkpoint() -> None:
    seen: StepMetrics = {"x": 1.5, "n": 3, "text": "a", "h": Histogram([1.0, 2.0], [3.0, 4.0], 0.5, 2.0, 10.0, 20.0)}
    assert from_plain(json.loads(json.dumps(to_plain(seen), allow_nan=False))) == seen
    plain = to_plain({"x": math.inf, "y": math.nan})
    assert plain == {"x": None, "y": None} and from_plain(plain) == {"x": math.inf, "y": math.inf}


def test_records_that_a_resume_repeats_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    monitor, _ = _monitor(file)
    for step in range(1, 6):
        monitor.write(step, {"x": 1.0})
    monitor.close()
    with file.open("a") as cut_by_a_crash:
        cut_by_a_crash.write('{"step": 6, "x"')
    monitor, _ = _monitor(file, start_step=3)
    monitor.write(4, {"x": 2.0})
    monitor.close()
    assert [(record["step"], record["x"]) for record in _records(file)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    monitor, service = _monitor(tmp_path / "metrics.jsonl")
    monitor.write(1, {"x": 1.0})
    monitor.close()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert service.batches == []


def test_an_unavailable_service_loses_values_but_does_not_end_the_run(tmp_path: Path, log_messages: list[str]) -> None:
    monitor, service = _monitor(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        service.is_down = step in (2, 3)
        monitor.write(step, {"x": float(step)})
        monitor.flush()
    monitor.close()
    assert service.batches == [[("x", float(step), step)] for step in (1, 4, 5)]
    assert log_messages == [
        "cannot write to wandb_monitor: no route to host; training continues and retries",
        "recovered: can write to wandb_monitor again",
    ]
    assert [record["step"] for record in _records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


class FakeTracker:
    """A tracker that does not finish in time."""

    name, location = "W&B", "its rows are in wandb/run-1"

    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []
        self.ended: list[bool] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.events += events

    def start_finishing(self, failed: bool) -> None:
        self.ended.append(failed)

    def wait_finished(self, seconds: float) -> str | None:
        assert 0 < seconds < 60
        return "did not finish in time"


def test_close_finishes_trackers_once_and_reports_failures(tmp_path: Path, log_messages: list[str]) -> None:
    tracker: Any = FakeTracker()
    master = SimpleNamespace(tb_monitor=None, wandb_monitor=None)
    monitor = Monitor(Monitors(master), tmp_path / "metrics.jsonl", 0, {"wandb_monitor": tracker})
    monitor.write(1, {"x": 1.0})
    monitor.close(failed=True)
    monitor.close()
    assert tracker.events == [("x", 1.0, 1)]
    assert tracker.ended == [True]
    assert log_messages == ["W&B: did not finish in time; its rows are in wandb/run-1"]


def test_csv_files_that_a_resume_continues_get_no_second_header(tmp_path: Path) -> None:
    (tmp_path / "train_loss.csv").write_text("step,loss\n1,2.0\n")
    (tmp_path / "val_loss.csv").write_text("")
    csv = SimpleNamespace(log_dir=str(tmp_path), filenames=[], write_events=lambda events: None)
    master = SimpleNamespace(tb_monitor=None, csv_monitor=csv)
    Monitor(Monitors(master), tmp_path / "metrics.jsonl", 1)
    assert csv.filenames == ["train_loss"]
