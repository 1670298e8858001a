"""Run the ranks once, from their start to their end, and summarize how they ended for the restart policy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.formatting import counted
from ds_gpt2.run_dir import exit_codes, stop_request
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.heartbeat import Beat, clear_heartbeats
from ds_gpt2.run_dir.supervisor_record import SUPERVISOR_DIR, AgentRecord
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.context import Context
from ds_gpt2.supervision.host_events import report_lost_hosts
from ds_gpt2.supervision.launched_ranks import LaunchedRanks
from ds_gpt2.supervision.launcher import Ranks
from ds_gpt2.supervision.rank_watch import ExitKind, RankWatch
from ds_gpt2.supervision.restart_policy import LaunchResult
from ds_gpt2.supervision.supervised_run import SupervisedRun

_OUTCOME = "outcome"  # file in the supervisor's directory


class Launches:
    """The launches of one run, one after another. The results of earlier launches affect how a later one is judged."""

    def __init__(self, context: Context, is_restart: bool, cluster: Cluster | None = None) -> None:
        """
        Args:
            is_restart: whether the run was launched before, by the supervisor that this one replaces.
            cluster: the hosts of the ranks; None: this machine.
        """
        self._context = context
        self._cluster = cluster
        self._is_restart = is_restart
        self._has_trained = False  # a rank has reached its first step or evaluation
        self.has_started = False  # the ranks have started to train

    @property
    def next_is_restart(self) -> bool:
        """Whether the next launch restarts the run."""
        return self._is_restart

    def run(self, run: SupervisedRun) -> LaunchResult:
        """Launch the ranks and watch them until all have exited."""
        directories, reporter = self._context.directories, self._context.reporter
        clear_heartbeats(directories.run_dir)
        outcome_file = directories.run_dir / SUPERVISOR_DIR / _OUTCOME
        with contextlib.suppress(OSError):
            outcome_file.unlink()
        journal_size = reporter.journal_size()
        where = f" on {self._cluster.describe(run.layout.ranks)}" if self._cluster is not None else ""
        text = f"starting {counted(run.layout.ranks, 'rank')}{where}, {run.origin()}"
        facts: dict[str, Any] = {"restart": self._is_restart}
        if self._cluster is not None:
            facts["hosts"] = self._cluster.ranks_by_host(run.layout.ranks)
        self._is_restart = True
        try:
            ranks = self._start(run, outcome_file)
        except (OSError, UserError) as error:  # possibly temporary, such as too many processes, or a host that is away
            reporter.add_event("launch", text, **facts)
            reporter.report("crash", f"the ranks cannot be started: {reason_of(error)}")
            stopped, saved_step = self._context.stop.requested, directories.saved_step()
            lost = tuple(self._report_lost({}, None))  # not those that have been away before
            outcome = Outcome(exit_codes.CRASHED)
            return LaunchResult(outcome, stopped, 0, 0, from_step=0, saved_step=saved_step, lost_hosts=lost)
        reporter.add_event("launch", text, **facts, **self._network())
        reporter.record_running(run.layout.ranks, ranks.group, self._agents())
        watch = RankWatch(self._context, ranks)
        exit_kind = watch.wait()
        reporter.record_running(run.layout.ranks, agents=self._agents())
        return self._summarize(ranks, exit_kind, watch.newest_beat, journal_size)

    def _start(self, run: SupervisedRun, outcome_file: Path) -> LaunchedRanks:
        """Start the ranks.

        Raises:
            OSError, UserError: they cannot be started.
        """
        if self._cluster is not None:
            return self._cluster.launch(run)
        environment = {**run.environment, **stop_request.supervisor_environment()}
        return Ranks(run.command(), run.layout, outcome_file, environment, run.script)

    def _network(self) -> dict[str, Any]:
        return self._cluster.network_facts if self._cluster is not None else {}

    def _agents(self) -> tuple[AgentRecord, ...]:
        return self._cluster.agents() if self._cluster is not None else ()

    def _summarize(
        self, ranks: LaunchedRanks, exit_kind: ExitKind, beat: Beat | None, journal_size: int
    ) -> LaunchResult:
        """Report how the launch ended, and return it.

        Args:
            beat: the newest heartbeat.
            journal_size: bytes of the journal before the launch.
        """
        stop, reporter = self._context.stop, self._context.reporter
        lost = ranks.lost_hosts
        self._report_lost(lost, beat.step if beat else None)
        cut_off = [host for host in self._cluster.cut_off if host in lost] if self._cluster is not None else []
        outcome = self._judge(ranks.outcome(), exit_kind, beat, bool(lost))
        has_crashed = exit_kind != "hung" and outcome.code == exit_codes.CRASHED and (bool(cut_off) or not lost)
        if not stop.requested and has_crashed:
            reporter.report("crash", _crash_text(ranks, exit_kind, outcome, cut_off), beat.step if beat else None)
        starts = [event for event in reporter.events_since(journal_size) if event.kind == "start"]
        has_started = bool(starts) or _has_trained(beat)  # the journal may not be readable
        self.has_started |= has_started
        if stop.requested and outcome.code == exit_codes.CRASHED and not has_started:
            reporter.report("stop", "stopped before the first step of this start: nothing to save")
            outcome = Outcome(exit_codes.STOPPED)
        return LaunchResult(
            outcome,
            stop_requested=stop.requested,
            step=beat.step if beat else 0,
            batch=beat.batch if beat else 0,
            from_step=starts[-1].step or 0 if starts else None,
            saved_step=self._context.directories.saved_step(),
            lost_hosts=tuple(lost),
        )

    def _report_lost(self, reasons: dict[str, str], step: int | None) -> list[str]:
        """Report the hosts that have stopped responding; return their names.

        Args:
            reasons: host -> why it is lost, where that is known.
        """
        if self._cluster is None:
            return []
        return report_lost_hosts(self._context.reporter, self._cluster, reasons, step)

    def _judge(self, outcome: Outcome, exit_kind: ExitKind, beat: Beat | None, host_was_lost: bool) -> Outcome:
        """Return what rank 0 reported, or a crash where the report does not describe the whole run."""
        self._has_trained |= _has_trained(beat)
        if outcome.code == exit_codes.MISTAKE and self._has_trained:  # the same command has trained before
            return Outcome(exit_codes.CRASHED)
        lost = exit_kind == "launcher killed" or host_was_lost or outcome.supervisor_lost  # so the ranks were to save
        on_request = self._context.stop.requested or not lost
        if outcome.code == exit_codes.STOPPED and not on_request:
            return Outcome(exit_codes.CRASHED, supervisor_lost=outcome.supervisor_lost)
        return outcome


def _has_trained(beat: Beat | None) -> bool:
    """Return whether a rank has reached its first step or evaluation."""
    return beat is not None and (beat.step > 0 or beat.phase == "evaluating")


def _crash_text(ranks: LaunchedRanks, exit_kind: ExitKind, outcome: Outcome, cut_off: Sequence[str] = ()) -> str:
    """Return the most likely cause of a crash.

    Args:
        cut_off: see ``Cluster.cut_off``.
    """
    if cut_off:
        where = ", ".join(cut_off)
        return f"the ranks on {where} were ended: this supervisor was stopped (SIGSTOP), or its messages did not arrive"
    if outcome.supervisor_lost:
        return "the ranks stopped because they found no supervisor process"
    if exit_kind == "launcher killed":
        return "DeepSpeed's launcher was killed"
    if ranks.ran_out_of_memory:
        return "the kernel killed a process because memory ran out"
    failures, kills = ranks.failures(), ranks.kills()
    silent = sorted(set(range(ranks.count)) - set(failures) - set(kills))
    parts = [f"rank {rank} was killed by {signal}" for rank, signal in sorted(kills.items())]
    if silent and not kills:
        parts.append(f"rank {', '.join(map(str, silent))} exited without an error message")
    parts += [f"rank {rank}: {text}" for rank, text in list(failures.items())[:1]]
    return "; ".join(parts if kills else [*parts, ranks.exit_status])
