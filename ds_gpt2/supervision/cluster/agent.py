"""The agent of one host: it starts, watches, stops and kills the ranks there for a supervisor on another machine.

The supervisor starts it by ssh or srun, sends requests to its standard input and reads its standard output; see
``messages``. If the input ends, or brings nothing for a while, the supervisor is gone: the ranks are asked to save,
then ended, and the agent ends. It ends only processes that it has started.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_identity import is_running, start_of
from ds_gpt2.run_dir import stop_request
from ds_gpt2.run_dir.supervisor_record import SUPERVISOR_DIR
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.cluster import link_speed, node_checks
from ds_gpt2.supervision.cluster.channel import Inbox, Outbox, forward
from ds_gpt2.supervision.cluster.messages import (
    PING_SECONDS,
    SILENCE_SECONDS,
    LaunchRequest,
    NodeReport,
    as_values,
    launch_request,
)
from ds_gpt2.supervision.launcher import RankLayout, Ranks

_POLL_SECONDS = 0.1


class Agent:
    """Serves one supervisor."""

    def __init__(self, inbox: Inbox, outbox: Outbox) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._launch: _Launch | None = None
        self._slow = ThreadPoolExecutor(1, "requests")  # reports go on while a request is served
        self._actions: dict[str, Callable[..., Any]] = {
            "ping": time.time,
            "launch": self._start,
            "stop": self._for_launch(lambda launch: launch.ranks.request_stop()),
            "kill": self._for_launch(lambda launch: launch.ranks.kill()),
        }
        self._slow_actions: dict[str, Callable[..., Any]] = {
            "stopped": lambda: sorted(self._launch.heartbeats.stopped()) if self._launch is not None else [],
            "heartbeat_problem": lambda: self._launch.heartbeats.problem() if self._launch is not None else None,
            "stacks": self._write_stacks,
            "end_previous": end_previous,
            **node_checks.ACTIONS,
            **link_speed.ACTIONS,
        }

    def serve(self) -> None:
        """Serve requests until the supervisor is gone, then end the ranks."""
        last_heard = last_report = time.monotonic()
        self._outbox.send({"hello": {"pid": os.getpid(), "start": start_of(os.getpid())}})
        while not self._inbox.has_ended and time.monotonic() < last_heard + SILENCE_SECONDS:
            for request in self._inbox.take(_POLL_SECONDS):
                last_heard = time.monotonic()
                self._serve(request)
            if time.monotonic() > last_report + PING_SECONDS / 2:
                last_report = time.monotonic()
                self._outbox.send({"report": as_values(self._launch.report()) if self._launch is not None else None})
        node_checks.end_commands()
        if (launch := self._launch) is not None:
            ranks = launch.ranks
            end(ranks.request_stop, ranks.kill, lambda: ranks.have_exited, launch.stop_seconds)

    def _serve(self, request: Mapping[str, Any]) -> None:
        words = {name: value for name, value in request.items() if name not in ("id", "do")}
        if (action := self._actions.get(request["do"])) is not None:
            self._reply(request["id"], action, words)
        else:
            self._slow.submit(self._reply, request["id"], self._slow_actions[request["do"]], words)

    def _reply(self, number: int, action: Callable[..., Any], words: Mapping[str, Any]) -> None:
        try:
            self._outbox.send({"id": number, "value": action(**words)})
        except (UserError, OSError, ValueError) as error:
            self._outbox.send({"id": number, "error": one_line_reason(error)})
        except Exception as error:  # the supervisor reports it; the agent goes on watching its ranks
            self._outbox.send({"id": number, "error": f"{type(error).__name__}: {one_line_reason(error)}"})

    def _start(self, request: Mapping[str, Any]) -> int:
        """Start ranks; return their process group."""
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
        with forward(outbox) as output:
            self.ranks = Ranks(request.arguments, layout, outcome, environment, request.script, request.place, output)
        self.heartbeats = self.ranks.heartbeats(OpenDirectory(request.run_dir))

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


def end_previous(agent: list[Any], group: int | None, stop_seconds: float) -> bool:
    """End an earlier agent on this host and the ranks that it has left; return whether there was any.

    Args:
        agent: its process id and start time.
        group: the process group of the ranks; None if it has launched none.
        stop_seconds: for the ranks to save and exit, before they are killed.
    """
    pid, start = int(agent[0]), str(agent[1])
    is_left = is_running(pid, start)
    if is_left:
        os.kill(pid, signal.SIGKILL)
    if group is None or not rank_processes.ranks_of(group):
        return is_left
    end(
        lambda: rank_processes.request_stop(group),
        lambda: rank_processes.kill(group),
        lambda: not rank_processes.members(group),
        stop_seconds,
    )
    return True


def end(
    request_stop: Callable[[], None], kill: Callable[[], None], have_exited: Callable[[], bool], seconds: float
) -> None:
    """Ask ranks to save and exit; kill them after ``seconds``; wait until none is left."""
    request_stop()
    deadline = time.monotonic() + seconds
    while not have_exited():
        if time.monotonic() > deadline:
            kill()
        time.sleep(_POLL_SECONDS)


def main() -> None:
    """Serve the supervisor at the other end of standard input and output."""
    for number in (signal.SIGINT, signal.SIGHUP):  # of the terminal: the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    outbox = Outbox(sys.stdout.fileno())
    Agent(Inbox(sys.stdin.fileno()), outbox).serve()
    outbox.close()
    os._exit(0)  # not waiting for requests that are served, such as one that waits for a disk


if __name__ == "__main__":
    main()
