"""Collective operations over the process group that DeepSpeed has initialized; no-ops on a single rank."""

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

_POLL_SECONDS = 1.0  # below the timeout of every backend

_cpu_group: torch_dist.ProcessGroup | None = None


def rank() -> int:
    """Return the rank of this process, as set by the launcher. Needs no process group."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process among those of its machine. Needs no process group."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks. Needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this machine; see ``launch_environment.adopt``."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def spans_machines() -> bool:
    """Return whether the ranks are on several machines. Needs no process group."""
    return world_size() > local_world_size()


def is_first_of_machine() -> bool:
    """Return whether this is the first rank of its machine. Needs no process group."""
    return local_rank() == 0


def is_main() -> bool:
    """Return whether this is rank 0, which logs and writes files for all ranks."""
    return launch_environment.is_main()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum ``values`` (any shape and dtype the backend reduces) over all ranks, in place, and return it."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.all_reduce(values)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Take the element-wise maximum of ``values`` over all ranks, in place, and return it.

    Args:
        values: of any shape and dtype that the backend reduces.
    """
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.all_reduce(values, torch_dist.ReduceOp.MAX)
    return values


def gather_objects(value: T) -> list[T]:
    """Return the ``value`` of every rank, in rank order, on every rank. ``value`` must be picklable."""
    if not torch_dist.is_initialized() or world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    torch_dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]  # all_gather_object has filled the list


def raise_on_all_ranks(problem: str | None) -> None:
    """Raise on every rank if any rank has a problem; None means no problem.

    Raises:
        UserError: with the problem of the lowest rank that has one.
    """
    if problems := [each for each in gather_objects(problem) if each is not None]:
        raise UserError(problems[0])


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is set on any rank. Reduces on ``device`` and waits for it."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item())


def open_cpu_group() -> None:
    """Create the gloo group of ``any_rank_on_cpu``. Every rank calls this once, after the process group exists."""
    global _cpu_group
    _cpu_group = torch_dist.new_group(backend="gloo") if world_size() > 1 else None


def any_rank_on_cpu(flag: bool) -> bool:
    """Return whether ``flag`` is set on any rank, without waiting for the device."""
    flags = torch.tensor(float(flag))
    if _cpu_group is not None:
        torch_dist.all_reduce(flags, group=_cpu_group)
    return bool(flags.item())


def broadcast_from_main(action: Callable[[], T]) -> T:
    """Call ``action`` on rank 0 and return its result on every rank.

    Raises:
        UserError: on every rank, if ``action`` raises it on rank 0.
    """
    return gather_objects(call_on_all_ranks(lambda: action() if is_main() else None))[0]  # type: ignore[return-value]  # rank 0 has called action


def broadcast_slow_from_main(action: Callable[[], T]) -> T:
    """Call ``broadcast_from_main`` for an action that may exceed the timeout of a collective, such as a download.

    While rank 0 works, all ranks exchange a short message every second.

    Raises:
        UserError: on every rank, if ``action`` raises it on rank 0.
    """

    def on_main() -> T:
        with ThreadPoolExecutor(1) as thread:
            job = thread.submit(action)
            while any_rank_on_cpu(not job.done()):
                wait([job], timeout=_POLL_SECONDS)
        return job.result()

    if is_main():
        return broadcast_from_main(on_main)
    while any_rank_on_cpu(False):
        pass
    return broadcast_from_main(action)


def barrier() -> None:
    """Wait until every rank has called this."""
    if torch_dist.is_initialized() and world_size() > 1:
        torch_dist.barrier()


def call_on_all_ranks(action: Callable[[], T]) -> T:
    """Call ``action`` on every rank and return its result.

    A rank that failed alone would leave the others waiting in their next collective.

    Raises:
        UserError: on every rank, if ``action`` raises it on any rank.
    """
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    raise_on_all_ranks(problem)
    return result  # type: ignore[return-value]  # no problem on any rank: action returned a T
