"""HellaSwag (Zellers et al. 2019): a context and four endings, one of them correct. Download, check and tokenize.

There are two text styles. ``original`` is that of build-nanogpt and llm.c: the context unchanged, a space before each
ending, context and ending tokenized separately. ``cleaned`` is that of lm-evaluation-harness 0.4.13 (its task
``hellaswag``): preceded by the activity, the second half of the context capitalized, WikiHow's markers in brackets
removed, context and ending tokenized together.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import re
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import read_small, regular_only, replace_file, sha256
from ds_gpt2.data import tokenizer
from ds_gpt2.data.items import Item
from ds_gpt2.data.shards import Tokens

FILE = "hellaswag_val.jsonl"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/master/data/{FILE}"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
ENDINGS = 4

TextStyle = Literal["original", "cleaned"]

_FORMAT = 1  # of the cache; to be increased when the text or the arrays change
_BLOCK_BYTES = 1 << 18
_TIMEOUT_SECONDS = 30.0  # without data from the server
_DOWNLOAD = "`./launch.sh prepare hellaswag` downloads it"
_FIX = "try again, or use a copy of the file: `./launch.sh prepare hellaswag --from FILE`"


@dataclass(frozen=True)
class Question:
    """One line of the file."""

    activity: str
    context: str
    context_first: str
    context_second: str
    endings: list[str]
    label: int  # index of the correct ending


def fetch(path: Path, url: str, digest: str) -> None:
    """Download a file to ``path``, which is replaced only if the sha256 of the whole file is ``digest``.

    Raises:
        UserError: the file cannot be downloaded or written, or its checksum differs.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as content:
            found = _download(url, content, path.stem)
            if found != digest:
                raise UserError(
                    f"checksum mismatch: {url} has sha256 {found[:12]}..., not {digest[:12]}..., perhaps because the"
                    f" download was cut short: {_FIX}"
                )
            content.seek(0)
            replace_file(path, content)
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{url} cannot be downloaded to {path.parent}: {reason}; {_FIX}") from None


def copy(source: Path, path: Path) -> None:
    """Copy a local HellaSwag file to ``path``, atomically, after checking each line.

    Raises:
        UserError: the file cannot be read or written, or a line is not a valid item.
    """
    for _ in read_questions(source):
        pass  # each line is checked
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb", opener=regular_only) as file:
            replace_file(path, file)
    except OSError as error:
        raise UserError(f"cannot copy {source} to {path.parent}: {error.strerror or error}") from None


def is_original(path: Path) -> bool:
    """Return whether ``path`` is, byte for byte, the file published by the authors of HellaSwag."""
    return path.is_file() and sha256(path) == SHA256


def load_items(path: Path, style: TextStyle, cache_dir: Path) -> list[Item]:
    """Return all items of the file, in its order.

    Tokens are cached in ``cache_dir`` under a name with the hash of the file and the style. A damaged cache is written
    again; if it cannot be written, there is none.

    Raises:
        UserError: the file does not exist, or a line is not a valid item.
    """
    try:
        content = hashlib.sha256(read_small(path)).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_DOWNLOAD}") from None
    cache = cache_dir / f"hellaswag_{style}_v{_FORMAT}_{content}.npz"
    items = _read_cache(cache)
    if items is None:
        items = [to_item(question, style) for question in read_questions(path)]
        _write_cache(cache, items)
    return items


