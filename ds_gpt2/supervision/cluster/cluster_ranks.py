"""One launch of the ranks on several hosts: what ``launcher.Ranks`` is for one machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.run_dir.exit_codes import CRASHED, DONE
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.heartbeat import Beat
from ds_gpt2.supervision.cluster.host_checks import on_all
from ds_gpt2.supervision.cluster.link import AgentLink, LostHostError
from ds_gpt2.supervision.cluster.messages import LaunchRequest, NodeReport, as_values

_LAUNCH_SECONDS, _STACKS_SECONDS, _ANSWER_SECONDS = 30.0, 30.0, 10.0
_STUCK_SECONDS = 10.0  # without a new heartbeat after a part of the ranks is gone
_KILL_SECONDS = 60.0  # for ranks to be gone after they were killed
_POLL_SECONDS = 0.1

# In the errors of collectives: gloo names its source file, NCCL its error codes.
_LOST_CONNECTION = ("gloo/transport/", "ncclRemoteError", "ncclSystemError")


@dataclass
class _Part:
    """The ranks of one host."""

    host: str
    link: AgentLink
    request: LaunchRequest
    lost: str | None = None  # why the host does not respond any more
    refusal: str | None = None  # why its agent, which responds, could not start the ranks
    group: int | None = None  # process group of the launcher and the ranks; None if they were not started

    @property
    def report(self) -> NodeReport | None:
        """The host's newest report about this launch; None before the first."""
        report = self.link.report
        return report if report is not None and report.launch == self.request.number else None

    @property
    def problem(self) -> str | None:
        """Why there are no ranks that the supervisor can watch; None if there may be some."""
        return self.lost or self.refusal

    @property
    def has_exited(self) -> bool:
        return self.problem is not None or (self.report is not None and self.report.has_exited)

    @property
    def should_end_others(self) -> bool:
        """Whether these ranks were stopped or are gone, so that all others should end, too."""
        report = self.report
        if self.problem is not None:
            return True
        return report is not None and not report.launcher_runs and report.exit_code != DONE

    @property
    def has_failed(self) -> bool:
        """Whether these ranks are gone by an error, a signal or the loss of their host: others may wait for them.

        After a stop request the launcher's exit code is not 0 either, while rank 0 may still save.
        """
        if self.problem is not None or not self.should_end_others or self.report is None:
            return self.problem is not None
        return bool(self.report.failures or self.report.kills) or self.report.launcher_was_killed


