"""What a run requires of the disk, from its settings."""

from __future__ import annotations

import pytest
import torch
from doctor_helpers import preset

from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import CHECKPOINT_BYTES, ModelShape
from ds_gpt2.tools.resources import requirements


@pytest.mark.parametrize("name", ["quickstart", "gpt2_124m", "gpt2_1558m"])
def test_parameters_are_counted_without_building_the_model(name: str) -> None:
    chosen = preset(name)
    with torch.device("meta"):
        model = GPT2(ModelShape(*chosen.model.shape, chosen.batch.sequence_length))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert requirements.checkpoint_bytes(chosen) == CHECKPOINT_BYTES * counted


def test_disk_space_that_the_settings_require() -> None:
    chosen = preset("gpt2_124m", checkpoint__keep_last=3, checkpoint__min_free_gb=0)
    full = requirements.checkpoint_bytes(chosen)
    parameters = ModelShape(*chosen.model.shape, chosen.batch.sequence_length).parameters
    need = requirements.disk_requirement(chosen, steps=95_365, epochs=5.0)
    assert (need.checkpoint, need.maximum, need.minimum) == (full, (3 + 5 + 1 + 1) * full, 4 * full)
    assert requirements.disk_requirement(chosen, steps=500, epochs=0.02).maximum == (2 + 1 + 1) * full  # two saves only
    few = {"checkpoint__keep_last": 3, "checkpoint__min_free_gb": 0, "checkpoint__keep_epochs": 2}
    weights = requirements.disk_requirement(preset("gpt2_124m", checkpoint__epochs_as="weights", **few), 95_365, 5.0)
    assert weights.maximum == (3 + 1 + 1) * full + 2 * 4 * parameters
    keep_every = preset("gpt2_124m", checkpoint__keep_every=10_000, **few)
    with_keep_every = requirements.disk_requirement(keep_every, 95_365, 0.0)
    assert with_keep_every.maximum == (3 + 9 + 1 + 1) * full


def test_hosts_share_the_optimizer_state_and_the_copy_that_is_saved() -> None:
    chosen = preset("gpt2_124m")
    alone = requirements.host_memory(chosen, "cuda", 2)
    libraries = alone - requirements.checkpoint_bytes(chosen)
    one_of_four = requirements.host_memory(chosen, "cuda", 2, world_size=8)
    assert one_of_four == pytest.approx(libraries + requirements.checkpoint_bytes(chosen) / 4)
    one, four = (requirements.host_memory(chosen, "cpu", 2, world_size) for world_size in (2, 8))
    assert one - four > 0.75 * requirements.checkpoint_bytes(chosen)


def test_a_moving_average_of_the_weights_takes_four_bytes_per_parameter() -> None:
    settings = {"checkpoint__keep_last": 3, "checkpoint__min_free_gb": 0, "checkpoint__epochs_as": "weights"}
    plain, averaged = (preset("gpt2_124m", ema__decay=decay, **settings) for decay in ("null", 0.999))
    parameters = requirements.checkpoint_bytes(plain) // CHECKPOINT_BYTES
    assert requirements.checkpoint_bytes(averaged) == 18 * parameters
    assert requirements.disk_requirement(averaged, 95_365, 5.0).maximum == ((3 + 1 + 1) * 18 + 5 * 8) * parameters
    assert requirements.gpu_memory(averaged, 4) - requirements.gpu_memory(plain, 4) == parameters
    assert requirements.largest_file(averaged, 1) - requirements.largest_file(plain, 1) == 4 * parameters
    more, less = (requirements.host_memory(each, "cpu", 2, 4) for each in (averaged, plain))
    assert more - less == 2 * 4 * parameters / 2, "the average, and its copy in a save"
