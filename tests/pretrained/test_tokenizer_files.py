"""Tokenizer files: those of other tokenizers are errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pretrained_helpers import make

from ds_gpt2.common.errors import UserError
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.pretrained.load import read, shape_at
from ds_gpt2.pretrained.tokenizer_files import write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("vocab.json", {"der": 50_256}, r"vocab\.json: token 50,256 is 'der', GPT-2's is '<\|endoftext\|>'"),
        ("vocab.json", {"der": 7}, r"vocab\.json: token 7 is 'der', GPT-2's is '\('"),
        ("vocab.json", {"[PAD]": 50_257}, r"vocab\.json: token 50,257, '\[PAD\]', is not one of GPT-2's 50,257"),
        (
            "added_tokens.json",
            {"<x>": 50_303},
            r"added_tokens\.json: token 50,303, '<x>', is not one .*embeddings\(50257\)",
        ),
        ("added_tokens.json", {"<x>": "3"}, r"added_tokens\.json is not a JSON object of tokens and their integer ids"),
        ("tokenizer.json", {"der": 7}, r"tokenizer\.json: token 7 is 'der'"),
        ("tokenizer.json", b"{}", r"tokenizer\.json cannot be read: model\.vocab and added_tokens are not"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "LlamaTokenizer"},
            r"tokenizer_class is \"LlamaTokenizer\", GPT-2.s is",
        ),
        ("tokenizer_config.json", b"[]", r"tokenizer_config\.json is not a JSON object"),
    ],
)
def test_another_tokenizer_or_tokens_in_the_padding_are_errors(
    tmp_path: Path, name: str, edit: dict[str, Any] | bytes, message: str
) -> None:
    directory = make(tmp_path / "padded", 50_304)
    write_tokenizer(directory, 48)
    (directory / "added_tokens.json").write_text(json.dumps({"<outside>": 50_304}))  # the embedding has no such row
    read(directory)
    content = json.loads((directory / name).read_text())
    if isinstance(edit, bytes):
        (directory / name).write_bytes(edit)
    elif name == "tokenizer.json":
        content["model"]["vocab"] |= edit
        (directory / name).write_text(json.dumps(content))
    else:
        (directory / name).write_text(json.dumps(content | edit))
    for function in (read, shape_at):
        with pytest.raises(UserError, match=message):
            function(directory)


@pytest.mark.slow
def test_a_tokenizer_file_without_added_tokens_is_accepted(plain: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(plain, tmp_path / "copy"))
    write_tokenizer(directory, 48)
    content = json.loads((directory / "tokenizer.json").read_text())
    del content["added_tokens"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert shape_at(directory) == ModelShape(2, 4, 32, 48)
