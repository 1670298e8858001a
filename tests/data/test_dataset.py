import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.data.dataset import INDEX, Windows, open_dataset
from ds_gpt2.data.shards import header_of, sha256
from ds_gpt2.errors import UserError


def _bin(path: Path, tokens: int, first: int = 0) -> None:
    path.write_bytes(header_of(tokens) + np.arange(first, first + tokens, dtype="<u2").tobytes())


@pytest.fixture
def llm_c(tmp_path: Path) -> Path:
    """A directory as llm.c's fineweb.py leaves it."""
    _bin(tmp_path / "fineweb_val_000000.bin", 50, first=5000)
    _bin(tmp_path / "fineweb_train_000001.bin", 101)
    _bin(tmp_path / "fineweb_train_000002.bin", 57, first=1000)
    return tmp_path


@pytest.fixture
def copy(dataset_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_dir, tmp_path / "copy"))


def test_foreign_directories_are_split_by_name(llm_c: Path) -> None:
    dataset = open_dataset(llm_c)
    assert (dataset.tokens("train"), dataset.tokens("val")) == (158, 50)


def test_npy_directories_are_read_too(tmp_path: Path) -> None:
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(30, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(40, dtype=np.uint16))
    dataset = open_dataset(tmp_path)
    assert (dataset.tokens("train"), dataset.tokens("val")) == (40, 30)


def test_windows_tile_each_shard_and_share_one_token(llm_c: Path) -> None:
    windows = Windows(open_dataset(llm_c), "train", 10)
    assert len(windows) == 10 + 5  # (101 - 1) // 10 and (57 - 1) // 10
    rows = windows.read(np.arange(15))
    assert rows.shape == (15, 11)
    assert rows[:10, :-1].ravel().tolist() == list(range(100))
    assert rows[:10, 1:].ravel().tolist() == list(range(1, 101))
    assert rows[10:, 1:].ravel().tolist() == list(range(1001, 1051))


def test_windows_can_be_read_in_any_order(llm_c: Path) -> None:
    windows = Windows(open_dataset(llm_c), "train", 10)
    assert windows.read(np.array([12, 0, 9])).tolist() == [windows.read(np.array([i]))[0].tolist() for i in (12, 0, 9)]


@pytest.mark.parametrize("size", [51, 57])
def test_a_shard_without_a_whole_window_gives_none(llm_c: Path, size: int) -> None:
    assert len(Windows(open_dataset(llm_c), "train", size)) == (101 - 1) // size + (57 - 1) // size


def test_a_window_longer_than_the_data_is_the_users_mistake(llm_c: Path) -> None:
    with pytest.raises(UserError, match=r"50 val tokens in 1 shard.*smaller batch\.sequence_length"):
        Windows(open_dataset(llm_c), "val", 50)


def test_the_index_describes_the_files(dataset_dir: Path) -> None:
    dataset = open_dataset(dataset_dir)
    for shard in dataset.shards:
        assert sha256(dataset_dir / shard.file) == shard.sha256


def test_the_fingerprint_follows_the_content(dataset_dir: Path, copy: Path) -> None:
    assert open_dataset(copy).fingerprint == open_dataset(dataset_dir).fingerprint
    index = json.loads((copy / INDEX).read_text())
    index["shards"][0]["sha256"] = "0" * 64
    (copy / INDEX).write_text(json.dumps(index))
    assert open_dataset(copy).fingerprint != open_dataset(dataset_dir).fingerprint


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("sample", "prepare sample --out"),
        ("fineweb-edu", "prepare fineweb-edu --out"),
        ("mine", "prepare text FILE... --out"),
    ],
)
def test_a_missing_directory_names_the_command_that_makes_it(name: str, command: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{command} {tmp_path / name}"):
        open_dataset(tmp_path / name)


def test_an_empty_directory_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data: .* holds neither"):
        open_dataset(tmp_path)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "train_000000.bin").unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin is missing"):
        open_dataset(copy)


def test_a_cut_shard_is_named(copy: Path) -> None:
    path = copy / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train_000000\.bin has \d+ bytes but dataset\.json says \d+"):
        open_dataset(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [1]}', "\x00"])
def test_a_damaged_index_is_refused(copy: Path, content: str) -> None:
    (copy / INDEX).write_text(content)
    with pytest.raises(UserError, match="not a dataset index"):
        open_dataset(copy)


def test_another_tokenizers_data_is_refused(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "tokenizer": "llama"}))
    with pytest.raises(UserError, match="llama"):
        open_dataset(copy)
