from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import sha256
from ds_gpt2.data.prepare.shard_writer import SplitWriter, Written
from ds_gpt2.data.shards import HEADER_BYTES, count_tokens, header_of, open_shard, start_of


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    writer = SplitWriter(tmp_path, "train", 5000, Written())
    writer.write(np.arange(1000, dtype=np.uint16))
    writer.write(np.arange(500, dtype=np.uint16))
    (shard,) = writer.close()
    return tmp_path / shard.file


def test_a_written_shard_can_be_read(shard: Path) -> None:
    tokens = open_shard(shard)
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [*range(1000), *range(500)]
    assert shard.stat().st_size == HEADER_BYTES + 2 * 1500


def test_the_format_is_that_of_llm_c(shard: Path) -> None:
    """See llm.c's dev/data/data_common.py: 256 int32 (magic, version, tokens), then uint16."""
    content = shard.read_bytes()
    assert np.frombuffer(content, "<i4", 4).tolist() == [20_240_520, 1, 1500, 0]
    assert np.frombuffer(content, "<u2", 3, offset=1024).tolist() == [0, 1, 2]


def test_an_npy_shard_of_build_nanogpt_is_read(tmp_path: Path) -> None:
    path = tmp_path / "edufineweb_train_000001.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    assert count_tokens(path) == 100
    assert open_shard(path)[-1] == 99


@pytest.mark.parametrize("size", [0, 10, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 2998])
def test_a_truncated_bin_is_an_error(shard: Path, size: int) -> None:
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(UserError, match=str(shard)):
        open_shard(shard)


@pytest.mark.parametrize("size", [0, 5, 60, 128, 300])
def test_a_truncated_npy_is_an_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "train.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=str(path)):
        open_shard(path)


def test_an_npy_of_another_dtype_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    np.save(path, np.zeros((3, 3)))
    with pytest.raises(UserError, match="float64"):
        open_shard(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"train\.npy"):
        open_shard(path)


def test_a_bin_of_another_program_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04" * 4000)
    with pytest.raises(UserError, match="not a token shard"):
        open_shard(path)


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.bin is missing"):
        open_shard(tmp_path / "gone.bin")


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def nanogpt(path: Path, tokens: int = 100_000) -> Path:
    """Write tokens as nanoGPT's data/openwebtext/prepare.py does: uint16 without a header."""
    content = np.random.default_rng(tokens).integers(0, 50_257, tokens, dtype=np.uint16)
    content.astype("<u2").tofile(path)
    return path


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "Validation.bin"])
def test_headerless_shards_of_nanogpt_are_read(tmp_path: Path, name: str) -> None:
    path = nanogpt(tmp_path / name)
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap) and start_of(path) == 0
    assert tokens.tolist() == np.fromfile(path, "<u2").tolist()


@pytest.mark.parametrize("name", ["train_000000.bin", "fineweb_val_000001.bin", "corpus.bin"])
def test_a_headerless_shard_of_another_name_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is not a token shard: .* train\.bin and val\.bin"):
        open_shard(nanogpt(tmp_path / name))


def overwrite(content: bytes, where: slice, value: bytes) -> bytes:
    changed = bytearray(content)
    changed[where] = value
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard: overwrite(shard, slice(0, 1), b"\x07"),  # the magic
        lambda shard: overwrite(shard, slice(4, 5), b"\x02"),  # the version
        lambda shard: overwrite(shard, slice(0, 1024), bytes(1024)),
        lambda shard: overwrite(shard, slice(0, 512), b"text" * 128),
        lambda shard: overwrite(shard, slice(0, 1024), np.random.default_rng(1).bytes(1024)),
        lambda shard: shard[:-2],
        lambda shard: shard[4:],
        lambda shard: shard[:1000],
        lambda shard: shard[:1023] + shard[1024:],
    ],
    ids=range(9),
)
def test_a_damaged_shard_is_not_read_as_a_headerless_one(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    tokens = nanogpt(tmp_path / "tokens").read_bytes()
    path = tmp_path / "train.bin"
    path.write_bytes(damage(header_of(len(tokens) // 2) + tokens))
    with pytest.raises(UserError, match=rf"{path} (is not a token shard|has \d+ bytes but its header requires)"):
        open_shard(path)


def test_headerless_tokens_of_another_tokenizer_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    ids = np.arange(10_000) % 65
    cases = [
        (ids.astype("<u2"), "no token id above 64: characters"),
        ((ids + 60_000).astype("<u2"), "token id 60064, GPT-2's highest is 50256"),
        ((ids + 1000).astype("<u4"), "too many zeros"),
        (np.zeros(0, "<u2"), "is empty"),
        (np.ones(3, "u1"), r"is truncated \(3 bytes, 2 per token\)"),
    ]
    for content, reason in cases:
        content.tofile(path)
        with pytest.raises(UserError, match=reason):
            open_shard(path)
    nanogpt(path)
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(UserError, match=r"characters as tokens \(its directory has a meta\.pkl"):
        open_shard(path)


def test_a_pipe_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train\.bin is not a regular file"):
        open_shard(tmp_path / "train.bin")


def test_a_damaged_npy_header_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.npy"
    for header in (
        b"{" * 100,
        b"\xff" * 100,
        b"{'descr': '<u2', 'shape': (" + b"9" * 60 + b",), 'fortran_order': False}",
    ):
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(50))
        with pytest.raises(UserError, match=r"train\.npy is truncated or not a \.npy file"):
            open_shard(path)
    path.write_bytes(b"PK\x03\x04" + bytes(99))
    with pytest.raises(UserError, match=r"train\.npy"):
        open_shard(path)
