"""Settings, users and damaged files for the tests of the doctor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launched import PROJECT

from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.data.shards import HEADER_BYTES

UNPRIVILEGED_USER = 65_534


def changed(settings: Settings, **sections: dict[str, Any]) -> Settings:
    """Return ``settings`` with some values of some sections replaced, without validation."""
    parts = {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    return settings.model_copy(update=parts)


def preset(name: str, **overrides: object) -> Settings:
    """Return the settings of a file in ``ds_configs/`` with ``overrides``; ``__`` stands for a dot."""
    texts = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return load_settings(PROJECT / "ds_configs" / f"{name}.yaml", texts)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as an unprivileged user if the tests run as root, who may write anywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(UNPRIVILEGED_USER)
    try:
        yield
    finally:
        os.seteuid(before)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[HEADER_BYTES + 1000] ^= 1
    file.write_bytes(content)
