"""A child process that sends one message to one apprise address.

The address comes on stdin, because other users can see a process's arguments. Nothing that apprise logs is passed on,
because its log shows addresses; the caller gets an exit code and one of the short texts below.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from typing import Any

SENT, FAILED, UNKNOWN = 0, 1, 3  # exit codes; UNKNOWN: apprise does not support the address


def main() -> int:
    """Send ``title`` and ``body`` of the request on stdin, or print the kind of service if there is no title.

    Returns:
        The exit code. After a failure stdout has the reason.
    """
    request = json.load(sys.stdin)
    signal.alarm(request["seconds"])  # in case the parent has died and cannot end this process
    logged = _capture_log()
    import apprise

    services = apprise.Apprise()
    if not services.add(request["url"]):
        return UNKNOWN
    if "title" not in request:
        print(", ".join(str(service.service_name) for service in services))
        return SENT
    plain = apprise.NotifyFormat.TEXT
    if services.notify(request["body"], request["title"], request["type"], body_format=plain):
        return SENT
    print(_reason(logged))
    return FAILED


def _capture_log() -> list[str]:
    """Return a list that receives what apprise logs, instead of any other output."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]  # its only task
    log = logging.getLogger("apprise")
    log.handlers, log.propagate = [handler], False
    return logged


def _reason(logged: list[str]) -> str:
    text = " ".join(logged)
    if status := re.search(r"error=(\d{3})\b", text):
        return f"the service answered {status[1]}"
    if "connection error" in text.lower():
        return "no connection"
    return "not accepted"


def _no_traceback(*error: Any) -> None:
    """Print nothing: a traceback could contain the address."""


if __name__ == "__main__":
    del sys.path[0]  # this directory has modules with names that apprise's own imports would find
    sys.excepthook = _no_traceback
    sys.exit(main())
