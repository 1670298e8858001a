"""HellaSwag (Zellers et al. 2019): a context and four endings, one of them right. From the file to tokens.

There are two ways to make text of an item. ``original`` is that of build-nanogpt and llm.c: the context as it
stands, a space before each ending, context and ending tokenised on their own. ``cleaned`` is that of
lm-evaluation-harness 0.4.13 (its task ``hellaswag``): the activity in front, the second half of the context
capitalised, WikiHow's marks in brackets taken out, context and ending tokenised in one piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import no_links, read_small, regular_only
from ds_gpt2.data import tokenizer
from ds_gpt2.data.shards import Tokens, sha256

FILE = "hellaswag_val.jsonl"
URL = f"https://raw.githubusercontent.com/rowanz/hellaswag/master/data/{FILE}"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
ENDINGS = 4

TextStyle = Literal["original", "cleaned"]

_FORMAT = 1  # of the cache: whoever changes the text or the arrays takes the next number
_BLOCK = 1 << 18  # bytes read at a time
_PATIENCE = 30.0  # seconds that a server may be silent
_FIX = "try again, or get the file elsewhere: `./launch.sh prepare hellaswag --from FILE`"


@dataclass(frozen=True)
class Question:
    """One line of the file."""

    activity: str
    context: str
    context_first: str
    context_second: str
    endings: list[str]
    label: int  # which ending is right


@dataclass(frozen=True)
class Item:
    """A question in tokens, and how long its endings are as text, without the space before them."""

    context: Tokens
    endings: list[Tokens]
    label: int
    characters: npt.NDArray[np.int32]  # (4,)
    bytes: npt.NDArray[np.int32]  # (4,), of UTF-8


def fetch(path: Path, url: str, digest: str) -> None:
    """Download a file to ``path``, which appears only when it is whole and its sha256 is ``digest``.

    Raises:
        UserError: it cannot be downloaded or written, or is not the file expected.
    """
    try:
        with _replacing(path) as partial:
            found = _download(url, partial)
            if found != digest:
                raise UserError(
                    f"{url} gave another file than expected (sha256 {found[:12]}..., not {digest[:12]}...), perhaps"
                    f" cut short: {_FIX}"
                )
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{url} cannot be downloaded to {path.parent}: {reason}; {_FIX}") from None


def copy(source: Path, path: Path) -> None:
    """Put a file that one has to ``path``, if it is HellaSwag's: whole, or not at all.

    Raises:
        UserError: it cannot be read or written, or a line is no item.
    """
    for _ in read_questions(source):
        pass  # each line is checked
    try:
        with _replacing(path) as partial:
            shutil.copyfile(source, partial)
    except OSError as error:
        raise UserError(f"cannot copy {source} to {path.parent}: {error.strerror or error}") from None


def is_original(path: Path) -> bool:
    """Whether ``path`` is, byte for byte, the file that the authors of HellaSwag published."""
    return path.is_file() and sha256(path) == SHA256


def load_items(path: Path, style: TextStyle, cache_dir: Path) -> list[Item]:
    """All items of the file, in its order.

    Tokens are kept in ``cache_dir`` under a name that tells the file's content and the style; a cache that is
    damaged is made again, one that cannot be written is done without.

    Raises:
        UserError: no such file, or a line that is no item.
    """
    try:
        content = hashlib.sha256(read_small(path)).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): `prepare hellaswag` downloads it") from None
    cache = cache_dir / f"hellaswag_{style}_v{_FORMAT}_{content}.npz"
    items = _read_cache(cache)
    if items is None:
        items = [to_item(question, style) for question in read_questions(path)]
        _write_cache(cache, items)
    return items


def read_questions(path: Path) -> Iterator[Question]:
    """The file's lines; empty ones do not count.

    Raises:
        UserError: the file cannot be read or is empty, or a line is no item.
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
        raise UserError(f"{path} is empty: `prepare hellaswag` downloads it")


