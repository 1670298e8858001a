import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import sha256
from ds_gpt2.data.dataset import INDEX, Dataset, Shard, Split, Windows, as_first_read, open_dataset
from ds_gpt2.data.shards import header_of
from ds_gpt2.data.split_names import split_of
from ds_gpt2.data.verify_on_ranks import check_shards


def _bin(path: Path, tokens: int, first: int = 0) -> None:
    path.write_bytes(header_of(tokens) + np.arange(first, first + tokens, dtype="<u2").tobytes())


@pytest.fixture
def llm_c(tmp_path: Path) -> Path:
    """Return a directory as written by llm.c's fineweb.py."""
    _bin(tmp_path / "fineweb_val_000000.bin", 50, first=5000)
    _bin(tmp_path / "fineweb_train_000001.bin", 101)
    _bin(tmp_path / "fineweb_train_000002.bin", 57, first=1000)
    return tmp_path


@pytest.fixture
def copy(dataset_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_dir, tmp_path / "copy"))


def test_shards_without_an_index_are_split_by_name(llm_c: Path) -> None:
    dataset = open_dataset(llm_c)
    assert (dataset.tokens("train"), dataset.tokens("val")) == (158, 50)


def test_directories_of_npy_shards_are_read(tmp_path: Path) -> None:
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
def test_a_shard_shorter_than_a_window_has_no_windows(llm_c: Path, size: int) -> None:
    assert len(Windows(open_dataset(llm_c), "train", size)) == (101 - 1) // size + (57 - 1) // size


def test_a_window_longer_than_the_data_is_an_error(llm_c: Path) -> None:
    with pytest.raises(UserError, match=r"50 val tokens in 1 shard.*smaller batch\.sequence_length"):
        Windows(open_dataset(llm_c), "val", 50)


def test_the_index_has_the_checksums_of_the_files(dataset_dir: Path) -> None:
    dataset = open_dataset(dataset_dir)
    for shard in dataset.shards:
        assert sha256(dataset_dir / shard.file) == shard.sha256


def test_the_fingerprint_depends_on_the_content(dataset_dir: Path, copy: Path) -> None:
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
def test_a_missing_directory_is_an_error_with_the_prepare_command(name: str, command: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{command} {tmp_path / name}"):
        open_dataset(tmp_path / name)


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data: .* has neither"):
        open_dataset(tmp_path)


def test_a_missing_shard_is_an_error(copy: Path) -> None:
    (copy / "train_000000.bin").unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin is missing"):
        open_dataset(copy)


def test_a_truncated_shard_is_an_error(copy: Path) -> None:
    path = copy / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train_000000\.bin has \d+ bytes but dataset\.json records \d+"):
        open_dataset(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [1]}', "\x00", "[" * 30_000], ids=len)
def test_a_damaged_index_is_an_error(copy: Path, content: str) -> None:
    (copy / INDEX).write_text(content)
    with pytest.raises(UserError, match="not a dataset index"):
        open_dataset(copy)


def test_data_of_another_tokenizer_is_an_error(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "tokenizer": "llama"}))
    with pytest.raises(UserError, match="llama"):
        open_dataset(copy)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["fineweb_train_000001.bin", "TRAIN.bin", "tokens_0.npy", "training-00.bin", "my_test_train_1.bin"]),
        ("val", ["x_val_000000.bin", "VAL.bin", "x_validation_0.npy", "valid.bin", "x-Dev-1.bin", "eval_0.bin"]),
        (
            "val",
            ["held_out.bin", "heldout0.bin", "hold-out_1.bin", "x_dev_set_0.bin", "evaluation.bin", "evaluate.bin"],
        ),
        (None, ["x_test_000000.bin", "Test.bin", "TESTING_1.npy", "x-test.bin", "test-00000-of-00001.bin"]),
    ],
)
def test_common_names_determine_the_split(split: str | None, names: list[str]) -> None:
    assert {name: split_of(Path(name)) for name in names} == dict.fromkeys(names, split)


def test_shards_of_a_test_split_are_left_out_and_reported(llm_c: Path, log_messages: list[str]) -> None:
    before = open_dataset(llm_c).fingerprint
    _bin(llm_c / "fineweb_test_000000.bin", 70, first=7000)
    _bin(llm_c / "Fineweb_Validation_000001.BIN", 30, first=8000)
    dataset = open_dataset(llm_c)
    assert (dataset.tokens("train"), dataset.tokens("val")) == (158, 80)
    assert dataset.left_out == ("fineweb_test_000000.bin",) and "fineweb_test_000000.bin" in dataset.source
    assert [line for line in log_messages if "left out 1 shard of a test split, recognized by name: " in line]
    assert dataset.fingerprint != before


