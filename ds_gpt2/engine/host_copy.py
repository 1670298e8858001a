"""A copy of training state in host memory, so that training goes on while the copy is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


def freeze(state: Any) -> Any:
    """``state`` with everything copied but its tensors: quick, and good until the next update changes those."""
    return _rebuilt(state, lambda tensor: tensor.detach())


class HostMemory:
    """Buffers that tensors are copied into, kept from save to save: fresh (pinned) memory is slow to get."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def copy(self, state: Any, after: torch.cuda.Event | None) -> Any:
        """``state`` with every tensor in host memory; returns when all copies are complete.

        Overwrites what the call before it returned. To be called in a thread of its own while training computes
        gradients, which the copies do not disturb: on a GPU they run on another stream.

        Args:
            after: on a GPU, the moment from which the tensors hold what is to be copied.
        """
        used = 0

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal used
            buffer = self._buffer(used, tensor)
            used += 1
            return buffer.copy_(tensor, non_blocking=tensor.is_cuda)

        if after is None:
            return _rebuilt(state, to_host)
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            copied = _rebuilt(state, to_host)
        self._stream.synchronize()
        return copied

    def _buffer(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[number]
        if buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[number] = buffer
        return buffer


def _rebuilt(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A deep copy of nested containers, each tensor changed once however often it occurs."""
    changed: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        if isinstance(value, dict):
            rebuilt = type(value)()
            rebuilt.update((key, visit(item)) for key, item in value.items())
            return rebuilt
        if type(value) in (list, tuple):
            return type(value)(visit(item) for item in value)
        return copy.deepcopy(value)

    return visit(state)
