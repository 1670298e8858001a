from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.data.shard_writer import SplitWriter, Written
from ds_gpt2.data.shards import HEADER_BYTES, count_tokens, open_shard, sha256
from ds_gpt2.errors import UserError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    writer = SplitWriter(tmp_path, "train", 5000, Written())
    writer.write(np.arange(1000, dtype=np.uint16))
    writer.write(np.arange(500, dtype=np.uint16))
    (shard,) = writer.close()
    return tmp_path / shard.file


def test_what_is_written_is_read(shard: Path) -> None:
    tokens = open_shard(shard)
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [*range(1000), *range(500)]
    assert shard.stat().st_size == HEADER_BYTES + 2 * 1500


def test_the_bytes_are_llm_cs_format(shard: Path) -> None:
    """As llm.c's dev/data/data_common.py writes it: 256 int32 (magic, version, tokens), then uint16."""
    content = shard.read_bytes()
    assert np.frombuffer(content, "<i4", 4).tolist() == [20_240_520, 1, 1500, 0]
    assert np.frombuffer(content, "<u2", 3, offset=1024).tolist() == [0, 1, 2]


def test_build_nanogpts_npy_is_read(tmp_path: Path) -> None:
    path = tmp_path / "edufineweb_train_000001.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    assert count_tokens(path) == 100
    assert open_shard(path)[-1] == 99


@pytest.mark.parametrize("kept", [0, 10, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 2998])
def test_a_cut_bin_is_refused(shard: Path, kept: int) -> None:
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(UserError, match=str(shard)):
        open_shard(shard)


@pytest.mark.parametrize("kept", [0, 5, 60, 128, 300])
def test_a_cut_npy_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "train.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=str(path)):
        open_shard(path)


def test_an_npy_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    np.save(path, np.zeros((3, 3)))
    with pytest.raises(UserError, match="float64"):
        open_shard(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"train\.npy"):
        open_shard(path)


def test_a_strangers_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04" * 4000)
    with pytest.raises(UserError, match="not a token shard"):
        open_shard(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.bin is missing"):
        open_shard(tmp_path / "gone.bin")


def test_sha256_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
