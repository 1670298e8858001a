"""Supervise a run: launch the ranks, decide what to do when they have exited, and launch them again.

The parts, in the order of their use: ``waiting`` (before a launch), ``launches`` (one launch: ``launcher`` starts it,
``rank_watch`` watches it), ``restart_policy`` (the decision) and ``relocation`` (after a move of the run's directory).
They reach the processes of a launch only by ``launcher.Ranks``.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace

from ds_gpt2.common import locks
from ds_gpt2.common.locks import Lock
from ds_gpt2.config.run_location import write_first_settings
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.supervisor_record import LOCK, SUPERVISOR_DIR
from ds_gpt2.supervision import relocation, waiting
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.context import Context, TakenOverError
from ds_gpt2.supervision.launches import Launches
from ds_gpt2.supervision.orphans import end_orphans
from ds_gpt2.supervision.other_supervisor import check_unsupervised
from ds_gpt2.supervision.restart_policy import Finish, GiveUp, LaunchResult, Restart, RestartPolicy
from ds_gpt2.supervision.stop_signals import StopSignals
from ds_gpt2.supervision.supervised_run import SupervisedRun


def supervise(run: SupervisedRun, settings: Settings, cluster: Cluster | None = None) -> int:
    """Supervise ``run`` until it ends.

    Args:
        cluster: the hosts of the ranks, connected and checked; None: this machine.

    Returns:
        The exit code, see ``exit_codes``.

    Raises:
        UserError: the run has a supervisor already, here or on another machine.
    """
    directory = settings.run_dir / SUPERVISOR_DIR
    directory.mkdir(parents=True, exist_ok=True)
    with StopSignals() as stop:
        check_unsupervised(settings)
        with locks.lock(directory / LOCK, f"run {settings.run.name}") as lock:
            supervisor = _Supervisor(run, settings, stop, cluster, lock)
            code = supervisor.run_to_end()
        if supervisor.next_command and not stop.end_requests():
            if cluster is not None:
                cluster.close()
            _execute(supervisor.next_command)
    return code


def _execute(command: list[str]) -> None:
    """Replace this process by ``command``; return only if that fails, which is reported."""
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {shlex.join(command)}: {error.strerror}", file=sys.stderr)


class _Supervisor:
    """The supervisor of one run."""

    def __init__(
        self, run: SupervisedRun, settings: Settings, stop: StopSignals, cluster: Cluster | None, lock: Lock
    ) -> None:
        self._run = run
        self._context = Context(settings, stop, run.layout.ranks, lock)
        self._cluster = cluster
        self._launches = Launches(self._context, relocation.was_resumed_after_move(settings.run.name), cluster)
        self.next_command: list[str] = []  # to execute after the end

    def run_to_end(self) -> int:
        """Launch the ranks until the run is done, stopped, given up or taken over; return the exit code."""
        try:
            return self._run_to_end()
        except TakenOverError as error:  # the journal and the record are those of the other supervisor
            self._context.reporter.end_lease()
            print(f"supervisor: {error}: the ranks of this supervisor were ended", file=sys.stderr, flush=True)
            return exit_codes.CRASHED

    def _run_to_end(self) -> int:
        context, directories = self._context, self._context.directories
        write_first_settings(context.settings)
        directories.take_stop_file()  # of an earlier run
        end_orphans(context, self._cluster)
        if self._cluster is not None:
            context.reporter.record_running(self._run.layout.ranks, agents=self._cluster.agents())
            if context.stop.requested:
                return self._end(exit_codes.STOPPED, None)
        policy = RestartPolicy(context.settings.supervisor, directories.saved_step())
        run = self._run
        while True:
            if not self._wait_until_ready(run):
                return self._end(exit_codes.STOPPED, None)
            if directories.run_was_relocated():
                return self._move_on(run, None)
            if self._cluster is not None and self._may_lack_hosts:
                run = waiting.on_hosts(context, self._cluster, run)
            result = self._launches.run(run)
            decision = policy.decide(result)
            if directories.run_was_relocated() and not context.stop.requested:
                if isinstance(decision, Restart):
                    return self._move_on(run.after(decision), result)
                if decision == Finish(exit_codes.STOPPED):
                    return self._move_on(replace(run, resume="latest"), result)
            if isinstance(decision, Finish):
                return self._end(decision.code, result)
            if isinstance(decision, GiveUp):
                context.reporter.report("gave_up", decision.text, result.step)
                return self._end(exit_codes.CRASHED, result)
            if not waiting.wait_for_restart(context, decision):
                return self._end(exit_codes.STOPPED if directories.saved_step() >= 0 else exit_codes.CRASHED, result)
            run = run.after(decision)

    def _wait_until_ready(self, run: SupervisedRun) -> bool:
        """Wait until the ranks can be launched; return False if a stop is requested first."""
        if self._launches.next_is_restart and not waiting.wait_for_writable_logs(self._context):
            return False
        if self._cluster is None or not self._may_lack_hosts:
            return waiting.wait_for_checkpoints(self._context, run.resume)
        while waiting.wait_for_hosts(self._context, self._cluster):
            if not waiting.wait_for_checkpoints(self._context, run.resume):
                return False
            if waiting.has_enough_hosts(self._context, self._cluster) or self._context.directories.run_was_relocated():
                return True
        return False

    @property
    def _may_lack_hosts(self) -> bool:
        """Whether the next launch may be without some of the hosts: the first has all, unless they were lost since."""
        return self._launches.next_is_restart or (self._cluster is not None and bool(self._cluster.away))

    def _move_on(self, run: SupervisedRun, result: LaunchResult | None) -> int:
        """End this supervisor because the run's directory was moved; ``next_command`` resumes the run there."""
        step, code = (result.step, result.outcome.code) if result is not None else (None, exit_codes.STOPPED)
        has_started = self._launches.has_started
        self.next_command = relocation.command_to_resume(self._context, run, step, has_started, self._cluster)
        return self._close(code)

    def _end(self, code: int, result: LaunchResult | None) -> int:
        if code == exit_codes.MISTAKE:
            text = "stopped by a configuration error that a restart does not fix: see the terminal"
            self._context.reporter.add_event("mistake", text, result.step if result is not None else None)
        return self._close(code)

    def _close(self, code: int) -> int:
        self._context.reporter.record_ended(code)
        self._context.reporter.close()
        return code
