"""Parse YAML without converting scalars: the type of a setting determines the meaning of its text.

YAML 1.1, which PyYAML implements, reads ``off`` as false, ``010`` as 8, ``2:30`` as 150 and ``1e-4`` as text
(https://yaml.org/type/). Duplicate keys, of which PyYAML silently uses the last, are errors here.
"""

from __future__ import annotations

from typing import Any

import yaml

from ds_gpt2.common.errors import UserError, one_line_reason


def parse(text: str, source: str) -> Any:
    """Return ``text`` as nested dicts and lists of strings.

    Args:
        source: the origin of the text, for error messages.

    Raises:
        UserError: invalid YAML, a duplicate key, or nesting that is too deep.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{source} is not valid YAML: {one_line_reason(error, 300)}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, set())
        if _expanded(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"its aliases expand to more than {_MAX_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {one_line_reason(error, 300)}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a date or number with an explicit YAML tag
        raise UserError(f"{source} is not valid YAML: {one_line_reason(error, 300)}") from None
    finally:
        loader.dispose()


def is_null(text: object) -> bool:
    """Return whether a scalar means "no value": empty, ``null`` or ``~``."""
    return text is None or (isinstance(text, str) and text in ("", "~", "null", "Null", "NULL"))


_MAX_VALUES = 100_000  # of a settings file, after the expansion of aliases


class _Loader(yaml.SafeLoader):
    """A safe loader that resolves no plain scalar except the merge key ``<<``."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's attribute
        "<": [entry for entry in yaml.SafeLoader.yaml_implicit_resolvers["<"] if entry[0].endswith(":merge")]
    }


def _check_keys(node: yaml.Node, visited: set[int]) -> None:
    """Check that keys are unique.

    Raises:
        YAMLError: a mapping in ``node`` has a duplicate key.
    """
    if id(node) in visited or not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        return
    visited.add(id(node))
    lines: dict[str, int] = {}
    for entry in node.value:
        key, value = entry if isinstance(node, yaml.MappingNode) else (None, entry)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value!r} appears twice, in lines {lines[key.value]} and {line}: remove one")
            lines[key.value] = line
        _check_keys(value, visited)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values in ``node`` after the expansion of aliases.

    Args:
        known: results by the id of a node, updated here.
    """
    if id(node) not in known:
        known[id(node)] = 1  # for a node that contains itself
        entries = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]
