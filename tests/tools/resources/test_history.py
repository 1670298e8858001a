"""History of a run from its journal."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from run_files import DAY, HOUR, NOW, RunFiles

from ds_gpt2.tools.resources import history
from ds_gpt2.tools.status.screen import screen


def test_lost_time_is_repeated_work_and_time_without_a_process(files: RunFiles) -> None:
    """Two interruptions of 15 minutes each: the crash 10 minutes after a save, the restart 5 minutes later."""
    files.journal("start", 2 * DAY, 0)
    for ago, step in ((DAY, 100), (HOUR, 200)):
        files.journal("save", ago + 450, step)
        files.journal("crash", ago - 150, step + 60)
        files.journal("start", ago - 450, step)
    files.beat(step=200)
    past = files.status().history
    assert (past.starts, past.incidents, past.incidents_24h) == (3, 2, {"crash": 2})
    assert (past.lost_seconds, past.lost_seconds_24h) == (pytest.approx(1800), pytest.approx(1350))
    assert past.kept_share == pytest.approx(1 - 1800 / (2 * DAY))
    assert past.kept_share_24h == pytest.approx(1 - 1350 / DAY)
    assert (past.read_back_step, past.read_back_time) == (200, pytest.approx(NOW - HOUR + 450))


LAUNCHES: list[list[tuple[str, bool | None]]] = [
    # by hand; two restarts, the first without training; stop; by hand; by hand without a supervisor
    [("launch", False), ("start", None), ("crash", None), ("restart", None), ("launch", True), ("crash", None)],
    [("restart", None), ("launch", True), ("start", None), ("stop", None), ("launch", False), ("start", None)],
    [("stop", None), ("start", None)],
    # by hand, then a restart by the supervisor before it trained: counts as a resume
    [("stop", None), ("launch", False), ("crash", None), ("restart", None), ("launch", True), ("start", None)],
    # by hand, after the supervisor was killed while it waited
    [("crash", None), ("restart", None), ("launch", False), ("start", None)],
]


@pytest.mark.parametrize("is_recorded", [True, False])
def test_restarts_and_resumes_are_counted_separately(files: RunFiles, is_recorded: bool) -> None:
    """Older journals do not record who launches: a launch after a restart event is made by the supervisor."""
    groups = LAUNCHES if is_recorded else LAUNCHES[:-1]
    for number, (kind, restart) in enumerate(itertools.chain(*groups)):
        facts = {"restart": restart} if is_recorded and restart is not None else {}
        files.journal(kind, 9000 - 60 * number, number if kind == "start" else None, facts=facts)
    history, resumes = files.status().history, 4 if is_recorded else 3
    assert (history.starts, history.restarts, history.resumes) == (resumes + 2, 1, resumes)
    assert f"restarts    1 by the supervisor, {resumes} by hand" in screen(files.status())


def test_goodput_is_the_recorded_value(files: RunFiles) -> None:
    """Of two days, half the time is spent in steps, and three quarters on the second day."""
    starts = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(NOW - 2 * DAY)), "from_step": 0}
    (files.run_dir / "starts.jsonl").write_text(json.dumps(starts) + "\n")
    records = [(1, NOW - DAY - 1, 0.25), (2, NOW, 0.5)]
    text = "".join(json.dumps({"step": s, "time": t, "perf/goodput": share}) + "\n" for s, t, share in records)
    (files.run_dir / "metrics.jsonl").write_text(text)
    history = files.status().history
    assert (history.goodput, history.goodput_24h) == (0.5, pytest.approx(0.75, abs=1e-4))
    assert "goodput     50.0%, in 24 h 75.0%" in screen(files.status())


def test_interrupted_run_loses_time(files: RunFiles) -> None:
    files.journal("start", 5 * HOUR, 0)
    files.journal("save", HOUR, 100)
    assert files.status().state == "dead"
    assert files.status().history.lost_seconds == pytest.approx(HOUR)
    assert files.status().history.kept_share == pytest.approx(0.8)


def test_stopped_run_loses_no_time(files: RunFiles) -> None:
    files.journal("start", 5 * HOUR, 0)
    files.journal("save", 4 * HOUR, 100)
    files.journal("stop", 4 * HOUR, 100)
    assert (files.status().history.lost_seconds, files.status().history.kept_share) == (0.0, 1.0)
    files.journal("start", HOUR, 100)
    files.beat(step=101)
    assert (files.status().history.lost_seconds, files.status().history.kept_share) == (0.0, 1.0)


def test_only_the_end_of_a_long_journal_is_read(healthy_run: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_BYTES", 1 << 20)
    for number in range(14_000):
        healthy_run.journal("spike", 9 * DAY - number, number)
    healthy_run.journal("spike", 60, 990)
    status = healthy_run.status()
    assert (healthy_run.run_dir / "journal.jsonl").stat().st_size > 1 << 20
    assert 1000 < status.history.incidents < 14_000
    assert status.history.incidents_24h == {"spike": 1}
