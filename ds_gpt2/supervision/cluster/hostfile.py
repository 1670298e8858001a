"""The hosts of a run: a file in the format of DeepSpeed's hostfile, or the nodes of a Slurm job."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import regular_only
from ds_gpt2.common.formatting import truncated

_LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\S+)")
_NAME = re.compile(r"([A-Za-z0-9_.][A-Za-z0-9_.@-]*@)?[A-Za-z0-9_.:][A-Za-z0-9_.:%-]*")  # HOST or USER@HOST
_MAX_NAME = 253  # characters
_MAX_SLOTS = 9999
_MAX_BYTES = 1 << 20
_MAX_SHOWN = 80  # characters of a line, in messages
_SCONTROL_SECONDS = 30


@dataclass(frozen=True)
class Host:
    """A machine, and how many ranks it runs."""

    name: str  # as ssh or srun takes it
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read lines of the form ``HOST slots=N``; empty lines and comments (``#``) are ignored.

    Raises:
        UserError: the file cannot be read, a line is invalid, a host is listed twice, or there is no host.
    """
    try:
        with open(path, "rb", opener=regular_only) as file:
            content = file.read(_MAX_BYTES + 1)
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the hostfile {path} cannot be read: {reason_of(error)}; give another with --hostfile, or"
            " cluster.hostfile=null for this machine only"
        ) from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"the hostfile {path} is larger than {_MAX_BYTES >> 20} MiB")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        try:
            host = _host(text)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if host.name in hosts:
            raise UserError(f"{path}, line {number}: {host.name} is listed twice: add its slots to its first line")
        hosts[host.name] = host
    if not hosts:
        raise UserError(f"the hostfile {path} lists no host: add lines of the form `HOST slots=N`")
    return list(hosts.values())


def _host(text: str) -> Host:
    """Return the host of a line without its comment.

    Raises:
        UserError: the line is invalid.
    """
    if (match := _LINE.fullmatch(text)) is None:
        raise UserError(f"{_shown(text)} is not of the form `HOST slots=N`, such as `node1 slots=4`")
    name, slots = match["name"], match["slots"]
    if not _is_possible(name):
        raise UserError(f"{_shown(name)} is not a name or an address that ssh can use")
    if re.fullmatch("[1-9][0-9]{0,3}", slots) is None:
        raise UserError(f"{_shown(f'slots={slots}')}: the slots must be a whole number from 1 to {_MAX_SLOTS}")
    return Host(name, int(slots))


def _is_possible(name: str) -> bool:
    """Return whether ssh and the resolver accept the form of a name."""
    host = name.rpartition("@")[2]
    try:
        host.encode("idna")  # as the resolver does: a part may be too long or empty
    except UnicodeError:
        return False
    return _NAME.fullmatch(name) is not None and len(host) <= _MAX_NAME


def _shown(text: str) -> str:
    return truncated(repr(text), _MAX_SHOWN)


def slurm_nodes(environment: Mapping[str, str] = os.environ) -> str:
    """Return the nodes of the present Slurm job, in Slurm's notation.

    Raises:
        UserError: this is not a Slurm job.
    """
    if nodes := environment.get("SLURM_JOB_NODELIST"):
        return nodes
    raise UserError(
        "cluster.launch is srun, but SLURM_JOB_NODELIST is not set: start it in a job, with sbatch or salloc, or set"
        " cluster.launch=ssh"
    )


def slurm_hosts(slots: int, environment: Mapping[str, str] = os.environ) -> list[Host]:
    """Return the nodes of the present Slurm job, in Slurm's order.

    Args:
        slots: ranks on each.

    Raises:
        UserError: this is not a Slurm job, or ``scontrol`` does not list its nodes.
    """
    nodes = slurm_nodes(environment)
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            timeout=_SCONTROL_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"`scontrol show hostnames {nodes}` failed: {reason_of(error)}") from None
    return [Host(name, slots) for name in done.stdout.split()]
