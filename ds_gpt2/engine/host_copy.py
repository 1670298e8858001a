"""A copy of the training state in host memory, so that training continues while the copy is written to disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


def freeze(state: Any) -> Any:
    """Return a copy of ``state`` that shares its tensors. It is valid until the next update changes the tensors."""
    return _rebuilt(state, lambda tensor: tensor.detach())


class HostMemory:
    """Buffers in (pinned) host memory, reused at every save: allocating pinned memory is slow."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def copy(self, state: Any, after: torch.cuda.Event | None) -> Any:
        """Return ``state`` with every tensor copied to host memory, when all copies are complete.

        Overwrites the result of the previous call. Call it in a separate thread: on a GPU the copies run on a separate
        stream and do not delay the computation of gradients.

        Args:
            state: nested dicts, lists and tuples; tensors of any shape and dtype, which the copies keep.
            after: on a GPU, the event after which the tensors have the values to copy.
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
    """Return a deep copy of nested containers with each tensor replaced by ``change(tensor)``.

    ``change`` is called once per tensor.
    """
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
