"""The agent of one host: it starts, watches, stops and kills the ranks there for a supervisor on another machine.

The supervisor starts it by ssh or srun, sends requests to its standard input and reads its standard output; see
``messages``. If the input ends, or brings nothing for a while, the supervisor is gone: the ranks are asked to save,
then ended, and the agent ends. A signal, as at the shutdown of the host, has the same effect. It ends only processes
that it has started.

Nothing that may wait for a disk runs in the threads that read requests and watch the time, so that a file system that
pauses does not look like the loss of the host or of the supervisor.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_identity import is_running, start_of
from ds_gpt2.run_dir import stop_request
from ds_gpt2.run_dir.exit_report import signal_name
from ds_gpt2.run_dir.supervisor_record import SUPERVISOR_DIR
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.cluster import link_speed, node_checks
from ds_gpt2.supervision.cluster.channel import Outbox, forward
from ds_gpt2.supervision.cluster.messages import (
    NOT_HEARD,
    PING_SECONDS,
    SILENCE_SECONDS,
    LaunchRequest,
    NodeReport,
    as_values,
    launch_request,
)
from ds_gpt2.supervision.launcher import RankLayout, Ranks
from ds_gpt2.supervision.rank_heartbeats import LocalHeartbeats

_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 1.0  # that counts as silence: this process may have been stopped
_DISK_SECONDS = 5.0  # for the directory of the run to answer
_KILL_SECONDS = 30.0  # for killed processes to be gone


class Agent:
    """Serves one supervisor."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._launch: _Launch | None = None
        self._launching = threading.Lock()  # held while ranks are started
        self._requests = 0  # that were received
        self._end_reason: str | None = None
        self._connection_is_lost = False  # that is the reason
        self._has_ended = threading.Event()
        self._actions: dict[str, Callable[..., Any]] = {
            "ping": time.time,
            "stop": self._for_launch(lambda launch: launch.ranks.request_stop()),
            "kill": self._for_launch(lambda launch: launch.ranks.kill()),
        }
        self._slow_actions: dict[str, Callable[..., Any]] = {
            "launch": self._start,
            "stopped": lambda: sorted(self._launch.heartbeats.stopped()) if self._launch is not None else [],
            "heartbeat_problem": lambda: self._launch.heartbeat_problem() if self._launch is not None else None,
            "stacks": self._write_stacks,
            "end_previous": end_previous,
            **node_checks.ACTIONS,
            **link_speed.ACTIONS,
        }

    def serve(self, descriptor: int) -> None:
        """Serve the requests of a descriptor until the supervisor is gone or ``end`` is called, then end the ranks.

        Meanwhile, requests are still served: the ranks may save for minutes.
        """
        self._outbox.send({"hello": {"pid": os.getpid(), "start": start_of(os.getpid())}})
        for work in (lambda: self._read(descriptor), self._send_reports):
            threading.Thread(target=self._work, args=(work,), daemon=True).start()
        try:
            self._wait_for_end()
        finally:
            self._outbox.send({"end": self._end_reason})
            node_checks.end_commands()
            with self._launching:  # no other launch follows
                launch = self._launch
            if launch is not None:
                end([launch.ranks.group], launch.stop_seconds, self._connection_is_lost)
            self._has_ended.set()

    def end(self, reason: str, connection_is_lost: bool = False) -> None:
        """Let ``serve`` end; the first reason counts."""
        if self._end_reason is None:
            self._end_reason, self._connection_is_lost = reason, connection_is_lost

    def _wait_for_end(self) -> None:
        requests, silence, checked = 0, 0.0, time.monotonic()
        while self._end_reason is None:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            silence += min(now - checked, _LONGEST_POLL_SECONDS)
            checked = now
            if self._requests != requests:
                requests, silence = self._requests, 0.0
            elif silence > SILENCE_SECONDS:
                self.end(f"{NOT_HEARD} for {silence:.0f} s", connection_is_lost=True)

    def _work(self, work: Callable[[], None]) -> None:
        """Run the work of a thread, without which the agent cannot continue."""
        try:
            work()
        except Exception as error:
            self.end(f"its agent has failed: {type(error).__name__}: {one_line_reason(error)}")

    def _read(self, descriptor: int) -> None:
        with contextlib.suppress(OSError), open(descriptor, "rb", closefd=False) as file:
            for line in file:
                self._requests += 1
                if (request := safe_json.parse_object(line)) is not None:
                    self._serve(request)
        self.end("the supervisor has closed the connection", connection_is_lost=True)

    def _send_reports(self) -> None:
        """Report on the ranks. A disk that does not answer delays reports, not other messages."""
        while not self._has_ended.wait(PING_SECONDS / 2):
            if (launch := self._launch) is None:
                continue
            report = launch.report()
            if self._end_reason is None or not report.has_exited:  # else the loss of the host says what has happened
                self._outbox.send({"report": as_values(report)})

    def _serve(self, request: Mapping[str, Any]) -> None:
        parameters = {name: value for name, value in request.items() if name not in ("id", "do")}
        name, number = str(request.get("do")), request.get("id")
        if (action := self._actions.get(name)) is not None:
            self._reply(number, action, parameters)
            return
        action = self._slow_actions.get(name, lambda **_: _refuse(f"the request {name!r} is unknown"))
        thread = threading.Thread(target=self._reply, args=(number, action, parameters), daemon=True)
        try:
            thread.start()  # one for each request: one that waits for a disk blocks no other
        except RuntimeError as error:  # too many threads
            self._outbox.send({"id": number, "error": one_line_reason(error)})

    def _reply(self, number: object, action: Callable[..., Any], parameters: Mapping[str, Any]) -> None:
        try:
            self._outbox.send({"id": number, "value": action(**parameters)})
        except (UserError, OSError, ValueError) as error:
            self._outbox.send({"id": number, "error": one_line_reason(error)})
        except Exception as error:  # the supervisor reports it; the agent goes on watching its ranks
            self._outbox.send({"id": number, "error": f"{type(error).__name__}: {one_line_reason(error)}"})

    def _start(self, request: Mapping[str, Any]) -> int:
        """Start ranks; return their process group.

        Raises:
            UserError: the agent is ending, or ranks of an earlier launch still run; they are killed.
            OSError: the launcher cannot be started.
        """
        with self._launching:
            if self._end_reason is not None:
                raise UserError(self._end_reason)
            if (earlier := self._launch) is not None and not earlier.ranks.have_exited:
                earlier.ranks.kill()
                raise UserError(f"process group {earlier.ranks.group} of an earlier launch still ran: it is killed")
            self._launch = _Launch(launch_request(request), self._outbox)
            return self._launch.ranks.group

    def _for_launch(self, action: Callable[[_Launch], None]) -> Callable[[], None]:
        def run() -> None:
            if self._launch is not None:
                action(self._launch)

        return run

    def _write_stacks(self, run_dir: str, directory: str) -> None:
        if self._launch is not None:
            self._launch.ranks.write_stacks(Path(run_dir), Path(directory))


