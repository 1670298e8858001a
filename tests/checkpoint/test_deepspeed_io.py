from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ds_gpt2.checkpoint.deepspeed_io import Serializer, unpickle


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_the_serializer_returns_the_saved_states_once() -> None:
    serializer = Serializer()
    weights = torch.arange(5.0)
    serializer.save({"weights": weights, "steps": [3]}, "/anywhere/state.pt")
    saved = serializer.take_saved()
    assert list(saved) == ["state.pt"]
    assert saved["state.pt"]["weights"].data_ptr() == weights.data_ptr()
    assert serializer.take_saved() == {}


def test_the_serializer_loads_the_offered_contents_and_nothing_from_disk(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "state.pt")
    serializer = Serializer()
    serializer.offer({"state.pt": {"step": 2}})
    assert serializer.load(str(tmp_path / "state.pt")) == {"step": 2}
    serializer.offer({})
    with pytest.raises(KeyError):
        serializer.load(str(tmp_path / "state.pt"))


def test_files_of_deepspeed_can_be_unpickled(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"scaler": LossScaler(1.0), "stage": ZeroStageEnum.gradients, "n": (1, None)}, tmp_path / "state.pt")
    loaded = unpickle(tmp_path / "state.pt")
    assert (loaded["scaler"].cur_scale, loaded["stage"], loaded["n"]) == (1.0, ZeroStageEnum.gradients, (1, None))


def test_a_file_with_code_is_refused_without_running_it(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    torch.save({"step": _Code(owned)}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        unpickle(tmp_path / "evil.pt")
    assert not owned.exists()
