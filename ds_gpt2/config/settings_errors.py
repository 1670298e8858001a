"""Errors in settings as one line each: which setting, where it was set, what is wrong, and a hint."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_gpt2.common.formatting import uncapitalized

_MAY_BE_SECRET = frozenset({"checkpoint.backup.to", "alerts.command"})  # values that errors must not show
_BY_NAME = frozenset({"evaluations"})  # settings that are mappings from names to sections
# By pydantic's error types, for those whose own message is in terms of Python; fields are those of the error's context.
_PLAIN_MESSAGES = {
    "tuple_type": "must be a list, such as [0.9, 0.95] or [first, second]",
    "dict_type": "must be a mapping of names to sections, such as {{arc_easy: {{every: 1000}}}}",
    "model_type": "must be a section of settings, not a value",
    "string_type": "must be one text",
    "path_type": "must be one path",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "too_short": "has too few entries: at least {min_length} must be given",
    "greater_than_equal": "must be at least {ge:g}",
}


def explain(
    error: ValidationError,
    path: Path,
    overrides: Mapping[str, str],
    keys: Sequence[str],
    sections: Sequence[str],
    hints: Mapping[str, str],
) -> str:
    """Return one line that explains all findings of a failed validation.

    Args:
        path: the settings file.
        overrides: the overrides from the command line.
        keys: every dotted setting.
        sections: the names of the sections.
        hints: setting -> what to add to an error in it.
    """
    findings = [(dict(item), _setting_at(item["loc"], keys)) for item in error.errors()]
    sources = dict.fromkeys(_source(item, key, path, overrides) for item, key in findings)
    messages = dict.fromkeys(_message(item, key, [*keys, *sections]) + hints.get(key, "") for item, key in findings)
    return f"{' and '.join(sources)}: {'; '.join(messages)}"


def _source(item: dict[str, Any], key: str, path: Path, overrides: Mapping[str, str]) -> str:
    """Return where the setting ``key`` was set: in the file, on the command line, or in both."""
    whole = key.partition("[")[0]  # a value in a list is set with the list
    if whole in overrides:
        return "command line"
    given = [name for name in overrides if name == key or name.startswith(f"{key}.")]
    if not given:
        return str(path)
    if item["type"] == "extra_forbidden":
        return "command line"
    return f"{path} and command line"


def _message(item: dict[str, Any], key: str, names: Sequence[str]) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown_setting(key, names)
    if item["type"] == "missing":
        too_short = isinstance(item["loc"][-1], int)
        return f"{key} has too few values" if too_short else f"{key} is not set"
    message = item["msg"].removeprefix("Value error, ")
    complete = (key, "give ", "model.", "schedule.", "data.")  # beginnings of messages that name the setting
    if item["type"] == "value_error" and message.startswith(complete):
        return message
    if (plain := _PLAIN_MESSAGES.get(item["type"])) is not None:
        message = plain.format(**item.get("ctx", {}))
    value = "" if key in _MAY_BE_SECRET else f"={_shown(item['input'])}"
    return f"{key}{value}: {message if item['type'] == 'value_error' else uncapitalized(message)}"


def _unknown_setting(key: str, names: Sequence[str]) -> str:
    if key.startswith("evaluations."):
        return f"unknown setting {key}: an evaluation has every, path and items"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "docs/settings.md lists all settings"
    if near and near[0] == key:
        section, _, name = key.partition(".")
        hint = f"in a file it is `{name}` below `{section}:`"
    return f"unknown setting {key}: {hint}"


def _shown(value: object) -> str:
    if isinstance(value, str) and value.isprintable() and 0 < len(value) < 100:
        return value
    return reprlib.repr(value)


def _setting_at(location: tuple[int | str, ...], keys: Sequence[str]) -> str:
    """Return the dotted setting at an error's location, without the type names that pydantic appends for a union."""
    parts = [str(part) for part in location if isinstance(part, str)]
    for known in keys:
        names = known.split(".")
        if parts[: len(names)] == names:
            if known in _BY_NAME and len(location) > 1:
                return ".".join([known, *parts[1 : 2 if len(location) == 2 else 3]])
            return known + _entry(location[len(names) :])
    return ".".join(str(part) for part in location)


def _entry(rest: tuple[int | str, ...]) -> str:
    """Return the part of a location below a setting that is a list of sections, such as ``[1].weight``."""
    if len(rest) < 2 or not isinstance(rest[0], int):
        return ""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