class _Launch:
    """The ranks of one launch on this host."""

    def __init__(self, request: LaunchRequest, outbox: Outbox) -> None:
        """Start the ranks.

        Raises:
            OSError: the launcher cannot be started.
        """
        self._number = request.number
        self.stop_seconds = request.stop_seconds
        self._numbers = request.place.ranks
        environment = {**request.environment, **stop_request.supervisor_environment()}
        outcome = request.run_dir / SUPERVISOR_DIR / f"outcome_{request.place.node}"
        outcome.unlink(missing_ok=True)
        layout = RankLayout(request.accelerator, len(self._numbers))
        self.heartbeats = LocalHeartbeats(OpenDirectory(request.run_dir), self._numbers)  # may wait for the disk
        with forward(outbox) as output:
            self.ranks = Ranks(request.arguments, layout, outcome, environment, request.script, request.place, output)

    def heartbeat_problem(self) -> str | None:
        """Return why ranks cannot write heartbeats; None if they can. A disk that does not answer is a reason."""
        found: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=lambda: found.put(self.heartbeats.problem()), daemon=True).start()
        try:
            return found.get(timeout=_DISK_SECONDS)
        except queue.Empty:
            return f"the directory of the run has not answered for {_DISK_SECONDS:.0f} s"

    def report(self) -> NodeReport:
        ranks = self.ranks
        runs = ranks.is_launcher_running
        beats = zip(self._numbers, self.heartbeats.read(), strict=True)
        return NodeReport(
            launch=self._number,
            launcher_runs=runs,
            has_exited=ranks.have_exited,
            launcher_was_killed=ranks.launcher_was_killed,
            exit_status=None if runs else ranks.exit_status,
            exit_code=None if runs else ranks.exit_code,
            ran_out_of_memory=ranks.ran_out_of_memory,
            outcome=ranks.reported_outcome,
            failures=ranks.failures(),
            kills=ranks.kills(),
            beats={rank: beat for rank, beat in beats if beat is not None},
        )


def end_previous(agent: list[Any], stop_seconds: float) -> bool:
    """End an earlier agent on this host and the ranks that it has left; return whether there was any.

    Args:
        agent: its process id and start time.
        stop_seconds: for the ranks to save and exit, before they are killed.

    Raises:
        UserError: processes cannot be killed.
    """
    pid, start = int(agent[0]), str(agent[1])
    is_left = is_running(pid, start)
    if is_left:
        os.kill(pid, signal.SIGKILL)
    groups = rank_processes.groups_of((pid, start))
    end(groups, stop_seconds)
    return is_left or bool(groups)


def end(groups: Collection[int], seconds: float, connection_is_lost: bool = False) -> None:
    """Ask the ranks of process groups to save and exit; kill them after ``seconds``; wait until none is left.

    Args:
        connection_is_lost: see ``rank_processes.request_stop``.

    Raises:
        UserError: processes cannot be killed.
    """
    for group in groups:
        if rank_processes.members(group):
            rank_processes.request_stop(group, connection_is_lost)
    deadline = time.monotonic() + seconds
    while left := [process for group in groups for process in rank_processes.members(group)]:
        if time.monotonic() > deadline + _KILL_SECONDS:
            raise UserError(f"processes cannot be killed: {', '.join(str(process.pid) for process in left)}")
        if time.monotonic() > deadline:
            for group in groups:
                rank_processes.kill(group)
        time.sleep(_POLL_SECONDS)


def _refuse(message: str) -> None:
    raise UserError(message)


def main() -> None:
    """Serve the supervisor at the other end of standard input and output."""
    outbox = Outbox(sys.stdout.fileno())
    agent = Agent(outbox)

    def end_service(number: int, frame: FrameType | None) -> None:
        agent.end(f"its agent has received {signal_name(number)}: the host shuts down, or its job has ended")

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the supervisor decides
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # Slurm sends SIGUSR1 before the time limit
        if signal.getsignal(each) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(each, end_service)
    with contextlib.suppress(UserError):  # processes that cannot be killed
        agent.serve(sys.stdin.fileno())
    outbox.close()
    os._exit(0)  # not waiting for requests that are served, such as one that waits for a disk


if __name__ == "__main__":
    main()
