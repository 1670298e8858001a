"""Why hosts are away: each reason of each host is reported once."""

from __future__ import annotations

import re
from collections.abc import Mapping


def without_numbers(reason: str) -> str:
    """Return a reason without its numbers, such as seconds of silence, to compare it with others."""
    return re.sub(r"\d+", "", reason)


class AwayReasons:
    """The reasons that were reported, of the hosts that are away."""

    def __init__(self) -> None:
        self._reported: dict[str, set[str]] = {}

    def new(self, known: Mapping[str, str], default: Mapping[str, str]) -> dict[str, str]:
        """Return the hosts that are away since the last call, or for a new reason, and why.

        Args:
            known: host -> why it is away, where that is known.
            default: the same for all hosts that are away, for those of which no reason was reported.
        """
        self._reported = {host: self._reported.get(host, set()) for host in default}
        reasons = {
            host: known.get(host, default[host]) for host in default if host in known or not self._reported[host]
        }
        new = {host: why for host, why in reasons.items() if without_numbers(why) not in self._reported[host]}
        for host, why in new.items():
            self._reported[host].add(without_numbers(why))
        return new
