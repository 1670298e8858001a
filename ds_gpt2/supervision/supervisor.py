"""Keep a run going: start the ranks, watch that they get on, start them again after a crash, and say what happened."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from ds_gpt2.checkpoint.catalog import newest_step
from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import append_lines, write_problem
from ds_gpt2.common.formatting import counted, duration
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_start import start_of
from ds_gpt2.common.terminal import one_line
from ds_gpt2.config.batch_plan import format_batches
from ds_gpt2.config.run_location import load_run_settings, write_first_settings
from ds_gpt2.config.settings import PROJECT_DIR, Settings
from ds_gpt2.run_dir import exit_report, stop_request
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.heartbeat import clear_heartbeats
from ds_gpt2.run_dir.journal import Journal, Kind, read_journal
from ds_gpt2.run_dir.supervisor_record import SUPERVISOR_DIR, SupervisorRecord, read_supervisor_record
from ds_gpt2.supervision import launcher
from ds_gpt2.supervision.alerts.alerts import Alerts
from ds_gpt2.supervision.disk_watch import DiskWatch, WriteWatch
from ds_gpt2.supervision.launcher import RankLayout, Ranks
from ds_gpt2.supervision.restart_policy import Again, Ended, Finish, GiveUp, Restarts
from ds_gpt2.supervision.watchdog import Hang, Watchdog
from ds_gpt2.training.resume_choice import CheckpointsGoneError, choose_source

_LOOK_SECONDS = 0.5  # between two looks at the ranks
_PROBE_SECONDS = 5.0  # between two attempts to write to a directory that cannot be written
_SECOND_MOVE_SECONDS = 60.0  # after the run's directory was moved, for that of its checkpoints
_LOCK, _OUTCOME = "lock", "outcome"
_MOVED = "DS_GPT2_MOVED"  # environment: the name of a run that is resumed because it was moved


@dataclass(frozen=True)
class SupervisedRun:
    """What is to be kept going."""

    arguments: tuple[str, ...]  # of train.py, all but what follows
    place: RankLayout
    resume: str | None = None
    leave_out: tuple[int, ...] = ()
    script: Path = launcher.TRAIN
    environment: Mapping[str, str] = field(default_factory=dict)  # laid over this process's own

    def command(self) -> list[str]:
        """Arguments of ``train.py``."""
        resume = ["--resume", self.resume] if self.resume else []
        left_out = ["--leave_out", format_batches(self.leave_out)] if self.leave_out else []
        return [*self.arguments, *resume, *left_out]

    def resume_arguments(self, run_dir: Path) -> list[str]:
        """Arguments of ``launch.sh``, once the run's settings are stored in its directory."""
        left_out = ["--leave_out", format_batches(self.leave_out)] if self.leave_out else []
        source = "latest" if self.resume in (None, "auto") else str(self.resume)
        return ["resume", str(run_dir), "--num_gpus", str(self.place.ranks), "--from", source, *left_out]


def supervise(run: SupervisedRun, settings: Settings) -> int:
    """Keep ``run`` going to its end; returns its exit code (see outcome).

    Raises:
        UserError: the run is supervised already.
    """
    directory = settings.run_dir / SUPERVISOR_DIR
    directory.mkdir(parents=True, exist_ok=True)
    with files.lock(directory / _LOCK, f"run {settings.run.name}"), _StopRequests() as requests:
        supervisor = _Supervisor(run, settings, requests)
        code = supervisor.keep_going()
    if supervisor.next_command and not requests.asked:
        try:
            os.execvp(supervisor.next_command[0], supervisor.next_command)
        except OSError as error:
            print(f"cannot start {shlex.join(supervisor.next_command)}: {error.strerror}", file=sys.stderr)
    return code


