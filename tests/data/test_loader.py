import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import BatchPlan, steps_of
from ds_gpt2.config.sections import ScheduleSettings
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.loader import TrainingData, on_device
from ds_gpt2.model.shape import VOCABULARY

CPU = torch.device("cpu")
SEQUENCE = 64


@pytest.fixture(scope="module")
def windows(dataset_dir: Path) -> Windows:
    return Windows(open_dataset(dataset_dir), "train", SEQUENCE)


def _step(windows: Windows, plan: BatchPlan, step: int) -> list[list[int]]:
    """Return the tokens of all ranks and micro-batches of a step, in order."""
    rows = []
    for rank in range(plan.world_size):
        for tokens, targets in TrainingData(windows, plan, rank, 1337, CPU).micro_batches(step):
            assert tokens.shape == targets.shape == (plan.micro_batch, SEQUENCE)
            assert torch.equal(tokens[:, 1:], targets[:, :-1])
            rows += tokens.tolist()
    return rows


@pytest.mark.parametrize(
    "plan", [BatchPlan(4, SEQUENCE, 4, 1), BatchPlan(4, SEQUENCE, 2, 2), BatchPlan(2, SEQUENCE, 1, 8)]
)
def test_the_windows_of_a_step_do_not_depend_on_the_world_size(windows: Windows, plan: BatchPlan) -> None:
    for step in (1, 2, 1000):
        assert _step(windows, plan, step) == _step(windows, BatchPlan(2, SEQUENCE, 2, 4), step)


@settings(max_examples=30)
@given(
    windows_count=st.integers(1, 300),
    plan=st.builds(BatchPlan, st.integers(1, 4), st.just(SEQUENCE), st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 2**32),
)
def test_every_window_occurs_exactly_once_per_epoch(windows_count: int, plan: BatchPlan, seed: int) -> None:
    class Windows:
        def __len__(self) -> int:
            return windows_count

    data = TrainingData(Windows(), plan, 0, seed, CPU)  # type: ignore[arg-type]  # only the length is used
    epochs = 3
    steps = steps_of(ScheduleSettings.model_construct(steps=None, epochs=epochs), windows_count, plan.windows_per_step)
    stream = np.concatenate([data.windows_of(step) for step in range(1, steps + 1)])
    for epoch in range(epochs):
        rows_read = Counter(stream[epoch * windows_count : (epoch + 1) * windows_count].tolist())
        assert rows_read == Counter(range(windows_count))
    assert data.epoch(steps) >= epochs
    assert data.epoch(steps - 1) < epochs


@pytest.mark.slow
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5),
    sequence=st.integers(1, 20),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_every_window_is_read_once_per_epoch_for_any_shards_and_ranks(
    lengths: list[int], sequence: int, accumulation: int, seed: int
) -> None:
    expected, first = [], 0
    with tempfile.TemporaryDirectory() as name:
        for number, length in enumerate(lengths):
            tokens = np.arange(first, first + length, dtype=np.uint16)
            np.save(Path(name) / f"x_train_{number}.npy", tokens)
            starts = range(0, length - sequence, sequence)
            expected += [tuple(tokens[start : start + sequence + 1].tolist()) for start in starts]
            first += length
        assume(expected)
        windows = Windows(open_dataset(Path(name)), "train", sequence)
        steps = steps_of(ScheduleSettings.model_construct(steps=None, epochs=2), len(windows), 4 * accumulation)
        rows_read = []
        for world_size in (1, 2, 4):  # 4 windows per micro-step in total
            plan = BatchPlan(4 // world_size, sequence, accumulation, world_size)
            ranks = [TrainingData(windows, plan, rank, seed, CPU) for rank in range(world_size)]
            rows_read.append([row for step in range(1, steps + 1) for data in ranks for row in _rows(data, step)])
    assert rows_read[0] == rows_read[1] == rows_read[2]
    for epoch in range(2):
        assert Counter(rows_read[0][epoch * len(expected) : (epoch + 1) * len(expected)]) == Counter(expected)


def _rows(data: TrainingData, step: int) -> list[tuple[int, ...]]:
    """Return the windows of a step: the tokens of each and its last target."""
    batches = data.micro_batches(step)
    return [
        (*row.tolist(), int(target[-1]))
        for tokens, targets in batches
        for row, target in zip(tokens, targets, strict=True)
    ]


def test_the_order_depends_on_the_seed(windows: Windows) -> None:
    plan = BatchPlan(4, SEQUENCE, 1, 1)
    first, second = (TrainingData(windows, plan, 0, seed, CPU).windows_of(1).tolist() for seed in (1, 2))
    assert first != second


def test_a_token_out_of_range_is_an_error() -> None:
    with pytest.raises(UserError, match=f"token id {VOCABULARY}, GPT-2's highest"):
        on_device(np.array([[1, VOCABULARY, 2]]), CPU)
