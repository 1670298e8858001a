import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import verify_on_ranks
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.data.verify_on_ranks import check_shards


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "x_train_000001.npy"
    path.parent.mkdir()
    np.save(path, np.full(5000, 50_256, np.uint16))
    return path


def _damage(shard: Path) -> None:
    tokens = np.load(shard)
    tokens[4321] = 50_257
    np.save(shard, tokens)


def test_a_good_dataset_passes_and_is_read_once(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.json"
    check_shards(open_dataset(shard.parent), record)
    assert list(json.loads(record.read_text())) == [shard.name]
    monkeypatch.setattr(verify_on_ranks, "read_content", lambda path: pytest.fail(f"{path} was read a second time"))
    check_shards(open_dataset(shard.parent), record)


def test_a_token_out_of_range_is_an_error_with_its_position(shard: Path, tmp_path: Path) -> None:
    _damage(shard)
    with pytest.raises(UserError, match=rf"{shard.name} has token id 50257 at position 4321"):
        check_shards(open_dataset(shard.parent), tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()


def test_a_shard_changed_since_it_was_recorded_is_an_error(shard: Path, tmp_path: Path) -> None:
    """Without an index the run records checksums; a new modification time alone is no change."""
    record = tmp_path / "record.json"
    check_shards(open_dataset(shard.parent), record)
    np.save(shard, np.load(shard))
    check_shards(open_dataset(shard.parent), record)
    np.save(shard, np.full(5000, 7, np.uint16))
    with pytest.raises(UserError, match=rf"{shard.name} was changed \(checksum mismatch\)"):
        check_shards(open_dataset(shard.parent), record)
    check_shards(open_dataset(shard.parent), tmp_path / "another run.json")


def test_a_shard_that_differs_from_the_index_is_an_error(dataset_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    file = directory / open_dataset(directory).split("train")[0].file
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name} was changed \(checksum mismatch\)"):
        check_shards(open_dataset(directory), tmp_path / "record.json")


def test_a_changed_shard_is_read_again(shard: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    check_shards(open_dataset(shard.parent), record)
    _damage(shard)
    with pytest.raises(UserError, match="position 4321"):
        check_shards(open_dataset(shard.parent), record)


def test_a_damaged_record_is_ignored(shard: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text("{")
    _damage(shard)
    with pytest.raises(UserError, match="position 4321"):
        check_shards(open_dataset(shard.parent), record)
