"""What to do about an error of ssh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_CHANGED_KEY = re.compile(r"^Host key for (\S+) has changed", re.MULTILINE)
_REMOVE_KEY = re.compile(r"^ssh-keygen .+$", re.MULTILINE)  # some versions say how
_UNREACHABLE = re.compile("connect to host|resolve hostname|Connection (timed out|refused|reset|closed)")


def advice_on(host: str, lines: Sequence[str]) -> str:
    """Return why ssh could not connect to ``host``, and how to fix it, as one line.

    Args:
        lines: the last lines that ssh has written to standard error, stripped.
    """
    text = "\n".join(lines)
    if (changed := _CHANGED_KEY.search(text)) is not None:
        printed = _REMOVE_KEY.search(text)
        remove = printed[0] if printed is not None else f"ssh-keygen -R {shlex.quote(changed[1])}"
        return (
            f"ssh: its host key has changed: if that is expected, remove the old one with `{remove}`, then accept the"
            f" new one with `ssh {host}` once by hand"
        )
    if "Host key verification failed" in text:
        return f"ssh: its host key is not known: accept it with `ssh {host}` once by hand"
    last = next((line for line in reversed(lines) if line), "it cannot connect").removeprefix("ssh: ").rstrip(".")
    if _UNREACHABLE.search(last):
        return f"ssh: {last}: check its name, whether it runs an ssh server, and the network and firewall"
    return f"ssh: {last}: `ssh {host} true` must work without a password"
