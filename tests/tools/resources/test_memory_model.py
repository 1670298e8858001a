"""The predicted memory of an evaluation on items is at least what PyTorch's profiler measures, and not much more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ds_gpt2.config.sections import ModelSettings
from ds_gpt2.data.items import Item
from ds_gpt2.evaluation import row_batches
from ds_gpt2.evaluation.scoring import REFERENCE_TOKENS, score_batched, score_one
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.tools.resources.memory_model import describe_model, evaluation

pytestmark = pytest.mark.usefixtures("one_thread")


def peak(action: Callable[[], object]) -> int:
    """Return the most bytes of tensors that ``action`` has allocated at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    allocated = highest = 0
    events = (each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]")
    for event in sorted(events, key=lambda each: each.start_ns()):
        allocated += event.nbytes()
        highest = max(highest, allocated)
    return highest


def item(context: int, ending: int, endings: int) -> Item:
    tokens = [np.full(length, 7, np.uint16) for length in (context, *[ending] * endings)]
    lengths = np.ones(endings, np.int32)
    return Item(tokens[0], tokens[1:], 0, lengths, lengths)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "batch"), [(64, "short rows"), (64, "one long row"), (1536, "short rows")])
def test_an_evaluation_takes_at_most_the_predicted_memory(width: int, batch: str) -> None:
    settings = ModelSettings(layers=1, heads=2, width=width)
    described = describe_model(settings, 1024, compiled=False)
    model = GPT2(described.shape).to(torch.bfloat16).eval()
    items = [item(30, 10, 4)] * 60 if batch == "short rows" else [item(200, 101, 18)]
    assert max(map(row_batches.row_length, items)) <= row_batches.longest_row(1024)
    assert peak(lambda: score_batched(model, items)) <= evaluation(described, "cpu")


@pytest.mark.slow
def test_the_largest_part_is_the_reference_of_a_small_model() -> None:
    described = describe_model(ModelSettings(layers=1, heads=2, width=64), 1024, compiled=False)
    model = GPT2(described.shape).to(torch.bfloat16).eval()
    predicted = evaluation(described, "cpu")
    at_once, in_parts = item(REFERENCE_TOKENS // 4 - 10, 10, 4), item(1, 1024, 2)
    assert 0.4 * predicted < peak(lambda: score_one(model, at_once)) <= predicted
    assert 0.4 * predicted < peak(lambda: score_one(model, in_parts)) <= predicted