class _StopRequests:
    """From here on Ctrl+C, SIGTERM and a closing terminal ask the ranks to stop, and nothing else."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _StopRequests:
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # USR1: what Slurm sends before its time limit
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means: outlive the terminal
            signals.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # it is what signal.signal gave

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class _Supervisor:
    """One run's, from its first start to its end."""

    def __init__(self, run: SupervisedRun, settings: Settings, requests: _StopRequests) -> None:
        self._run = run
        self.next_command: list[str] = []  # to be executed after the end
        self._settings = settings
        self._opened, self._project = OpenDirectory(settings.run_dir), OpenDirectory(PROJECT_DIR)
        self._checkpoints = OpenDirectory(settings.checkpoint_dir)
        self._requests = requests
        self._has_trained = self._has_begun = self._kills = False
        self._launched = os.environ.pop(_MOVED, "") == settings.run.name  # then it is a restart
        self._journal = Journal(settings.run_dir)
        self._alerts = Alerts(settings.alerts, settings.run_dir)
        self._disk, self._writes = DiskWatch(settings), WriteWatch(self._opened)
        start = start_of(os.getpid()) or ""
        self._me = SupervisorRecord(
            os.getpid(), time.time(), socket.gethostname(), "running", run.place.ranks, start=start
        )

    @property
    def _run_dir(self) -> Path:
        return self._opened.path

    def keep_going(self) -> int:
        """Start, and start again, until there is no more to be done."""
        write_first_settings(self._settings)
        self._take_stop_file()  # of before
        self._end_orphans()
        restarts = Restarts(self._settings.supervisor, self._saved_step())
        run = self._run
        while True:
            if not (self._await_directories() and self._await_checkpoints(run)):
                return self._end(exit_report.STOPPED, None)
            if self._has_gone():
                return self._move_on(run, None)
            ended = self._start(run)
            decision = restarts.after(ended)
            if self._has_gone() and not self._requests.asked:
                if isinstance(decision, Again):
                    return self._move_on(_after(run, decision), ended)
                if decision == Finish(exit_report.STOPPED):
                    return self._move_on(replace(run, resume="latest"), ended)
            if isinstance(decision, Finish):
                return self._end(decision.code, ended)
            if isinstance(decision, GiveUp):
                self._tell("gave_up", decision.text, ended.step)
                return self._end(exit_report.CRASHED, ended)
            if not self._wait(decision):
                return self._end(exit_report.STOPPED if self._saved_step() >= 0 else exit_report.CRASHED, ended)
            run = _after(run, decision)

    def _start(self, run: SupervisedRun) -> Ended:
        """One start of the ranks, to its end."""
        clear_heartbeats(self._run_dir)
        directory = self._run_dir / SUPERVISOR_DIR
        with contextlib.suppress(OSError):
            (directory / _OUTCOME).unlink()
        from_journal, self._kills = self._journal.size(), False
        killed_for_memory = launcher.out_of_memory_kills()
        text = f"starting {counted(run.place.ranks, 'rank')}, {_origin(run)}"
        self._note("launch", text, restart=self._launched)
        self._launched = True
        environment = {**run.environment, **stop_request.supervisor_environment()}
        try:
            ranks = Ranks(run.command(), run.place, directory / _OUTCOME, environment, run.script)
        except OSError as error:  # too many processes, say: that may pass
            self._tell("crash", f"the ranks cannot be started: {error.strerror}")
            return Ended(Outcome(exit_report.CRASHED), self._requests.asked, 0, 0, 0, self._saved_step())
        self._record(replace(self._me, group=ranks.group))
        watchdog = Watchdog(self._settings.supervisor, self._opened, run.place.ranks)
        how = self._watch(ranks, watchdog)
        self._record(self._me)
        result, beat = ranks.outcome(), watchdog.newest
        self._has_trained |= beat is not None and (beat.step > 0 or beat.phase == "evaluating")
        if result.code == exit_report.MISTAKE and self._has_trained:  # the same command has trained before
            result = Outcome(exit_report.CRASHED)
        if result.code == exit_report.STOPPED and (how == "launcher died" or result.alone):  # without a request
            result = Outcome(exit_report.CRASHED, alone=result.alone)
        if not self._requests.asked and how != "hung" and result.code == exit_report.CRASHED:
            out_of_memory = launcher.out_of_memory_kills() > killed_for_memory
            text = "DeepSpeed's launcher has died" if how == "launcher died" else _why(ranks, out_of_memory)
            text = "the ranks took this supervisor for dead" if result.alone else text
            self._tell("crash", text, beat.step if beat else None)
        starts = [event for event in read_journal(self._run_dir, from_journal) if event.kind == "start"]
        self._has_begun |= bool(starts)
        if self._requests.asked and result.code == exit_report.CRASHED and not starts:
            self._tell("stop", "stopped before the first step of this start: there was nothing to save")
            result = Outcome(exit_report.STOPPED)
        return Ended(
            result,
            stop_requested=self._requests.asked,
            step=beat.step if beat else 0,
            batch=beat.batch if beat else 0,
            from_step=starts[-1].step or 0 if starts else None,
            saved_step=self._saved_step(),
        )

    def _watch(self, ranks: Ranks, watchdog: Watchdog) -> Literal["ended", "hung", "launcher died"]:
        """Until no process of this start is left; how it came to that."""
        how: Literal["ended", "launcher died"] = "ended"
        deadline: float | None = None  # from when on remaining processes are killed
        while not ranks.gone:
            time.sleep(_LOOK_SECONDS)
            self._checkpoints.open()  # the ranks make it
            self._alerts.tell_news()
            self._look_at_disks()
            if deadline is None and (self._requests.asked or not ranks.launcher_lives):
                if ranks.launcher_died and not self._requests.asked:
                    how = "launcher died"  # the ranks save before they end
                ranks.ask_to_stop()
                deadline = time.monotonic() + self._settings.supervisor.stop_seconds
            if deadline is not None and time.monotonic() > deadline:
                self._note_kill()
                ranks.kill()
            elif (hang := watchdog.look()) is not None and not ranks.gone:
                if ranks.failures():  # the others wait for one that has failed: a crash
                    ranks.kill()
                else:
                    self._end_hung(ranks, hang)
                    return "hung"
        return how

    def _note_kill(self) -> None:
        """Report, once a start, that ranks are killed which have not saved in time."""
        if self._kills:
            return
        self._kills = True
        seconds = duration(self._settings.supervisor.stop_seconds)
        saved = self._saved_step()
        text = f"the ranks have not ended {seconds} after the stop (supervisor.stop_seconds): they are killed;"
        self._tell("crash", f"{text} the newest checkpoint is {'none' if saved < 0 else f'of step {saved:,}'}")

    def _end_hung(self, ranks: Ranks, hang: Hang) -> None:
        """Take down what the ranks are doing, then kill them: who hangs answers to nothing else."""
        stacks = self._run_dir / "hangs" / time.strftime("%Y-%m-%dT%H-%M-%S")
        try:
            launcher.write_stacks(self._run_dir, self._run.place.ranks, ranks.group, stacks)
            self._tell("hang", f"{hang.text}; stacks in {stacks}", hang.step, stacks=str(stacks))
        except OSError as error:
            self._tell("hang", f"{hang.text}; its stacks cannot be written: {error.strerror}", hang.step)
        while not ranks.gone:
            ranks.kill()
            time.sleep(0.1)

    def _end_orphans(self) -> None:
        """What a supervisor that was killed has left of this run: it is asked to save, and ended."""
        before = read_supervisor_record(self._run_dir)
        if before is None or before.group is None or before.host != self._me.host:
            return
        if not launcher.ranks_of(before.group) or before.is_running():
            return
        self._tell(
            "orphans", f"processes of an earlier start are left ({before.group}): they are asked to save and end"
        )
        launcher.ask_to_stop(before.group)
        deadline = time.monotonic() + self._settings.supervisor.stop_seconds
        while launcher.members(before.group):
            time.sleep(0.1)
            if time.monotonic() > deadline:
                launcher.kill(before.group)

    def _await_directories(self) -> bool:
        """Before a restart, until the run's logs can be written; False if a stop is requested meanwhile."""
        reported = ""
        while self._launched and not self._has_gone() and (problem := self._write_problem()) is not None:
            if problem != reported:
                self._tell("not_logged", f"{problem}: the run restarts when it can")
            reported = problem
            if not self._pause(_PROBE_SECONDS):
                return False
        return True

    def _write_problem(self) -> str | None:
        """Which directory cannot be written, and why. That of checkpoints may be full: older ones give way."""
        tensorboard = self._settings.tensorboard_dir
        for directory in (self._run_dir, *([tensorboard] if tensorboard.is_dir() else [])):
            if (problem := write_problem(directory)) is not None:
                return f"{directory} cannot be written ({problem})"
        return None

    def _await_checkpoints(self, run: SupervisedRun) -> bool:
        """Until the checkpoints that the run has saved are there; False if a stop is asked for meanwhile."""
        seconds, told = self._settings.supervisor.backoff_seconds, ""
        while (missing := self._missing_checkpoints(run)) is not None and not self._has_gone():
            if missing != told:
                self._tell("no_checkpoints", missing)
                told = missing
            if not self._pause(seconds):
                return False
            seconds = min(self._settings.supervisor.longest_backoff_seconds, max(1.0, 2 * seconds))
        return True

    def _missing_checkpoints(self, run: SupervisedRun) -> str | None:
        try:
            choose_source(self._settings, run.resume)
        except CheckpointsGoneError as error:
            return f"{error}; waiting for it"
        except UserError:  # the ranks will say it
            return None
        return None

    def _wait(self, again: Again) -> bool:
        """Until it is time for the next start; False if a stop is asked for meanwhile."""
        self._tell("restart", f"starting again in {duration(again.seconds)} {again.text}")
        return self._pause(again.seconds)

    def _pause(self, seconds: float) -> bool:
        """Wait, unless the run is moved; False if a stop is asked for meanwhile."""
        self._record(replace(self._me, state="waiting", next_start=time.time() + seconds))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._requests.asked and not self._has_gone():
            self._requests.asked |= self._take_stop_file()
            self._alerts.tell_news()
            self._look_at_disks()
            time.sleep(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
        return not self._requests.asked

    def _take_stop_file(self) -> bool:
        """Whether there was a request to stop; while ranks live, they take it."""
        try:
            (self._run_dir / stop_request.STOP_FILE).unlink()
        except OSError:
            return False
        return True

    def _end(self, code: int, ended: Ended | None) -> int:
        if code == exit_report.MISTAKE:
            step = ended.step if ended is not None else None
            self._note(
                "mistake", "stopped by a configuration error that a restart does not fix: see the terminal", step
            )
        self._record(replace(self._me, state="ended", code=code))
        self._alerts.tell_news()
        self._alerts.close()
        return code

    def _has_gone(self) -> bool:
        return self._opened.is_moved or self._opened.is_deleted

    def _move_on(self, run: SupervisedRun, ended: Ended | None) -> int:
        """The run's directory was moved or deleted, and no rank is left: resume there, if that can be done."""
        code = ended.outcome.code if ended is not None else exit_report.STOPPED
        before, step = self._settings.run_dir, ended.step if ended is not None else None
        if self._opened.is_deleted:
            text = f"{before} was deleted: the run has ended"
            self._tell("stop", text, step)
        elif self._saved_step() < 0 or not self._has_begun:
            self._tell("stop", f"{before} was moved to {self._run_dir} before it was saved: start it again", step)
        elif (expected := self._await_same_move()) is not None:
            text = f"its checkpoints are in {self._checkpoints.path}: move them to {expected}, then resume"
            self._tell("stop", f"{before} was moved to {self._run_dir}, but {text}", step)
        else:
            self._tell("restart", f"{before} was moved to {self._run_dir}: resuming there", step)
            os.environ[_MOVED] = self._run_dir.name
            self.next_command = [*self._program(), *run.resume_arguments(self._run_dir)]
        self._record(replace(self._me, state="ended", code=code))
        self._alerts.close()
        return code

    def _await_same_move(self) -> Path | None:
        """Wait for the directory of checkpoints to be moved like that of the run.

        Returns:
            Where the checkpoints are expected, if they are still elsewhere; None if they are there.
        """
        deadline = time.monotonic() + _SECOND_MOVE_SECONDS
        while True:
            expected = load_run_settings(self._run_dir).checkpoint_dir
            if expected.is_relative_to(PROJECT_DIR):  # as the next process sees it, from where the project is now
                expected = self._project.path / expected.relative_to(PROJECT_DIR)
            with contextlib.suppress(OSError):
                if os.path.samefile(expected, self._checkpoints.path):
                    return None
            if self._requests.asked or time.monotonic() > deadline:
                return expected
            time.sleep(_LOOK_SECONDS)

    def _program(self) -> list[str]:
        """What a person would type, where the project is now; an installation in the project is moved by launch.sh."""
        if Path(sys.executable).is_relative_to(PROJECT_DIR) or "DS_GPT2_PYTHON" in os.environ:
            return ["bash", str(self._project.path / "launch.sh")]
        return [sys.executable, str(self._project.path / "ds_gpt2" / "__main__.py")]

    def _look_at_disks(self) -> None:
        if (warning := self._disk.look()) is not None:
            self._tell("disk_low", warning)
        if (warning := self._writes.look()) is not None:
            self._tell("not_logged", warning)
        with contextlib.suppress(OSError):
            self._journal.write_pending()

    def _saved_step(self) -> int:
        return newest_step(self._checkpoints.path)

    def _record(self, state: SupervisorRecord) -> None:
        with contextlib.suppress(OSError):  # a full disk: the run goes on
            state.write(self._run_dir)

    def _tell(self, kind: Kind, text: str, step: int | None = None, **facts: object) -> None:
        """On the terminal, in the run's log and in its journal."""
        with contextlib.suppress(OSError):  # a closed terminal
            print(f"supervisor: {text}", flush=True)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {one_line(text)}\n"
        with contextlib.suppress(OSError):
            append_lines(self._run_dir / "train.log", line.encode(errors="backslashreplace"))
        self._note(kind, text, step, **facts)

    def _note(self, kind: Kind, text: str, step: int | None = None, **facts: object) -> None:
        """In the journal; if it cannot be written, a message is sent all the same."""
        if (missed := self._journal.write(kind, text, step, **facts)) is not None:
            self._alerts.tell(missed)


def _after(run: SupervisedRun, again: Again) -> SupervisedRun:
    """The next start; an older checkpoint does not know of batches that were left out before."""
    return replace(run, resume=again.resume, leave_out=tuple(sorted({*run.leave_out, *again.leave_out})))


def _why(ranks: Ranks, out_of_memory: bool) -> str:
    """What a person would want to read first."""
    if out_of_memory:
        return "the kernel has killed a process because the memory was used up"
    failures = ranks.failures()
    silent = sorted(set(range(ranks.count)) - set(failures))
    parts = [f"rank {rank}: {text}" for rank, text in list(failures.items())[:1]]
    if silent:
        parts.insert(0, f"rank {', '.join(map(str, silent))} exited without an error message")
    return "; ".join([*parts, ranks.exit_status])


def _origin(run: SupervisedRun) -> str:
    text = f"to go on from {run.resume}" if run.resume else "from the beginning"
    return f"{text} without batches {format_batches(run.leave_out)}" if run.leave_out else text
