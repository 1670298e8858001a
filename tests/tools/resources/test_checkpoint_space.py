"""Upper bound of the disk space of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.checkpoint.retention import PROTECTED
from ds_gpt2.checkpoint.space import bytes_for_next_save, reserved_bytes
from ds_gpt2.config.settings import CheckpointSettings
from ds_gpt2.tools.resources.checkpoint_space import Count, max_kept, simulate
from ds_gpt2.tools.resources.run_schedule import RunSchedule


@given(data=st.data())
def test_max_kept_is_an_upper_bound_of_the_simulation(data: st.DataObject) -> None:
    """The saves are due at multiples of checkpoint.every; the checkpoint being written comes on top."""
    kind: st.SearchStrategy[Any] = st.sampled_from(["full", "weights"])
    every = data.draw(st.integers(1, 12))
    settings = CheckpointSettings(
        dir=Path("unused"),
        every=every,
        keep_last=data.draw(st.integers(PROTECTED, 5)),
        keep_every=data.draw(st.sampled_from([0, 15, 20])),
        keep_epochs=data.draw(st.sampled_from(["all", 2, 3])),
        keep_best=data.draw(st.booleans()),
        epochs_as=data.draw(kind),
        best_as=data.draw(kind),
    )
    epoch, validation = every * data.draw(st.integers(1, 5)), every * data.draw(st.integers(0, 3))
    schedule = RunSchedule(every * data.draw(st.integers(1, 30)), 4, 4 * epoch, validation, every)
    found = simulate(settings, schedule, improving=data.draw(st.booleans()))
    bound = max_kept(settings, schedule.steps, found.saves, len(schedule.epoch_ends), validation > 0)
    assert found.at_end.full <= bound.full and found.at_end.weights <= bound.weights
    assert found.peak.full <= bound.full + 1


def test_max_kept_follows_the_retention_settings() -> None:
    settings = CheckpointSettings(dir=Path("unused"), every=100, keep_last=3, keep_every=250, epochs_as="weights")
    assert max_kept(settings, 1000, 10, 4, has_best=True) == Count(3 + 2 + 1, 4)  # keep_every: steps 500 and 1000
    assert max_kept(settings, 200, 2, 0, has_best=False) == Count(2, 0)
    fewer = settings.model_copy(update={"keep_epochs": 1, "keep_best": False})
    assert max_kept(fewer, 1000, 10, 4, has_best=True) == Count(3 + 2, 1)


def test_next_save_requires_its_size_and_the_reserve() -> None:
    settings = CheckpointSettings(dir=Path("unused"), min_free_gb=1.5)
    assert reserved_bytes(settings) == 1_500_000_000
    assert bytes_for_next_save(1000, settings) == 1_500_001_000
