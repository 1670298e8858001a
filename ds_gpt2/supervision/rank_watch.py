"""Watch the ranks of one launch until all of its processes have exited."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from ds_gpt2.common.errors import reason_of
from ds_gpt2.common.formatting import duration
from ds_gpt2.run_dir.heartbeat import Beat
from ds_gpt2.supervision.context import POLL_SECONDS, Context, TakenOverError
from ds_gpt2.supervision.launched_ranks import LaunchedRanks
from ds_gpt2.supervision.watchdog import Hang, Watchdog

ExitKind = Literal["exited", "hung", "launcher killed"]

_KILL_INTERVAL_SECONDS = 0.1


class RankWatch:
    """Stops the ranks on request, and kills them if they hang or do not stop in time."""

    def __init__(self, context: Context, ranks: LaunchedRanks) -> None:
        self._context = context
        self._ranks = ranks
        self._watchdog = Watchdog(context.settings.supervisor, ranks.heartbeats(context.directories.run), ranks.count)
        self._reported_kill = False

    @property
    def newest_beat(self) -> Beat | None:
        """The newest heartbeat of the rank that is furthest; None if there is none."""
        return self._watchdog.newest

    def wait(self) -> ExitKind:
        """Wait until all processes of the launch have exited; return how they ended.

        Raises:
            TakenOverError: another supervisor has taken over the run; the ranks are killed, so that they save nothing.
        """
        try:
            return self._wait()
        except TakenOverError:
            self._kill_all()
            raise

    def _wait(self) -> ExitKind:
        context, ranks = self._context, self._ranks
        exit_kind: ExitKind = "exited"
        deadline: float | None = None  # after it, processes that are left are killed
        while not ranks.have_exited:
            time.sleep(POLL_SECONDS)
            context.directories.checkpoints.open()  # the ranks create it
            context.poll()
            if deadline is None and (context.stop.requested or not ranks.is_launcher_running):
                if ranks.launcher_was_killed and not context.stop.requested:
                    exit_kind = "launcher killed"  # the ranks save before they exit
                ranks.request_stop()
                deadline = time.monotonic() + context.settings.supervisor.stop_seconds
            if deadline is not None and time.monotonic() > deadline:
                self._report_kill()
                ranks.kill()
            elif ranks.are_stuck:
                ranks.kill()
            elif (hang := self._watchdog.check()) is not None and not ranks.have_exited:
                if ranks.failures():  # the other ranks wait for one that has failed: a crash
                    ranks.kill()
                else:
                    self._end_hang(hang)
                    return "hung"
        return exit_kind

    def _report_kill(self) -> None:
        """Report, once a launch, that ranks are killed because they have not stopped in time."""
        if self._reported_kill:
            return
        self._reported_kill = True
        seconds = duration(self._context.settings.supervisor.stop_seconds)
        saved = self._context.directories.saved_step()
        newest = "there is no checkpoint" if saved < 0 else f"the newest checkpoint is of step {saved:,}"
        text = f"killing the ranks: they have not exited {seconds} after the stop request (supervisor.stop_seconds)"
        self._context.reporter.report("crash", f"{text}; {newest}")

    def _end_hang(self, hang: Hang) -> None:
        """Write the stacks of the ranks, then kill them: ranks that hang do not react to a stop request."""
        run_dir, report = self._context.directories.run_dir, self._context.reporter.report
        stacks = run_dir / "hangs" / time.strftime("%Y-%m-%dT%H-%M-%S")
        missing = ""
        try:
            self._ranks.write_stacks(run_dir, stacks)
        except OSError as error:
            missing = f"; stacks cannot be written: {reason_of(error)}"
        if _has_files(stacks):
            report("hang", f"{hang.text}; stacks in {stacks}{missing}", hang.step, stacks=str(stacks))
        else:
            report("hang", f"{hang.text}{missing}", hang.step)
        while not self._ranks.have_exited:
            self._ranks.kill()
            time.sleep(POLL_SECONDS)
            self._context.poll()

    def _kill_all(self) -> None:
        while not self._ranks.have_exited:
            self._ranks.kill()
            time.sleep(_KILL_INTERVAL_SECONDS)


def _has_files(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except OSError:
        return False
