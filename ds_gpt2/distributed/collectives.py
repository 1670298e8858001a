"""The few collective operations the project needs, over whatever process group DeepSpeed opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
import torch.distributed as torch_dist

from ds_gpt2.common.errors import UserError
from ds_gpt2.distributed import launch_environment

T = TypeVar("T")

_PULSE_SECONDS = 1.0

_cpu_group: torch_dist.ProcessGroup | None = None


def rank() -> int:
    """This process's rank: the launcher's word for it, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this machine; see ``launch_environment.adopt``."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """True on the rank that speaks and writes for all."""
    return launch_environment.is_main()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` (any shape and dtype the backend reduces) over all ranks, in place; returns it."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.all_reduce(values)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The largest of ``values`` (any shape and dtype the backend reduces) over all ranks, in place; returns it."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.all_reduce(values, torch_dist.ReduceOp.MAX)
    return values


def gather_objects(value: T) -> list[T]:
    """Every rank's ``value``, in rank order, on every rank."""
    if not torch_dist.is_initialized() or world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    torch_dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]  # all_gather_object has filled every place


def raise_on_all_ranks(problem: str | None) -> None:
    """
    Raises:
        UserError: on every rank, with the first problem of any rank.
    """
    if found := [one for one in gather_objects(problem) if one is not None]:
        raise UserError(found[0])


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item())


def open_cpu_group() -> None:
    """Make the group of ``any_rank_on_cpu``; every rank calls this once, after the process group is open."""
    global _cpu_group
    _cpu_group = torch_dist.new_group(backend="gloo") if world_size() > 1 else None


def any_rank_on_cpu(flag: bool) -> bool:
    """As ``any_rank``, without waiting for the device."""
    flags = torch.tensor(float(flag))
    if _cpu_group is not None:
        torch_dist.all_reduce(flags, group=_cpu_group)
    return bool(flags.item())


def broadcast_from_main(action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank; so is a user's mistake that it finds there."""
    return gather_objects(call_on_all_ranks(lambda: action() if is_main() else None))[0]  # type: ignore[return-value]  # rank 0 has called action


def broadcast_slow_from_main(action: Callable[[], T]) -> T:
    """As ``from_main``, for what may take longer than a collective may be waited for, such as a download."""

    def on_main() -> T:
        with ThreadPoolExecutor(1) as thread:
            job = thread.submit(action)
            while any_rank_on_cpu(not job.done()):
                wait([job], timeout=_PULSE_SECONDS)
        return job.result()

    if is_main():
        return broadcast_from_main(on_main)
    while any_rank_on_cpu(False):
        pass
    return broadcast_from_main(action)


def barrier() -> None:
    """Wait until every rank is here."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.barrier()


def call_on_all_ranks(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; if it is a user's mistake on any of them, raise it on all of them.

    Without this a rank that fails alone leaves the others waiting for it in their next collective.
    """
    result, complaint = None, None
    try:
        result = action()
    except UserError as error:
        complaint = str(error)
    raise_on_all_ranks(complaint)
    return result  # type: ignore[return-value]  # no complaint anywhere: action returned a T
