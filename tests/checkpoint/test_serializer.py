import pickle
from pathlib import Path

import pytest
import torch

from ds_gpt2.checkpoint.serializer import Serializer


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.target,)


def test_what_it_saves_it_loads(tmp_path: Path) -> None:
    state = {"weights": torch.arange(5.0), "step": 3, "nested": [{"a": (1, None)}]}
    serializer = Serializer()
    serializer.save(state, str(tmp_path / "state.pt"))
    loaded = serializer.load(str(tmp_path / "state.pt"))
    assert torch.equal(loaded.pop("weights"), state["weights"])
    assert loaded == {"step": 3, "nested": [{"a": (1, None)}]}


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    torch.save({"step": _Code(owned)}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        Serializer().load(str(tmp_path / "evil.pt"))
    assert not owned.exists()
