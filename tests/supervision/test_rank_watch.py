"""The end of ranks that hang."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.supervision import rank_watch
from ds_gpt2.supervision.rank_watch import RankWatch
from ds_gpt2.supervision.watchdog import Hang


class HungRanks:
    """Two ranks that hang, and that the system takes a while to end."""

    count = 2
    is_launcher_running, are_stuck = True, False

    def __init__(self, missing: str, written: int) -> None:
        """
        Args:
            missing: why stacks cannot be written; empty if they can.
            written: the number of files with stacks.
        """
        self._missing, self._written = missing, written
        self.kills = 0

    @property
    def have_exited(self) -> bool:
        return self.kills >= 3

    def kill(self) -> None:
        self.kills += 1

    def failures(self) -> dict[int, str]:
        return {}

    def heartbeats(self, run_dir: object) -> None:
        return None

    def write_stacks(self, run_dir: Path, directory: Path) -> None:
        for rank in range(self._written):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"rank_{rank:05d}.txt").touch()
        if self._missing:
            raise OSError(self._missing)


@pytest.mark.parametrize("missing", ["", "host b: it has not answered for 11 s"])
@pytest.mark.parametrize("written", [0, 1])
def test_a_hang_names_the_stacks_that_exist_and_those_that_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, written: int
) -> None:
    monkeypatch.setattr(rank_watch, "POLL_SECONDS", 0.01)
    context: Any = mock.Mock(stop=SimpleNamespace(requested=False))
    context.settings.supervisor = SupervisorSettings()
    context.directories.run_dir = tmp_path
    ranks: Any = HungRanks(missing, written)
    watch = RankWatch(context, ranks)
    monkeypatch.setattr(watch._watchdog, "check", lambda: Hang(1, 7, "rank 1 hangs"))
    assert watch.wait() == "hung"
    (call,) = context.reporter.report.call_args_list
    kind, text, step = call.args
    assert (kind, step) == ("hang", 7)
    assert text.startswith("rank 1 hangs; stacks in " if written else "rank 1 hangs")
    assert text.endswith(
        f"; stacks cannot be written: {missing}" if missing else str(call.kwargs.get("stacks", "hangs"))
    )
    assert ("stacks" in call.kwargs) == bool(written)
    assert context.poll.call_count == 4  # before the hang, and while the ranks end
