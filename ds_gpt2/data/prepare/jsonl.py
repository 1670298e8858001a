"""Read documents from JSON lines: one object per line, with the text in one field."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.documents import Unreadable

_SAMPLE_LINES, _SAMPLE_CHARACTERS = 100, 4_000_000  # checked before anything is written
_MOST_FIELDS = 20  # listed in an error
_NAMES = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def jsonl_documents(path: Path, lines: Iterable[str], field: str) -> Iterator[str | Unreadable | None]:
    """Yield the text of each line; empty lines are skipped, null is None."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _document(line, field, f"{path}, line {number}")


def check_jsonl(path: Path, lines: Iterable[str], field: str) -> None:
    """Check the first lines of a file.

    Raises:
        UserError: the file is not JSON lines, or most of the objects do not have this field.
    """
    lines = iter(lines)
    first = next((line for line in lines if line.strip()), "")
    if _starts_array(first):
        raise _json_array(path)
    good, bad, characters = 0, [], 0
    sample = itertools.islice(jsonl_documents(path, itertools.chain([first], lines), field), _SAMPLE_LINES)
    for document in sample:
        if isinstance(document, Unreadable):
            bad.append(document)
        else:
            good += 1
            characters += len(document or "")
        if characters > _SAMPLE_CHARACTERS:
            break
    if len(bad) > good:
        raise UserError(bad[0].reason + _hint(path, first))


def _document(line: str, field: str, where: str) -> str | Unreadable | None:
    try:
        content = safe_json.parse(line.removeprefix("\ufeff"))  # the mark is inside a file if files were concatenated
    except ValueError as error:
        return Unreadable(f"{where}: not JSON ({error})")
    if not isinstance(content, dict):
        return Unreadable(f"{where}: not a JSON object but {_kind(content)}")
    if field not in content:
        return Unreadable(f'{where}: no field "{field}", {_fields(content)}')
    text = content[field]
    if text is None or isinstance(text, str):
        return text
    return Unreadable(f'{where}: field "{field}" is {_kind(text)}, not a string')


def _kind(value: object) -> str:
    return _NAMES.get(type(value), "null")


def _fields(content: dict[str, object]) -> str:
    if not content:
        return "the object is empty"
    more = f" and {len(content) - _MOST_FIELDS} more" if len(content) > _MOST_FIELDS else ""
    names = ", ".join(json.dumps(name[:80]) for name in itertools.islice(content, _MOST_FIELDS))
    return f"it has {names}{more}: give --column NAME"


def _starts_array(line: str) -> bool:
    """Return whether this is the first line of an array of objects."""
    return re.match(r"\s*\[\s*(\{|$)", line) is not None


def _json_array(path: Path) -> UserError:
    return UserError(
        f"{path} is one JSON array, not one object per line: convert it with `jq -c '.[]' '{path}' > corpus.jsonl`"
    )


def _hint(path: Path, first: str) -> str:
    """Return the end of an error message for objects printed over several lines."""
    if first.strip().startswith("{") and not first.rstrip().endswith("}"):
        return f"; if an object takes several lines, convert the file with `jq -c . '{path}' > corpus.jsonl`"
    return ""
