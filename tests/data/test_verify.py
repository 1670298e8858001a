import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import verify
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.data.verify import check_shards


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
    check_shards(open_dataset(shard.parent), memory)
    assert list(json.loads(memory.read_text())) == [shard.name]
    monkeypatch.setattr(verify, "_read", lambda path: pytest.fail(f"{path} was scanned a second time"))
    check_shards(open_dataset(shard.parent), memory)


def test_an_impossible_token_is_named_with_its_place(shard: Path, tmp_path: Path) -> None:
    _spoil(shard)
    with pytest.raises(UserError, match=rf"{shard.name} has token id 50257 at position 4321"):
        check_shards(open_dataset(shard.parent), tmp_path / "memory.json")
    assert not (tmp_path / "memory.json").exists()


def test_a_shard_that_is_not_what_it_was_is_refused(shard: Path, tmp_path: Path) -> None:
    """Without an index it is the run that remembers; a new time alone is no change."""
    memory = tmp_path / "memory.json"
    check_shards(open_dataset(shard.parent), memory)
    np.save(shard, np.load(shard))
    check_shards(open_dataset(shard.parent), memory)
    np.save(shard, np.full(5000, 7, np.uint16))
    with pytest.raises(UserError, match=rf"{shard.name} is not what it was"):
        check_shards(open_dataset(shard.parent), memory)
    check_shards(open_dataset(shard.parent), tmp_path / "another run.json")


def test_a_shard_that_is_not_the_one_of_the_index_is_refused(dataset_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    file = directory / open_dataset(directory).split("train")[0].file
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name} is not what it was"):
        check_shards(open_dataset(directory), tmp_path / "memory.json")


def test_a_changed_shard_is_scanned_again(shard: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    check_shards(open_dataset(shard.parent), memory)
    _spoil(shard)
    with pytest.raises(UserError, match="position 4321"):
        check_shards(open_dataset(shard.parent), memory)


def test_a_damaged_memory_is_no_memory(shard: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    memory.write_text("{")
    _spoil(shard)
    with pytest.raises(UserError, match="position 4321"):
        check_shards(open_dataset(shard.parent), memory)
