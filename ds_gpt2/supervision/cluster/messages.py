"""What the supervisor and the agents of its hosts send to each other: one JSON object per line.

The supervisor sends requests: ``{"id": 3, "do": "stop", ...}``. An agent sends for each request a reply, ``{"id": 3,
"value": ...}`` or ``{"id": 3, "error": "..."}``; without being asked, ``{"report": {...}}`` about its ranks and
``{"output": "...", "stream": 1}``, what they print, and ``{"end": "..."}``, why the agent ends. Both sides have the
same version of the code, which is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.run_dir.heartbeat import Beat
from ds_gpt2.supervision.launcher import Place

PING_SECONDS = 1.0  # between two signs of life, of the supervisor and of an agent
SILENCE_SECONDS = 10.0  # without one: the connection is lost
NOT_HEARD = "it has not heard of the supervisor"  # begins the reason of an agent that ends because of that


@dataclass(frozen=True)
class LaunchRequest:
    """The ranks that an agent starts."""

    number: int  # of the launch: reports name it
    script: Path
    arguments: tuple[str, ...]
    accelerator: str  # cuda or cpu
    place: Place
    environment: Mapping[str, str]  # added to the agent's own
    run_dir: Path
    stop_seconds: float  # for the ranks to save after the supervisor is gone


@dataclass(frozen=True)
class NodeReport:
    """The state of one launch on one host."""

    launch: int  # its number
    launcher_runs: bool
    has_exited: bool  # no process is left
    launcher_was_killed: bool
    exit_status: str | None  # of the launcher, as text; None while it runs
    exit_code: int | None
    ran_out_of_memory: bool
    outcome: Outcome | None
    failures: Mapping[int, str]  # rank -> its error
    kills: Mapping[int, str]  # rank -> the signal that killed it
    beats: Mapping[int, Beat]  # rank -> its newest heartbeat


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as a line."""
    return json.dumps(message).encode() + b"\n"


def as_values(content: LaunchRequest | NodeReport) -> Any:
    """Return ``content`` as JSON values."""
    adapter: TypeAdapter[Any] = _LAUNCH if isinstance(content, LaunchRequest) else _REPORT
    return adapter.dump_python(content, mode="json")


def launch_request(values: object) -> LaunchRequest:
    """Return the request of JSON values.

    Raises:
        ValueError: the values are not those of a request.
    """
    return _LAUNCH.validate_python(values)


def node_report(values: object) -> NodeReport:
    """Return the report of JSON values.

    Raises:
        ValueError: the values are not those of a report.
    """
    return _REPORT.validate_python(values)


_LAUNCH = TypeAdapter(LaunchRequest)
_REPORT = TypeAdapter(NodeReport)
