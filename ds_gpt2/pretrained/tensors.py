"""Read the tensors of a Hugging Face directory: one safetensors file, or several with an index.

Headers are checked before any tensor is read. Only safetensors files are read, because other formats can run code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, one_line_reason, reason_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = ("F64", "F32", "F16", "BF16")  # accepted dtypes, by safetensors' names
_LARGEST_INDEX = 50_000_000  # bytes; an index of 100,000 tensors has about 10 MB


@dataclass(frozen=True)
class Stored:
    """A tensor as described by the header of its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def has_weights(directory: Path) -> bool:
    """Return whether ``directory`` has safetensors weights."""
    return (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()


def headers(directory: Path) -> dict[str, Stored]:
    """Return every tensor of the directory by its name in the files.

    Raises:
        UserError: files are missing or damaged, or contradict each other.
    """
    if (directory / WEIGHTS).is_file():
        return _header(directory / WEIGHTS)
    if (directory / INDEX).is_file():
        return _headers_of_index(directory / INDEX)
    try:
        others = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".safetensors", ".pt"))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None
    raise UserError(
        f"{directory} has no {WEIGHTS} and no {INDEX} (it has {', '.join(others) or 'no weights'}): save the model"
        " again with transformers' save_pretrained"
    )


def printable(name: str) -> str:
    """Return a tensor's name, which may have any characters, for an error message of one line."""
    return name if name.isprintable() and len(name) <= 100 else ascii(name)[:100]


def check_dtype(name: str, stored: Stored) -> None:
    """Check the dtype of a tensor.

    Raises:
        UserError: it is not a floating-point dtype that is accepted for weights.
    """
    if stored.dtype not in _DTYPES:
        raise UserError(
            f"{stored.file}: {printable(name)} is of dtype {stored.dtype}; supported are {', '.join(_DTYPES)}"
        )


def read(stored: dict[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and content of every tensor in ``stored``, file by file.

    Raises:
        UserError: a file cannot be read.
    """
    by_file: dict[Path, list[str]] = {}
    for name, each in stored.items():
        by_file.setdefault(each.file, []).append(name)
    for file, names in by_file.items():
        with _opened(file) as opened:
            for name in names:
                yield name, opened.get_tensor(name)


def index_files(index: Path) -> list[str]:
    """Return the names of the files in an index, sorted.

    Raises:
        UserError: it cannot be read, or lists a file outside its directory.
    """
    return sorted(set(_weight_map(index).values()))


def _headers_of_index(index: Path) -> dict[str, Stored]:
    listed = _weight_map(index)
    found: dict[str, Stored] = {}
    for name in index_files(index):
        file = index.with_name(name)
        if not file.is_file():
            raise UserError(
                f"{index} lists {name}, which does not exist: the download or copy is incomplete, repeat it"
            )
        for tensor, stored in _header(file).items():
            if tensor in found:
                raise UserError(
                    f"{printable(tensor)} is in {found[tensor].file.name} and in {name}: {index.parent} is damaged,"
                    " download the model again"
                )
            if listed.get(tensor) != name:
                raise UserError(
                    f"{file} has {printable(tensor)}, which {index.name} does not list for this file: download the"
                    " model again"
                )
            found[tensor] = stored
    if absent := sorted(listed.keys() - found.keys()):
        raise UserError(
            f"{index} lists {printable(absent[0])} in {listed[absent[0]]}, which does not have it: download the model"
            " again"
        )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise UserError(
                f"{index} is larger than {_LARGEST_INDEX:,} bytes, so it is not the index of a GPT-2 model: download"
                " the model again, or give another one"
            )
        content = safe_json.read(index)
    except (OSError, ValueError) as error:
        raise UserError(f"{index} cannot be read: {reason_of(error)}") from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} does not have a weight_map with the file of each tensor: download the model again")
    for tensor, name in listed.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise UserError(
                f"{index} lists {ascii(name)[:100]} for {printable(tensor)}: only safetensors files in its directory"
                " are read"
            )
    return listed


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:") and name[0] != "."


def _header(file: Path) -> dict[str, Stored]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a dictionary)
        return {name: Stored(file, each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {one_line_reason(error, 300)}") from None
