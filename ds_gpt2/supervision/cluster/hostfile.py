"""The hosts of a run: a file in the format of DeepSpeed's hostfile, or the nodes of a Slurm job."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.errors import UserError, reason_of

_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.:@\[][A-Za-z0-9_.:@%\[\]-]*)\s+slots\s*=\s*(?P<slots>[1-9][0-9]{0,3})")
_MAX_BYTES = 1 << 20
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
        with open(path, "rb") as file:
            lines = file.read(_MAX_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} cannot be read: {reason_of(error)}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if (match := _LINE.fullmatch(text)) is None:
            raise UserError(
                f"{path}, line {number}: {text!r} is not of the form `HOST slots=N`, such as `node1 slots=4`"
            )
        name = match["name"]
        if name in hosts:
            raise UserError(f"{path}, line {number}: {name} is listed twice: add its slots to its first line")
        hosts[name] = Host(name, int(match["slots"]))
    if not hosts:
        raise UserError(f"the hostfile {path} lists no host: add lines of the form `HOST slots=N`")
    return list(hosts.values())


def slurm_hosts(slots: int, environment: Mapping[str, str] = os.environ) -> list[Host]:
    """Return the nodes of the present Slurm job, in Slurm's order.

    Args:
        slots: ranks on each.

    Raises:
        UserError: this is not a Slurm job, or ``scontrol`` does not list its nodes.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError(
            "cluster.launch is srun, but SLURM_JOB_NODELIST is not set: start it in a job, with sbatch or salloc"
        )
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
