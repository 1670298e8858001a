"""Where documents come from: files in a person's hands, or the text that every Python installation has."""

from __future__ import annotations

import gzip
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from ds_gpt2.errors import UserError

_TEXT = (".txt", ".md", ".rst")
_ENDINGS = (*_TEXT, ".jsonl", *(ending + ".gz" for ending in (*_TEXT, ".jsonl")))


def find_text_files(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and below each directory every file with an ending known as text, sorted.

    Raises:
        UserError: a path that does not exist, or nothing found.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(child for child in path.rglob("*") if child.is_file() and child.name.endswith(_ENDINGS))
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"no such text file or directory: {path}")
    if not files:
        raise UserError(f"no text found: directories are searched for {', '.join(_ENDINGS)}")
    return files


def text_documents(files: Iterable[Path]) -> Iterator[str]:
    """One document per text file, one per line of a .jsonl file (its ``text`` field); .gz is unpacked.

    Bytes that are no UTF-8 become U+FFFD, as they do in web corpora.

    Raises:
        UserError: a file that cannot be read, or a .jsonl line without text.
    """
    for path in files:
        try:
            with _open_text(path) as file:
                yield from _jsonl_documents(path, file) if ".jsonl" in path.suffixes else [file.read()]
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def python_documents() -> Iterator[str]:
    """The reference pages of Python's ``help()`` and the sources of its standard library, tests left out.

    Indentation is narrowed to one space a level: GPT-2 has no tokens for runs of spaces, and a small model would
    learn little else.
    """
    from pydoc_data import topics

    yield from topics.topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        if not left_out.intersection(path.relative_to(library).parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            yield re.sub("^ +", lambda indent: " " * ((len(indent[0]) + 3) // 4), source, flags=re.MULTILINE)


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace")


def _jsonl_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: not a JSON object with a string field "text"')
        yield text