class ClusterRanks:
    """The ranks of one launch on several hosts."""

    def __init__(self, parts: Sequence[tuple[AgentLink, LaunchRequest]], clock: Callable[[], float] = time.monotonic):
        """Start the ranks on all hosts; wait up to 30 s for the answers of their agents.

        A host whose agent does not answer is in ``lost_hosts``, one whose agent cannot start the ranks in ``refusals``.
        """
        self._parts = [_Part(link.host, link, request) for link, request in parts]
        self._clock = clock
        self._failures: dict[int, str] = {}  # in the order of their arrival
        self._beats: dict[int, Beat] = {}
        self._kill_time: float | None = None  # of the first request to kill the ranks
        self.count = sum(self._parts[0].request.place.slots)
        on_all(self._start, self._parts)
        self._beat_time = clock()  # of the newest heartbeat, or of the start

    @property
    def group(self) -> int | None:
        """Agents own the process groups."""
        return None

    @property
    def groups(self) -> dict[str, int]:
        """The process groups of the ranks, by host."""
        return {part.host: part.group for part in self._parts if part.group is not None}

    @property
    def lost_hosts(self) -> dict[str, str]:
        """The hosts that have stopped responding during this launch, and why."""
        self._update()
        return {part.host: part.lost for part in self._parts if part.lost is not None}

    @property
    def refusals(self) -> list[str]:
        """Why agents that respond could not start the ranks; each text names the host."""
        return [part.refusal for part in self._parts if part.refusal is not None]

    @property
    def is_launcher_running(self) -> bool:
        """Whether the ranks run on all hosts, or have ended as they should on some."""
        self._update()
        return not any(part.should_end_others for part in self._parts) and not self.have_exited

    @property
    def have_exited(self) -> bool:
        """Whether no process of this launch is left on any host that answers."""
        self._update()
        return all(part.has_exited for part in self._parts)

    @property
    def launcher_was_killed(self) -> bool:
        return any(report.launcher_was_killed for report in self._reports())

    @property
    def are_stuck(self) -> bool:
        """Whether a part of the ranks is gone and the others make no progress: they wait for it."""
        self._update()
        return any(part.has_failed for part in self._parts) and self._clock() - self._beat_time > _STUCK_SECONDS

    @property
    def exit_status(self) -> str:
        """Why the ranks of the first failed host have exited, as text."""
        failed = [part for part in self._parts if part.has_failed]
        failed = failed or [part for part in self._parts if part.should_end_others]
        first = next(iter(self.failures()), None)  # the rank
        failed.sort(key=lambda part: first not in part.request.place.ranks)
        part = failed[0] if failed else self._parts[0]
        status = part.lost or (part.report.exit_status if part.report is not None else None)
        return f"host {part.host}: {status}"

    @property
    def ran_out_of_memory(self) -> bool:
        return any(report.ran_out_of_memory for report in self._reports())

    def outcome(self) -> Outcome:
        """Return what rank 0 reported about the end of the run; a crash if it reported nothing."""
        return next((report.outcome for report in self._reports() if report.outcome is not None), Outcome(CRASHED))

    def failures(self) -> dict[int, str]:
        """Return the error of each rank that reported one, the first to fail first.

        The reports of another host may arrive earlier than those of the host where the first rank failed. So lost
        connections between ranks, which follow from a failure, come last.
        """
        self._update()
        return dict(sorted(self._failures.items(), key=lambda failure: _is_lost_connection(failure[1])))

    def kills(self) -> dict[int, str]:
        """Return the name of the signal that killed each rank that was killed before its launcher ended the others."""
        return {rank: name for report in self._reports() for rank, name in report.kills.items()}

    def request_stop(self) -> None:
        for part in self._parts:
            part.link.request("stop")

    def kill(self) -> None:
        """Kill the ranks. A host where some have not exited a minute after the first call counts as lost."""
        if self._kill_time is None:
            self._kill_time = self._clock()
        for part in self._parts:
            part.link.request("kill")

    def end(self) -> None:
        """Kill the ranks; wait until none is left on any host that responds."""
        while not self.have_exited:
            self.kill()
            time.sleep(_POLL_SECONDS)

    def write_stacks(self, run_dir: Path, directory: Path) -> None:
        """Let each host write what its ranks are executing to ``directory``.

        Raises:
            OSError: hosts do not; the message names them. The stacks of the others are written.
        """

        def write(part: _Part) -> str | None:
            try:
                part.link.call("stacks", _STACKS_SECONDS, run_dir=str(run_dir), directory=str(directory))
            except LostHostError as error:
                return f"host {part.host}: {error}"
            except UserError as error:  # names the host
                return str(error)
            return None

        if problems := [problem for problem in on_all(write, self._parts) if problem is not None]:
            raise OSError("; ".join(problems))

    def heartbeats(self, run_dir: OpenDirectory) -> ClusterRanks:
        """Return the heartbeats of the ranks: the agents read them."""
        return self

    def read(self) -> list[Beat | None]:
        """Return the newest heartbeat of each rank; None for a rank without one since the launch."""
        self._update()
        return [self._beats.get(rank) for rank in range(self.count)]

    def stopped(self) -> set[int]:
        """Return the ranks whose process is stopped (SIGSTOP)."""
        return {rank for ranks in self._answers("stopped") for rank in ranks}

    def problem(self) -> str | None:
        """Return why ranks cannot write heartbeats; None if they can."""
        return next((problem for problem in self._answers("heartbeat_problem") if problem is not None), None)

    def _answers(self, what: str) -> list[Any]:
        """Return the answers of the hosts to a request, without those that do not answer within ten seconds."""
        found: list[Any] = []

        def ask(part: _Part) -> None:
            with contextlib.suppress(LostHostError, UserError):
                found.append(part.link.call(what, _ANSWER_SECONDS))

        on_all(ask, self._parts)
        return found

    def _start(self, part: _Part) -> None:
        try:
            part.group = part.link.call("launch", _LAUNCH_SECONDS, request=as_values(part.request))
        except LostHostError as error:
            _lose(part, str(error))
        except UserError as error:
            part.refusal = one_line_reason(error)

    def _update(self) -> None:
        """Note which hosts are lost, and what the others have reported."""
        kill_is_overdue = self._kill_time is not None and self._clock() > self._kill_time + _KILL_SECONDS
        for part in self._parts:
            if part.has_exited:
                continue
            if (problem := part.link.problem) is not None:
                _lose(part, problem)
            elif kill_is_overdue:
                _lose(part, f"its processes have not exited {_KILL_SECONDS:.0f} s after they were killed")
        for report in self._reports():
            for rank, failure in report.failures.items():
                self._failures.setdefault(rank, failure)
            for rank, beat in report.beats.items():
                if beat != self._beats.get(rank):
                    self._beats[rank], self._beat_time = beat, self._clock()

    def _reports(self) -> list[NodeReport]:
        return [part.report for part in self._parts if part.report is not None]


def _lose(part: _Part, reason: str) -> None:
    """Note that a host is lost, and end the connection: it must not come back in the middle of the next launch."""
    part.lost = reason
    part.link.kill()


def _is_lost_connection(failure: str) -> bool:
    """Return whether the error of a rank is that its connection to another rank was lost."""
    return any(words in failure for words in _LOST_CONNECTION)
