"""YAML whose scalars stay as they were typed: the type of a setting decides what its text means, not YAML.

YAML 1.1, which PyYAML implements, reads ``off`` as false, ``010`` as 8, ``2:30`` as 150 and ``1e-4`` as text
(https://yaml.org/type/). A duplicate key, of which PyYAML keeps the last, is an error here.
"""

from __future__ import annotations

from typing import Any

import yaml

from ds_gpt2.errors import UserError


def parse(text: str, source: str) -> Any:
    """Return ``text`` as nested dicts and lists of strings.

    Args:
        source: where the text comes from, for error messages.

    Raises:
        UserError: invalid YAML, a duplicate key, or nesting that is too deep.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {_one_line(error)}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a date or number with an explicit YAML tag
        raise UserError(f"{source} is not valid YAML: {_one_line(error)}") from None


def is_null(text: object) -> bool:
    """Whether a scalar means "no value": nothing at all, ``null`` or ``~``."""
    return text is None or (isinstance(text, str) and text in ("", "~", "null", "Null", "NULL"))


class _Loader(yaml.SafeLoader):
    """A safe loader that resolves no plain scalar but the merge key ``<<``."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's attribute
        "<": [entry for entry in yaml.SafeLoader.yaml_implicit_resolvers["<"] if entry[0].endswith(":merge")]
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in seen:
                    problem = f"{key.value!r} appears twice, in lines {seen[key.value]} and {line}: remove one"
                    raise yaml.constructor.ConstructorError(None, None, problem)
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
