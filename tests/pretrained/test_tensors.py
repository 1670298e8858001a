"""Sharded weights and their index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_helpers import INDEX, WEIGHTS, ours, transformers
from safetensors.torch import load_file, save_file

from ds_gpt2.common.errors import UserError
from ds_gpt2.pretrained.load import is_pretrained, read

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sharded(plain: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    transformers.GPT2LMHeadModel.from_pretrained(plain).save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2 and not (directory / WEIGHTS).exists()
    return directory


def test_sharded_weights_are_read(sharded: Path, plain: Path) -> None:
    assert is_pretrained(sharded)
    assert torch.equal(ours(sharded), ours(plain))


def _index(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((directory / INDEX).read_text())
    edit(content["weight_map"])
    (directory / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "../plain/model.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        ".x.safetensors",
        "x.bin",
        3,
        "a\n.safetensors",
    ],
)
def test_an_index_with_files_outside_its_directory_is_an_error(sharded: Path, name: Any) -> None:
    _index(sharded, lambda listed: listed.update({"transformer.ln_f.bias": name}))
    with pytest.raises(
        UserError, match=r"for transformer\.ln_f\.bias: only safetensors files in its directory"
    ) as raised:
        read(sharded)
    assert "\n" not in str(raised.value)


def test_an_index_and_its_files_must_agree(sharded: Path) -> None:
    listed = json.loads((sharded / INDEX).read_text())["weight_map"]
    first, last = sorted(set(listed.values()))[0], sorted(set(listed.values()))[-1]
    (sharded / last).rename(sharded / "away")
    with pytest.raises(UserError, match=f"lists {last}, which does not exist"):
        read(sharded)
    weights = load_file(sharded / "away")
    moved = next(name for name, file in listed.items() if file == first)
    save_file({**weights, moved: load_file(sharded / first)[moved]}, sharded / last)
    with pytest.raises(UserError, match=rf"{moved} is in {first} and in {last}"):
        read(sharded)
    save_file({**weights, "more": torch.zeros(1)}, sharded / last)
    with pytest.raises(UserError, match=f"{last} has more, which {INDEX} does not list for this file"):
        read(sharded)
    removed = next(iter(weights))
    save_file({name: each for name, each in weights.items() if name != removed} | {}, sharded / last)
    with pytest.raises(UserError, match=f"lists {removed} in {last}, which does not have it"):
        read(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000])
def test_an_invalid_index_is_an_error_of_one_line(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError, match=r"index\.json") as raised:
        read(sharded)
    assert "\n" not in str(raised.value)
