"""The child process that takes one message to one of apprise's addresses.

The address comes by stdin: others may see a process's arguments. What apprise writes into its log names addresses, so
none of it goes on; what goes on are the few words below.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from typing import Any

TAKEN, REFUSED, UNKNOWN = 0, 1, 3


def main() -> int:
    """Tell ``title`` and ``body``, or without them print what kind of service it is; the exit code tells the rest."""
    request = json.load(sys.stdin)
    signal.alarm(request["seconds"])  # in case nobody is left to end this process
    heard = _listen_to_apprise()
    import apprise

    services = apprise.Apprise()
    if not services.add(request["url"]):
        return UNKNOWN
    if "title" not in request:
        print(", ".join(str(service.service_name) for service in services))
        return TAKEN
    plain = apprise.NotifyFormat.TEXT
    if services.notify(request["body"], request["title"], request["type"], body_format=plain):
        return TAKEN
    print(_reason(heard))
    return REFUSED


def _listen_to_apprise() -> list[str]:
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]  # all it has to do
    log = logging.getLogger("apprise")
    log.handlers, log.propagate = [listener], False
    return heard


def _reason(heard: list[str]) -> str:
    if answered := re.search(r"error=(\d{3})\b", " ".join(heard)):
        return f"the service answered {answered[1]}"
    if "connection error" in " ".join(heard).lower():
        return "no connection"
    return "not taken"


def _silent(*error: Any) -> None:
    """A traceback might quote the address."""


if __name__ == "__main__":
    del sys.path[0]  # this folder: apprise's own imports must not find their names here
    sys.excepthook = _silent
    sys.exit(main())
