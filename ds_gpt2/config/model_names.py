"""Names of models outside of runs: a path, or a model on the Hugging Face hub.

A name that exists as a path is a path. Otherwise ``owner/name`` and OpenAI's short names (``gpt2``) are models on the
hub, each with an optional ``@revision`` (a branch, a tag or a commit). Every other name is a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.paths import absolute

# The hub's only GPT-2 models without an owner in their name; the hub redirects them to openai-community and distilbert.
_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ON_HUB = re.compile(
    rf"(?P<repository>(?P<owner>{_PART}/)?{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,99}}))?"
)
_FILES = (".pt", ".pth", ".bin", ".safetensors", ".json")


@dataclass(frozen=True)
class HubName:
    """A model on the hub, at one revision."""

    repository: str
    revision: str


def resolve(name: str, base: Path) -> str:
    """Return ``name`` unchanged if it names a model on the hub, otherwise as an absolute path.

    Args:
        base: the directory that a relative path is relative to.
    """
    if hub_name(name) is not None and not (base / name).exists():
        return name
    return str(absolute(name, base))


def hub_name(resolved: str) -> HubName | None:
    """Return the model on the hub that a name from ``resolve`` denotes, or None if it is a path."""
    found = _ON_HUB.fullmatch(resolved)
    if found is None or resolved.endswith(_FILES):
        return None
    repository = found["repository"]
    if found["owner"] is None and repository not in _WITHOUT_OWNER:
        return None
    if ".." in resolved or "--" in repository:  # neither is allowed in a name on the hub
        return None
    return HubName(repository, found["revision"] or "main")
