"""Requests to stop a run."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import end_session, launch, start
from small_run import MODEL, hellaswag_item
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.kill_soak import curve_problems
from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_identity import start_of
from ds_gpt2.run_dir.exit_codes import STOPPED
from ds_gpt2.run_dir.heartbeat import Beat, clear_heartbeats, read_beat
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.run_dir.stop_request import STOP_FILE, StopRequest
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.launcher import TRAIN, RankLayout, start_command
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences


def test_the_file_is_deleted_when_the_request_is_fulfilled(tmp_path: Path) -> None:
    request = StopRequest(OpenDirectory(tmp_path))
    (tmp_path / STOP_FILE).touch()
    assert request.requested
    request.clear()
    request.clear()
    assert not request.requested


def test_a_file_that_cannot_be_deleted_is_reported_without_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = StopRequest(OpenDirectory(tmp_path))
    (tmp_path / STOP_FILE).mkdir()
    request.clear()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / STOP_FILE / "mine").mkdir(parents=True)
    request.clear()
    assert request.requested and "STOP cannot be removed" in caplog.text and (tmp_path / STOP_FILE / "mine").is_dir()


def test_the_cause_of_a_stop_is_a_request_unless_the_supervisor_or_a_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert StopRequest().cause == StopRequest(OpenDirectory(run_dir)).cause == "on request"
    with subprocess.Popen(["sleep", "600"]) as supervisor:
        monkeypatch.setenv("DS_GPT2_SUPERVISOR", f"{supervisor.pid} {start_of(supervisor.pid)}")
        request = StopRequest(OpenDirectory(run_dir))
        assert not request.requested
        supervisor.kill()
    assert request.requested and request.cause == "because the supervisor is gone"
    request._request(signal.SIGTERM, None)
    assert not request.connection_lost
    request._request(signal.SIGHUP, None)  # from the agent
    assert request.connection_lost and request.cause == "because the connection to the supervisor was lost"
    monkeypatch.delenv("DS_GPT2_SUPERVISOR")
    moved = StopRequest(OpenDirectory(run_dir))
    run_dir.rename(tmp_path / "elsewhere")
    assert moved.requested and moved.cause == "because a directory of the run was moved or deleted"


@pytest.mark.ranks
@pytest.mark.extended
def test_a_stop_interrupts_an_evaluation_which_is_repeated_after_the_resume(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """Stop by the file during samples, then by a signal at the last step; the results equal a run without stops."""
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(hellaswag_item(number)) + "\n" for number in range(8)), encoding="utf-8")
    sections = {
        "model": MODEL,
        "batch": {"tokens_per_step": 256, "micro_batch": 2, "sequence_length": 32},
        "validation": {"every": 6, "tokens": 20 * 32},
        "samples": {"every": 6, "prompts": ["The statement"], "tokens": 600},  # a few seconds
        "hellaswag": {"every": 6, "path": str(items)},
        "histograms": {"every": 6},
    }
    undisturbed = tmp_path / "undisturbed"
    assert launch(2, "--config", str(write_config(undisturbed, **sections))).code == 0

    config, run_dir = write_config(tmp_path, **sections), tmp_path / "runs" / "test"
    arguments = ["--config", str(config), "--resume", "auto"]
    logged = run_dir / "train.log"

    def stop_by_file(process: subprocess.Popen[str]) -> None:
        _wait_until(process, lambda: "step 6: validation loss" in logged.read_text())
        (run_dir / STOP_FILE).touch()

    assert _stop_at(6, run_dir, arguments, stop_by_file) == (STOPPED, [])
    assert "step 6: a stop interrupts the evaluation" in logged.read_text()
    newest = scan(tmp_path / "checkpoints" / "test")[0]
    assert newest.step == 6 and newest.manifest is not None and not newest.manifest.is_evaluated
    assert [record["step"] for record in read_metrics(run_dir / METRICS)] == [1, 2, 3, 4, 5]
    assert _stop_at(12, run_dir, arguments, lambda process: rank_processes.request_stop(process.pid)) == (STOPPED, [])
    last = launch(2, *arguments)
    assert (last.code, last.left_over) == (0, []), last.output

    folders = (undisturbed, tmp_path)
    assert curve_differences(*(folder / "runs" / "test" for folder in folders)) == []
    assert curve_problems(run_dir) == []
    expected, found = ([one.tag for one in scan(folder / "checkpoints" / "test")] for folder in folders)
    assert found == expected
    for tag in expected:
        assert checkpoint_differences(*(folder / "checkpoints" / "test" / tag for folder in folders)) == []
    assert _histograms(undisturbed) == _histograms(tmp_path)


def _stop_at(
    step: int, run_dir: Path, arguments: list[str], stop: Callable[[subprocess.Popen[str]], object]
) -> tuple[int, list[str]]:
    """Start two ranks, stop them by ``stop`` during the evaluation of ``step``, and return the results."""
    clear_heartbeats(run_dir)
    process = start(start_command(RankLayout("cpu", 2), TRAIN, arguments))
    _wait_until(process, lambda: _is_evaluating(step, read_beat(run_dir, 0)))
    stop(process)
    process.communicate(timeout=120)
    return process.returncode, end_session(process.pid)


def _is_evaluating(step: int, beat: Beat | None) -> bool:
    return beat is not None and (beat.step, beat.phase) == (step, "evaluating")


def _wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def _histograms(folder: Path) -> dict[str, list[tuple[int, list[float]]]]:
    events = EventAccumulator(str(folder / "runs" / "test" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    return {
        tag: [(event.step, list(event.histogram_value.bucket)) for event in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }
