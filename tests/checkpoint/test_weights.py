from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from ds_gpt2.checkpoint import manifest
from ds_gpt2.checkpoint.catalog import candidates, problem_of, scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.weights import WEIGHTS_FILE, fp32_weights, save_weights

TAG = "rolling_step_000012"


def test_the_weights_equal_those_of_deepspeeds_own_tool(four_ranks: tuple[object, Path]) -> None:
    directory = four_ranks[1] / "checkpoints" / "test"
    expected = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=TAG)
    found = fp32_weights(directory / TAG)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == torch.float32


def test_a_checkpoint_of_weights_is_small_complete_and_not_resumable(
    four_ranks: tuple[object, Path], tmp_path: Path
) -> None:
    source = four_ranks[1] / "checkpoints" / "test" / TAG
    save_weights(Disk(), source, tmp_path, "epoch_00001")
    (generation,) = scan(tmp_path)
    assert generation.weights_only
    assert problem_of(generation) is None
    assert candidates(tmp_path, "latest") == []
    weights = torch.load(generation.path / WEIGHTS_FILE, weights_only=True)
    parameters = sum(tensor.numel() for tensor in weights.values())
    saved = manifest.read(generation.path)
    assert saved.bytes < 1.01 * 4 * parameters
    assert saved.bytes < manifest.read(source).bytes / 3
    assert saved.step == 12
