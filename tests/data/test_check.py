import json
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.data import check
from ds_gpt2.data.check import check_tokens
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.errors import UserError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "x_train_000001.npy"
    path.parent.mkdir()
    np.save(path, np.full(5000, 50_256, np.uint16))
    return path


def _spoil(shard: Path) -> None:
    tokens = np.load(shard)
    tokens[4321] = 50_257
    np.save(shard, tokens)


def test_a_good_dataset_passes_and_is_remembered(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "memory.json"
    check_tokens(open_dataset(shard.parent), memory)
    assert list(json.loads(memory.read_text())) == [str(shard)]
    monkeypatch.setattr(check, "open_shard", lambda path: pytest.fail(f"{path} was scanned a second time"))
    check_tokens(open_dataset(shard.parent), memory)


def test_an_impossible_token_is_named_with_its_place(shard: Path, tmp_path: Path) -> None:
    _spoil(shard)
    with pytest.raises(UserError, match=rf"{shard.name} has token id 50257 at position 4321"):
        check_tokens(open_dataset(shard.parent), tmp_path / "memory.json")
    assert not (tmp_path / "memory.json").exists()


def test_a_changed_shard_is_scanned_again(shard: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    check_tokens(open_dataset(shard.parent), memory)
    _spoil(shard)
    with pytest.raises(UserError, match="position 4321"):
        check_tokens(open_dataset(shard.parent), memory)


def test_a_damaged_memory_is_no_memory(shard: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    memory.write_text("{")
    _spoil(shard)
    with pytest.raises(UserError, match="position 4321"):
        check_tokens(open_dataset(shard.parent), memory)
