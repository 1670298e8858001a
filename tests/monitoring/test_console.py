import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_gpt2.monitoring import console
from ds_gpt2.monitoring.console import StepLines, open_log
from ds_gpt2.monitoring.monitor import StepMetrics

SEEN: StepMetrics = {
    "train/loss": 3.14159,
    "train/lr": 6e-4,
    "train/grad_norm": 1.5,
    "train/skipped_steps": 0,
    "perf/step_ms": 1234.5,
    "perf/tokens_per_s": 424_242.0,
}


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    log = logging.getLogger("ds_gpt2")
    before = (list(log.handlers), log.level, log.propagate)
    yield
    for handler in log.handlers:
        handler.close()
    log.handlers, log.level, log.propagate = before


def test_a_step_is_one_line_in_terminal_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_log(tmp_path / "train.log")
    lines = StepLines(0, 95_365)
    lines.show(7, SEEN, 95)
    lines.show(8, {**SEEN, "perf/mfu": 0.476, "train/skipped_steps": 2}, 95)
    lines.close()
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "step     7/95365  loss 3.1416  lr 6.00e-04  grad 1.500  1,234 ms  424,242 tok/s  eta 1m 35s",
        "step     8/95365  loss 3.1416  lr 6.00e-04  grad 1.500  1,234 ms  424,242 tok/s  mfu 47.6%  skipped 2"
        "  eta 1m 35s",
    ]
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in logged] == shown


def test_a_terminal_gets_a_bar_and_the_file_the_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_log(tmp_path / "train.log")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = StepLines(0, 10)
    lines.show(1, SEEN, 95)
    console.log.info("a message above the bar")
    lines.close()
    shown = capsys.readouterr().out
    assert "step  1/10" not in shown
    assert "a message above the bar\n" in shown
    assert "1/10 |" in shown
    assert "loss 3.1416" in shown
    assert "step  1/10" in (tmp_path / "train.log").read_text()


def test_other_ranks_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    open_log(tmp_path / "train.log")
    console.log.info("not from here")
    console.log.error("trouble")
    assert capsys.readouterr().out == "trouble\n"
    assert not (tmp_path / "train.log").exists()


class _Gone:
    """A terminal that was closed, or a pipe whose reader has ended."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_closed_terminal_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_log(tmp_path / "train.log")
    lines = StepLines(0, 10)
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", _Gone())
        for step in (1, 2):
            lines.show(step, SEEN, 95)
            console.log.info("a message")
        lines.close()
    logged = (tmp_path / "train.log").read_text()
    assert logged.count("a message") == 2
    assert logged.count("step ") == 2


def test_a_message_is_one_line_with_any_name_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_log(tmp_path / "train.log")
    logging.getLogger("ds_gpt2.data").warning("shard %s cannot be read", "a\x1b[2J\nb\r.bin")
    assert capsys.readouterr().out == "shard a\\x1b[2J\\nb\\r.bin cannot be read\n"
    assert (tmp_path / "train.log").read_text().endswith(" shard a\\x1b[2J\\nb\\r.bin cannot be read\n")
