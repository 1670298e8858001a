"""The environment variables of a rank, for every supported launcher.

PyTorch reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. ``torchrun`` and DeepSpeed's launcher set them. ``srun``
and ``mpirun`` set variables of other names, which are translated here.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from ds_gpt2.common.errors import UserError

Launcher = Literal["deepspeed", "torchrun", "slurm", "mpi", "environment", "none"]

# Left over from another job, these make a rank wait for ranks that are never started.
PER_RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ADOPTED = "DS_GPT2_STARTED_BY"  # "LAUNCHER PID": set by ``adopt``, valid in that process only
_LAST_PORT = 65_535
_FIRST_PORT, _PORTS = 15_000, 15_000  # below Linux's ephemeral ports (32768 and above)


@dataclass(frozen=True)
class _Task:
    """One rank, as described by a batch system or MPI."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    job: str  # equal on all ranks of a job, different for other jobs
    first_host: str | None = None  # of rank 0; None if unknown


def launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """Return what started this process as a rank; "environment" if RANK was set by an unknown program."""
    known, _, pid = environment.get(_ADOPTED, "").partition(" ")
    if pid == str(os.getpid()):
        return known  # type: ignore[return-value]  # written by adopt
    if "RANK" in environment:
        if any(name.startswith("TORCHELASTIC_") for name in environment):
            return "torchrun"
        return "deepspeed" if "CROSS_SIZE" in environment else "environment"
    if "OMPI_COMM_WORLD_RANK" in environment:
        return "mpi"
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return "slurm"  # before PMI_RANK, which Slurm may set without the local ranks
    return "mpi" if "PMI_RANK" in environment else "none"


def is_main(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is rank 0, or a process that no launcher started."""
    return environment.get("RANK", "0") == "0"


def adopt(environment: MutableMapping[str, str] = os.environ) -> Launcher:
    """Set the variables that PyTorch and DeepSpeed read, from those of the launcher, and return the launcher.

    A second call in the same process changes nothing.

    Raises:
        UserError: the variables contradict each other, or are left over from another job.
    """
    found = launcher(environment)
    if environment.get(_ADOPTED) == f"{found} {os.getpid()}":
        return found
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if environment.get(name) == "":
            del environment[name]
    if "MASTER_PORT" in environment and _number(environment, "MASTER_PORT", 1) > _LAST_PORT:
        raise UserError(f"MASTER_PORT={environment['MASTER_PORT']}, but the highest port is {_LAST_PORT}")
    if found in ("slurm", "mpi"):
        _adopt_task(_slurm(environment) if found == "slurm" else _mpi(environment), environment)
    elif found == "none":
        _check_left_over(environment)
        environment.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
        environment["MASTER_ADDR"] = LOOPBACK[0]
    else:
        _check_complete(environment, found)
    environment[_ADOPTED] = f"{found} {os.getpid()}"
    return found


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without the variables of a rank, for a process that will launch ranks."""
    return {
        name: value
        for name, value in environment.items()
        if name not in PER_RANK and not name.startswith("TORCHELASTIC_")
    }


def _check_left_over(environment: Mapping[str, str]) -> None:
    """Check an environment without RANK.

    Raises:
        UserError: WORLD_SIZE is set.
    """
    if environment.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set but RANK is not, perhaps left over from a batch system:"
            f" {_FIX}"
        )


_FIX = "`unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT`, or start the ranks with deepspeed or torchrun"


def _check_complete(environment: MutableMapping[str, str], found: Launcher) -> None:
    """Check an environment with RANK, and add what is missing.

    Raises:
        UserError: a required variable is missing or invalid.
    """
    size = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0)
    if rank >= size:
        raise UserError(f"RANK={rank} but WORLD_SIZE={size}, perhaps left over from a batch system: {_FIX}")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise UserError(
                    f"RANK and WORLD_SIZE={size} are set but {name} is not, perhaps left over from a batch system:"
                    f" {_FIX}"
                )
    environment.setdefault("MASTER_ADDR", LOOPBACK[0])
    local_size = environment.get("LOCAL_SIZE" if found == "deepspeed" else "LOCAL_WORLD_SIZE")
    on_this_machine = environment["MASTER_ADDR"] in LOOPBACK
    environment.setdefault("LOCAL_RANK", str(rank) if on_this_machine else "0")
    environment["LOCAL_WORLD_SIZE"] = local_size or (str(size) if on_this_machine else "1")
    _number(environment, "LOCAL_RANK", 0)
    _number(environment, "LOCAL_WORLD_SIZE", 1)


def _adopt_task(task: _Task, environment: MutableMapping[str, str]) -> None:
    if environment.get("WORLD_SIZE", str(task.size)) != str(task.size):
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set, but the batch system started {task.size} tasks: unset"
            " WORLD_SIZE"
        )
    environment.update(
        RANK=str(task.rank),
        WORLD_SIZE=str(task.size),
        LOCAL_RANK=str(task.local_rank),
        LOCAL_WORLD_SIZE=str(task.local_size),
    )
    if task.local_size == task.size:
        environment.setdefault("MASTER_ADDR", LOOPBACK[0])
    elif task.first_host is not None:
        environment.setdefault("MASTER_ADDR", task.first_host)
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UserError("ranks on several machines: set MASTER_ADDR to the host of rank 0, and MASTER_PORT")
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + zlib.crc32(task.job.encode()) % _PORTS))


def _slurm(environment: Mapping[str, str]) -> _Task:
    """Read Slurm's variables: https://slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES"."""
    size = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    node = _number(environment, "SLURM_NODEID", 0, default=0)
    per_node = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    job = "-".join(environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    return _Task(
        rank=_number(environment, "SLURM_PROCID", 0),
        size=size,
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        local_size=per_node[node] if node < len(per_node) else 1,
        job=f"slurm {job}",
        first_host=_first_host(hosts) if hosts else None,
    )


def _mpi(environment: Mapping[str, str]) -> _Task:
    """Read Open MPI's variables, or else those of MPICH's and Intel MPI's process manager."""
    if "OMPI_COMM_WORLD_RANK" in environment:
        rank, size, local_rank, local_size = (
            f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
    else:
        rank, size, local_rank, local_size = "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
    return _Task(
        rank=_number(environment, rank, 0),
        size=_number(environment, size, 1),
        local_rank=_number(environment, local_rank, 0, default=_number(environment, rank, 0)),
        local_size=_number(environment, local_size, 1, default=_number(environment, size, 1)),
        job=f"mpi {job}",
    )


def _number(environment: Mapping[str, str], name: str, least: int, default: int | None = None) -> int:
    """Return an environment variable as an integer.

    Raises:
        UserError: it is not set and has no default, or is not a whole number of at least ``least``.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name} is not set, although this process was started as one of several ranks: {_FIX}")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
        raise UserError(f"{name}={text[:50]} is not a whole number of at least {least}: {_FIX}")
    return int(text)


def _tasks_per_node(text: str) -> list[int]:
    """Parse ``"4(x2),3"`` to ``[4, 4, 3]``."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text, re.ASCII):
        counts += [int(count)] * int(times or 1)
    return counts


def _first_host(hosts: str) -> str:
    """Return the first host of a Slurm list: of ``"gpu[03-05,9],login"`` it is ``"gpu03"``."""
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", hosts)  # each bracket replaced by its first entry
    return first.partition(",")[0]
