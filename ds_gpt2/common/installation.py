"""What must be equal on all machines of a run: Python, the libraries, and the code of this package."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from ds_gpt2 import __version__
from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError, reason_of

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("torch", "deepspeed", "numpy", "pydantic", "tiktoken", "tensorboard")


def describe() -> dict[str, str]:
    """Return the versions and a hash of the code, by name.

    Raises:
        UserError: a module of the package cannot be read.
    """
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {
        "Python": platform.python_version(),
        "ds_gpt2": __version__,
        **versions,
        "the code of ds_gpt2": code_fingerprint(),
    }


def differences(one: str, first: Mapping[str, str], other: str, second: Mapping[str, str]) -> list[str]:
    """Return what differs between two machines.

    Args:
        one, other: their names.
        first, second: what must be equal, by name.
    """
    return [
        f"{what}: {first.get(what, 'missing')} on {one}, {second.get(what, 'missing')} on {other}"
        for what in {**first, **second}
        if first.get(what) != second.get(what)
    ]


def code_fingerprint() -> str:
    """Return a hash of the package's modules.

    Raises:
        UserError: a module cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(_PACKAGE.rglob("*.py")):
            digest.update(f"{file.relative_to(_PACKAGE)} {files.sha256(file)}\n".encode())
    except OSError as error:
        raise UserError(f"the code in {_PACKAGE} cannot be read: {reason_of(error)}") from None
    return digest.hexdigest()[:12]