def to_item(question: Question, style: TextStyle) -> Item:
    """Tokenise a question; a context without any text becomes <|endoftext|>."""
    encode = tokenizer.gpt2().encode_ordinary
    context, texts = prompt(question, style)
    if style == "original":
        start = encode(context)
        endings = [encode(f" {text}") for text in texts]
    else:
        # As the harness pairs them: spaces at the context's end go over to the ending; what the whole has beyond the
        # context's tokens is the ending.
        bare = context.rstrip()
        start = encode(bare)
        endings = [encode(f"{context} {text}")[len(start) :] for text in texts]
    return Item(
        context=np.array(start or [tokenizer.END_OF_TEXT], np.uint16),
        endings=[np.array(ending, np.uint16) for ending in endings],
        label=question.label,
        characters=np.array([len(text) for text in texts], np.int32),
        bytes=np.array([len(text.encode()) for text in texts], np.int32),
    )


def prompt(question: Question, style: TextStyle) -> tuple[str, list[str]]:
    """Context and endings as text; context and ending are joined by a space."""
    if style == "original":
        return question.context, question.endings
    context = f"{question.activity}: {question.context_first} {question.context_second.capitalize()}"
    return _clean(context), [_clean(ending) for ending in question.endings]


def _clean(text: str) -> str:
    """Without the marks of WikiHow's pages, step for step as the harness does it."""
    text = text.strip().replace(" [title]", ". ")
    last = text.rfind("]") + 1  # what comes after it closes no bracket, and a search there takes quadratic time
    return (re.sub(r"\[.*?\]", "", text[:last]) + text[last:]).replace("  ", " ")


def _question(line: bytes, place: str) -> Question:
    try:
        fields: Any = safe_json.parse(line)
    except ValueError:
        raise UserError(f"{place}: not JSON; the file is damaged, `prepare hellaswag` downloads it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{place}: not an object with HellaSwag's fields")
    for name in ("activity_label", "ctx", "ctx_a", "ctx_b"):
        if not isinstance(fields.get(name), str):
            raise UserError(f'{place}: no text in "{name}"')
    endings, label = fields.get("endings"), fields.get("label")
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(_has_text(ending) for ending in endings):
        raise UserError(f'{place}: "endings" are not {ENDINGS} texts')
    if type(label) is not int or not 0 <= label < ENDINGS:
        raise UserError(f'{place}: "label" is not a number from 0 to {ENDINGS - 1}')
    return Question(fields["activity_label"], fields["ctx"], fields["ctx_a"], fields["ctx_b"], endings, label)


def _has_text(ending: object) -> bool:
    return isinstance(ending, str) and bool(_clean(ending)) and _is_utf8(ending)


def _is_utf8(text: str) -> bool:
    """Half of a surrogate pair is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _download(url: str, partial: Path) -> str:
    """Returns the sha256 of what came."""
    hashed = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_PATIENCE) as response, partial.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, desc=partial.stem, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            while block := response.read(_BLOCK):
                file.write(block)
                hashed.update(block)
                bar.update(len(block))
    return hashed.hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to, beside ``path``; what was written takes the place of ``path`` if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_cache(cache: Path, items: list[Item]) -> None:
    parts = [[item.context, *item.endings] for item in items]
    arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": np.concatenate([part for item in parts for part in item]),
        "lengths": np.array([[len(part) for part in item] for item in parts], np.int32),
        "labels": np.array([item.label for item in items], np.int32),
        "characters": np.stack([item.characters for item in items]),
        "bytes": np.stack([item.bytes for item in items]),
    }
    with contextlib.suppress(OSError), _replacing(cache) as partial, open(partial, "wb", opener=no_links) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _read_cache(cache: Path) -> list[Item] | None:
    try:
        with np.load(cache, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return _unpack(**arrays)
    except Exception:  # zip archives fail in many ways, and all have one fix
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