def read_questions(path: Path) -> Iterator[Question]:
    """Yield the questions of the file; empty lines are skipped.

    Raises:
        UserError: the file cannot be read or has no question, or a line is not a valid item.
    """
    count = 0
    try:
        with open(path, "rb", opener=regular_only) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    count += 1
                    yield _question(line, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if count == 0:
        raise UserError(f"{path} is empty: {_DOWNLOAD}")


def to_item(question: Question, style: TextStyle) -> Item:
    """Tokenize a question; an empty context becomes <|endoftext|>."""
    encode = tokenizer.gpt2().encode_ordinary
    context, texts = prompt(question, style)
    if style == "original":
        start = encode(context)
        endings = [encode(f" {text}") for text in texts]
    else:
        # As in lm-evaluation-harness: trailing spaces of the context belong to the ending, and the ending's tokens are
        # those of the whole text after the context's.
        start = encode(context.rstrip())
        endings = [encode(f"{context} {text}")[len(start) :] for text in texts]
    return Item(
        context=np.array(start or [tokenizer.END_OF_TEXT], np.uint16),
        endings=[np.array(ending, np.uint16) for ending in endings],
        label=question.label,
        characters=np.array([len(text) for text in texts], np.int32),
        bytes=np.array([len(text.encode()) for text in texts], np.int32),
    )


def prompt(question: Question, style: TextStyle) -> tuple[str, list[str]]:
    """Return the text of the context and of the endings; a space joins context and ending."""
    if style == "original":
        return question.context, question.endings
    context = f"{question.activity}: {question.context_first} {question.context_second.capitalize()}"
    return _clean(context), [_clean(ending) for ending in question.endings]


def _clean(text: str) -> str:
    """Remove WikiHow's markers, step by step as lm-evaluation-harness does."""
    text = text.strip().replace(" [title]", ". ")
    last = text.rfind("]") + 1  # a search for brackets in the rest, which closes none, would take quadratic time
    return (re.sub(r"\[.*?\]", "", text[:last]) + text[last:]).replace("  ", " ")


def _question(line: bytes, where: str) -> Question:
    """Parse a line of the file.

    Raises:
        UserError: it is not a valid item; the message begins with ``where``.
    """
    try:
        fields: Any = safe_json.parse(line)
    except ValueError:
        raise UserError(f"{where}: not JSON; the file is damaged, {_DOWNLOAD} again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not an object with HellaSwag's fields")
    for name in ("activity_label", "ctx", "ctx_a", "ctx_b"):
        if not isinstance(fields.get(name), str):
            raise UserError(f'{where}: no text in "{name}"')
    endings, label = fields.get("endings"), fields.get("label")
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(_has_text(ending) for ending in endings):
        raise UserError(f'{where}: "endings" are not {ENDINGS} texts')
    if type(label) is not int or not 0 <= label < ENDINGS:
        raise UserError(f'{where}: "label" is not a number from 0 to {ENDINGS - 1}')
    return Question(fields["activity_label"], fields["ctx"], fields["ctx_a"], fields["ctx_b"], endings, label)


def _has_text(ending: object) -> bool:
    return isinstance(ending, str) and bool(_clean(ending)) and _is_utf8(ending)


def _is_utf8(text: str) -> bool:
    """Return whether ``text`` can be encoded; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _download(url: str, file: IO[bytes], title: str) -> str:
    """Download ``url`` to ``file``; return the sha256 of its content.

    Args:
        title: of the progress bar.
    """
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, desc=title, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def _write_cache(cache: Path, items: list[Item]) -> None:
    parts = [[item.context, *item.endings] for item in items]
    arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": np.concatenate([part for item in parts for part in item]),
        "lengths": np.array([[len(part) for part in item] for item in parts], np.int32),
        "labels": np.array([item.label for item in items], np.int32),
        "characters": np.stack([item.characters for item in items]),
        "bytes": np.stack([item.bytes for item in items]),
    }
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cache, content.getvalue())


def _read_cache(cache: Path) -> list[Item] | None:
    try:
        with np.load(cache, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return _unpack(**arrays)
    except Exception:  # a damaged zip archive can raise many types; the fix is the same
        return None


def _unpack(
    tokens: Tokens,
    lengths: npt.NDArray[np.int32],
    labels: npt.NDArray[np.int32],
    characters: npt.NDArray[np.int32],
    bytes: npt.NDArray[np.int32],
) -> list[Item]:
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    rows = [parts[start : start + 1 + ENDINGS] for start in range(0, len(parts), 1 + ENDINGS)]
    return [
        Item(context, endings, int(label), in_characters, in_bytes)
        for (context, *endings), label, in_characters, in_bytes in zip(rows, labels, characters, bytes, strict=True)
    ]
