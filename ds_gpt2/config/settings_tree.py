"""Settings before they are checked: nested dicts of sections, whose leaves are the text of the file or command line.

``settings.load_settings`` builds one tree from the file and the overrides, and validates it into ``Settings``.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel

from ds_gpt2.common import strict_yaml
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only
from ds_gpt2.common.paths import absolute, expanded
from ds_gpt2.config.model_names import resolve

_MAX_FILE_BYTES = 1_000_000
_EXAMPLE = "give a YAML file such as those in ds_configs/"
_SHAPE = ("layers", "heads", "width")
# A setting in an override removes the settings that it excludes from the file.
_EXCLUDED = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "decay_steps": ("decay_fraction",),
    "decay_fraction": ("decay_steps",),
    "dir": ("mixture", "stages"),
    "mixture": ("dir",),
    "preset": _SHAPE,
    **dict.fromkeys(_SHAPE, ("preset",)),
}


def read_tree(path: Path, fix: str | None = None) -> dict[str, Any]:
    """Return the sections of a settings file as nested dicts whose leaves are text.

    Args:
        fix: the fix that errors suggest for a damaged or missing file; None: advice for a file that the user has given.

    Raises:
        UserError: the file does not exist or is not a settings file.
    """
    try:
        with open(path, "rb", opener=regular_only) as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES or b"\0" in content:
            raise UserError(f"{path} is not a settings file: {fix or _EXAMPLE}")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"config not found: {path}; {fix or 'examples are in ds_configs/'}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 (byte {error.start}): {fix or 'save it as UTF-8'}") from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    try:
        tree = strict_yaml.parse(text, str(path))
    except UserError as error:
        raise UserError(f"{error}; {fix}" if fix else str(error)) from None
    if not isinstance(tree, dict):
        empty = "is empty and " if tree is None else ""
        raise UserError(f"{path} {empty}must be a mapping of sections (run:, model:, data:, ...): {fix or _EXAMPLE}")
    return tree


def parse_override(settings: type[BaseModel], key: str, text: str) -> Any:
    """Return the value in an override ``key=text``.

    Text for a name, a path or a command is taken literally. Lists and quoted text are parsed as YAML.

    Raises:
        UserError: the text is not valid YAML.
    """
    if _is_plain_text(_annotation(settings, key)) and text[:1] not in ("'", '"'):
        return text
    return strict_yaml.parse(text, f"{key}={text[:100]}: the value")


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the setting ``key``, a dotted name, in ``tree``; missing sections are created.

    Raises:
        UserError: a section on the path is already set to a value.
    """
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {section} is already set to a value; remove one of the two")
    tree[name] = value


def section_of(tree: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return the section of ``tree`` that holds the setting ``dotted``, and the last part of its name.

    The section is {} if the tree does not have it.
    """
    found, name = sections_of(tree, dotted)
    return (found[0] if found else {}), name


def sections_of(tree: dict[str, Any], dotted: str) -> tuple[list[dict[str, Any]], str]:
    """Return the sections of ``tree`` that hold the setting ``dotted``, and the last part of its name.

    Args:
        dotted: ``*`` in it stands for every entry of a list or mapping.
    """
    *sections, name = dotted.split(".")
    nodes: list[Any] = [tree]
    for section in sections:
        if section == "*":
            nodes = [entry for node in nodes for entry in _entries(node)]
        else:
            nodes = [node.get(section) for node in nodes if isinstance(node, dict)]
    return [node for node in nodes if isinstance(node, dict)], name


def by_name(tree: dict[str, Any], dotted: str) -> list[str]:
    """Return ``dotted``, or one setting for each name if its ``*`` stands for the entries of a mapping of ``tree``."""
    section, star, name = dotted.partition(".*.")
    node = tree.get(section) if star else None
    return [f"{section}.{each}.{name}" for each in node] if isinstance(node, dict) else [dotted]


def _entries(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def set_default(tree: dict[str, Any], section: str, name: str, value: Path | str) -> None:
    """Set a setting unless it is set; a section that is not a mapping is unchanged: the validation rejects it."""
    node = tree.setdefault(section, {})
    if isinstance(node, dict):
        node.setdefault(name, str(value))


def without_nulls(section: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``tree`` with None for each null that its setting allows, and {} for each empty section."""
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    result = dict(tree)
    for key, value in tree.items():
        if key not in fields:
            continue
        inner: Any = fields[key].annotation
        if is_section(inner):
            value = {} if strict_yaml.is_null(value) else value
            result[key] = without_nulls(inner, value) if isinstance(value, dict) else value
        elif isinstance(value, list) and is_section(entry := next(iter(get_args(inner)), None)):
            result[key] = [without_nulls(entry, each) if isinstance(each, dict) else each for each in value]
        elif (named := _section_by_name(inner)) is not None:
            entries = {} if strict_yaml.is_null(value) else value
            result[key] = _without_nulls_by_name(named, entries) if isinstance(entries, dict) else entries
        elif strict_yaml.is_null(value) and type(None) in get_args(inner):
            result[key] = None
    return result


def _without_nulls_by_name(section: type[BaseModel], entries: dict[str, Any]) -> dict[str, Any]:
    return {name: without_nulls(section, each) if isinstance(each, dict) else each for name, each in entries.items()}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with ``over``, section by section.

    Settings of ``base`` that exclude a setting of ``over`` are removed: see ``_EXCLUDED``.
    """
    result = dict(base)
    for key, value in over.items():
        both_sections = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(_without_excluded(result[key], value), value) if both_sections else value
    return result


def make_absolute(tree: dict[str, Any], keys: tuple[str, ...], base: Path, expand: bool = True) -> None:
    """Make the paths in ``tree`` absolute and remove ``..``, in place; URLs and names on the hub are unchanged.

    Args:
        keys: the dotted settings that are paths.
        base: the directory that relative paths are relative to.
        expand: expand ``~`` and ``$VARIABLE`` first.

    Raises:
        UserError: an empty path, or a variable that is not set.
    """
    for key in keys:
        sections, name = sections_of(tree, key)
        for section in sections:
            if isinstance(text := section.get(name), str):
                section[name] = _absolute(key, expanded(key, text) if expand else text, base)


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether the type of a field is a section of settings."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_by_name(annotation: Any) -> type[BaseModel] | None:
    """Return the type of the values of a mapping from names to sections; None for another type."""
    arguments = get_args(annotation)
    if get_origin(annotation) is not dict or len(arguments) != 2 or not is_section(arguments[1]):
        return None
    return arguments[1]


def _annotation(settings: type[BaseModel], key: str) -> Any:
    """Return the type of the setting ``key``; None if there is no such setting."""
    found: Any = settings
    for name in key.split("."):
        if (by_name := _section_by_name(found)) is not None:
            found = by_name
            continue
        if not is_section(found):
            return None
        fields = {field.alias or own: field for own, field in found.model_fields.items()}
        found = fields[name].annotation if name in fields else None
    return found


def _is_plain_text(annotation: Any) -> bool:
    """Return whether a setting of this type is text or a path, possibly None."""
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return {str, Path} >= set(alternatives) - {type(None)}


def _without_excluded(section: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    excluded = {other for key, value in over.items() if value is not None for other in _EXCLUDED.get(key, ())}
    return {key: value for key, value in section.items() if key not in excluded or key in over}


def _absolute(key: str, text: str, base: Path) -> str:
    if "://" in text:
        return text
    if not text or "\0" in text:
        raise UserError(f"{key.replace('.*', '')} is an empty path or not a path: give a path")
    return resolve(text, base) if key == "model.init_from" else str(absolute(text, base))
