"""The hosts of a run of the drill: which ranks are on this machine, and how those of another host are killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir.supervisor_record import AgentRecord, read_supervisor_record
from ds_gpt2.supervision.cluster import link
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AgentLink, LostHostError, StartMethod
from ds_gpt2.supervision.cluster.this_machine import is_this_machine

_KILL_SECONDS = 60.0
_AWAY = "away_host"  # file in the drill's directory: the name of a host that the supervisor cannot connect to


@dataclass(frozen=True)
class RunHosts:
    """The hosts of the runs of one drill; none if they use only this machine."""

    hosts: Sequence[Host]
    launch: StartMethod
    folder: Path  # of the drill

    @property
    def others(self) -> list[Host]:
        """The hosts that are not this machine."""
        return [host for host in self.hosts if not is_this_machine(host.name)]

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this machine: the hosts are filled in their order."""
        names = [host.name for host in self.hosts for _ in range(host.slots)]
        return [rank for rank, name in enumerate(names) if is_this_machine(name)]

    def local_group(self, run_dir: Path) -> int | None:
        """Return the process group of the ranks of a run on this machine; None if it is not known."""
        return next((agent.group for agent in _agents(run_dir) if is_this_machine(agent.host)), None)

    @contextlib.contextmanager
    def unreachable(self, host: Host) -> Iterator[None]:
        """Make a host unreachable for the supervisor, as if it were switched off, until the end of the context."""
        path = self.folder / _AWAY
        path.write_text(host.name, encoding="utf-8")
        try:
            yield
        finally:
            path.unlink()

    @contextlib.contextmanager
    def connected(self, hosts: Sequence[Host]) -> Iterator[dict[str, AgentLink]]:
        """Connect to ``hosts``, besides the connections of the run; yield the connections by name.

        Raises:
            LostHostError: a host does not answer.
            UserError: ssh or srun cannot be started.
        """
        links: dict[str, AgentLink] = {}
        try:
            for host in hosts:
                links[host.name] = AgentLink(host.name, self.launch)
            for each in links.values():
                each.wait_for_start()
            yield links
        finally:
            for each in links.values():
                each.close()
            for each in links.values():
                if not each.wait(10):
                    each.kill()

    def kill_on(self, connection: AgentLink, run_dir: Path) -> bool:
        """Kill the agent of a run, and its ranks, on a connected host; return whether there were any.

        Raises:
            LostHostError, UserError: the host does not answer.
        """
        found = False
        for agent in _agents(run_dir):
            if agent.host == connection.host:
                words = {"agent": [agent.pid, agent.start], "stop_seconds": 0}
                found |= bool(connection.call("end_previous", _KILL_SECONDS, **words))
        return found

    def end_all(self, run_dirs: Sequence[Path]) -> list[str]:
        """Kill what runs have left on other hosts; return the names of hosts that had something left, and why."""
        left = []
        for host in self.others:
            try:
                with self.connected([host]) as links:
                    found = [self.kill_on(links[host.name], run_dir) for run_dir in run_dirs]
                    if any(found):
                        left.append(f"on {host.name}")
            except (LostHostError, UserError) as error:
                left.append(f"unknown on {host.name} ({error})")
        return left


def _agents(run_dir: Path) -> Sequence[AgentRecord]:
    record = read_supervisor_record(run_dir)
    return () if record is None else record.agents


def make_unreachable(folder: Path) -> None:
    """Let this process, the supervisor, not connect to hosts that are ``unreachable``.

    Args:
        folder: of the drill.
    """
    start_command = link.start_command

    def command(host: str, method: StartMethod) -> list[str]:
        with contextlib.suppress(OSError):
            if host == (folder / _AWAY).read_text(encoding="utf-8"):
                return ["false"]
        return start_command(host, method)

    link.start_command = command  # fault injection