def test_hidden_files_are_ignored(llm_c: Path) -> None:
    before = open_dataset(llm_c).fingerprint
    (llm_c / "._fineweb_train_000001.bin").write_bytes(b"another program's note")
    assert open_dataset(llm_c).fingerprint == before


def test_a_broken_link_to_a_shard_is_an_error(llm_c: Path) -> None:
    (llm_c / "fineweb_train_000003.bin").symlink_to("/no/such/file")
    with pytest.raises(UserError, match=r"fineweb_train_000003\.bin is missing"):
        open_dataset(llm_c)


def test_the_error_names_subdirectories_with_shards(llm_c: Path) -> None:
    (llm_c / "deep").mkdir()
    for path in llm_c.glob("*.bin"):
        path.rename(llm_c / "deep" / path.name)
    with pytest.raises(UserError, match="its subdirectories deep have shards: give one of them"):
        open_dataset(llm_c)


def test_a_directory_of_nanogpt_is_read(tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 50_257, 5000, dtype=np.uint16)
    for name, part in (("train.bin", tokens[:4000]), ("val.bin", tokens[4000:])):
        part.astype("<u2").tofile(tmp_path / name)
    (tmp_path / "prepare.py").touch()
    dataset = open_dataset(tmp_path)
    assert (dataset.tokens("train"), dataset.tokens("val")) == (4000, 1000)
    rows = Windows(dataset, "train", 10).read(np.arange(399))
    assert rows[:, :-1].ravel().tolist() == tokens[:3990].tolist()
    check_shards(dataset, tmp_path / "memory.json")
    damaged = np.fromfile(tmp_path / "val.bin", "<u2")
    damaged[500] = 50_257
    damaged.tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match=r"val\.bin .*token id 50257"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("file", "../train_000000.bin"),
        ("file", "/etc/passwd"),
        ("file", 5),
        ("split", "test"),
        ("split", []),
        ("tokens", -1),
        ("tokens", "many"),
        ("bytes", 1.5),
        ("sha256", 5),
    ],
)
def test_an_index_with_a_wrong_entry_is_an_error(copy: Path, entry: str, value: object) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["shards"][0][entry] = value
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a dataset index"):
        open_dataset(copy)


@pytest.mark.parametrize("counts", [[1], "x", {"documents": "many"}, {"documents": None}])
def test_an_index_with_wrong_counts_is_an_error(copy: Path, counts: object) -> None:
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "counts": counts}))
    with pytest.raises(UserError, match="not a dataset index"):
        open_dataset(copy)


@pytest.mark.parametrize("name", ["out", "out.unfinished"])
def test_an_unfinished_dataset_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    if name == "out":
        (tmp_path / "out" / ".unfinished").mkdir()
        _bin(tmp_path / "out" / "train_000000.bin", 50)
    with pytest.raises(UserError, match="out is not finished: run its `prepare` command again"):
        open_dataset(tmp_path / "out")


def test_a_run_keeps_the_split_of_an_earlier_version(tmp_path: Path) -> None:
    """Version 0.1.0 used shards of a test split, and validation shards without the word val, for training."""
    splits: dict[str, Split] = {"a_test": "train", "b_train": "train", "c_val": "val", "d_validation": "train"}
    for name in splits:
        _bin(tmp_path / f"{name}.bin", 50)
    now = open_dataset(tmp_path)
    assert [(shard.file, shard.split) for shard in now.shards] == [
        ("b_train.bin", "train"),
        ("c_val.bin", "val"),
        ("d_validation.bin", "val"),
    ]
    size = (tmp_path / "a_test.bin").stat().st_size
    shards = tuple(Shard(f"{name}.bin", split, 50, size, None) for name, split in splits.items())
    before = Dataset(tmp_path, shards, "version 0.1.0")
    assert as_first_read(now, before.fingerprint).shards == shards
    assert as_first_read(now, now.fingerprint) is now
    assert as_first_read(now, "that of other data") is now


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xb6\xff", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{}", "a field is missing or has another type"),
        (b"[]", "a field is missing or has another type"),
    ],
)
def test_the_error_of_a_damaged_index_has_no_words_of_python(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError) as refused:
        open_dataset(tmp_path)
    fix = "restore it from a copy, or prepare the data again"
    assert str(refused.value) == f"{tmp_path / INDEX} is not a dataset index of ds_gpt2 ({reason}): {fix}"


def test_the_command_that_creates_missing_data_has_its_directory_quoted(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        open_dataset(tmp_path / "my data")
    assert f"`./launch.sh prepare text FILE... --out '{tmp_path / 'my data'}'`" in str(refused.value)
