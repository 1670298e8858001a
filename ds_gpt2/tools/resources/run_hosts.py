"""The hosts of a run on several machines, from its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ds_gpt2.common.formatting import counted
from ds_gpt2.run_dir.journal import Event


@dataclass(frozen=True)
class RunHost:
    """One machine of a run."""

    name: str  # as in the hostfile
    ranks: int  # in the newest launch; 0 if it is away, or if the ranks do not divide the batch on all hosts
    away_since: float | None = None  # seconds since 1970; None if it answers
    away_reason: str | None = None


def hosts_of(events: Sequence[Event]) -> list[RunHost]:
    """Return the hosts of the newest launch, and those that were lost since the user has started the run.

    Args:
        events: of the journal, the oldest first.

    Returns:
        Those that are away last; an empty list for a run on one machine.
    """
    hosts: dict[str, RunHost] = {}
    for event in events:
        name = event.facts.get("host")
        if event.kind == "launch":
            away = [host for host in hosts.values() if host.away_since is not None] if _is_restart(event) else []
            launched = {host: RunHost(host, ranks) for host, ranks in _counts(event.facts.get("hosts")).items()}
            still_away = {host.name: host for host in away if host.name not in launched}
            hosts = {**launched, **still_away} if launched else {}
        elif event.kind == "host_lost" and isinstance(name, str):
            since = hosts[name].away_since if name in hosts else None
            hosts[name] = RunHost(name, 0, since or event.time, str(event.facts.get("reason", event.text)))
        elif event.kind == "host_back" and isinstance(name, str) and name in hosts:
            hosts[name] = replace(hosts[name], away_since=None, away_reason=None)
        elif event.kind == "few_hosts":
            for host, reason in _texts(event.facts.get("away")).items():
                since = hosts[host].away_since if host in hosts else None
                hosts[host] = RunHost(host, 0, since or event.time, reason)
    return sorted(hosts.values(), key=lambda host: host.away_since is not None)


def names_of(hosts: Sequence[RunHost]) -> str:
    """Return the hosts that have ranks as text: ``4 ranks on 2 hosts: node1 (2), node2 (2)``."""
    used = [host for host in hosts if host.ranks]
    names = ", ".join(f"{host.name} ({host.ranks})" for host in used)
    return f"{counted(sum(host.ranks for host in used), 'rank')} on {counted(len(used), 'host')}: {names}"


def _is_restart(event: Event) -> bool:
    return event.facts.get("restart") is True


def _counts(fact: object) -> Mapping[str, int]:
    """Return the values of a fact that are counts, by name: the journal may be damaged."""
    values = fact if isinstance(fact, dict) else {}
    return {name: count for name, count in values.items() if isinstance(count, int) and not isinstance(count, bool)}


def _texts(fact: object) -> Mapping[str, str]:
    values = fact if isinstance(fact, dict) else {}
    return {name: text for name, text in values.items() if isinstance(text, str)}
