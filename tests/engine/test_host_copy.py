from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from ds_gpt2.engine.host_copy import HostMemory, freeze


def _state() -> dict[str, Any]:
    shared = torch.arange(6.0).reshape(2, 3)
    return {
        "module": OrderedDict(a=shared, b=torch.ones(3, dtype=torch.bfloat16)),
        "again": [shared, (1, "two", None)],
        "part": torch.arange(100.0)[10:13],
        "scalar": torch.tensor(7.0, requires_grad=True),
    }


def test_a_frozen_state_copies_values_but_shares_tensors() -> None:
    state = _state()
    frozen = freeze(state)
    state["again"][1] = "changed"
    state["module"]["a"][0, 0] = 42
    assert frozen["again"][1] == (1, "two", None)
    assert frozen["module"]["a"][0, 0] == 42
    assert type(frozen["module"]) is OrderedDict
    assert not frozen["scalar"].requires_grad


def test_a_copy_is_independent_and_complete() -> None:
    state = _state()
    copied = HostMemory().copy(freeze(state), after=None)
    expected = _state()
    for tensor in (state["module"]["a"], state["module"]["b"], state["part"]):
        tensor.zero_()
    assert torch.equal(copied["module"]["a"], expected["module"]["a"])
    assert torch.equal(copied["module"]["b"], expected["module"]["b"])
    assert torch.equal(copied["part"], expected["part"])
    assert copied["scalar"] == 7


def test_a_tensor_that_occurs_twice_is_copied_once_and_a_view_without_its_storage() -> None:
    copied = HostMemory().copy(_state(), after=None)
    assert copied["module"]["a"] is copied["again"][0]
    assert copied["part"].untyped_storage().nbytes() == 3 * 4


def test_buffers_are_reused_also_for_other_shapes() -> None:
    memory = HostMemory()
    first = memory.copy({"a": torch.ones(1000)}, after=None)["a"].data_ptr()
    second = memory.copy({"a": torch.zeros(1000)}, after=None)["a"]
    assert (second.data_ptr(), second.sum()) == (first, 0)
    third = memory.copy({"a": torch.full((3, 2), 2, dtype=torch.int64)}, after=None)["a"]
    assert (third.dtype, third.tolist()) == (torch.int64, [[2, 2]] * 3)
