"""pyproject.toml declares the packages that the code imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import pytest
from launched import PROJECT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# If one is missing, its import reports what to install, or the feature is left out.
OPTIONAL = {"pyarrow", "zstandard", "gigatoken", "apprise", "wandb", "comet_ml"}
EXTRAS = ("data", "alerts", "trackers")


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", each)[0].lower().replace("-", "_") for each in requirements}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the top-level packages that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def packages_of(paths: list[Path]) -> set[str]:
    """Return the names on the package index of the packages that the files import."""
    distributions = metadata.packages_distributions()
    modules = {name for path in paths for name in imports_of(path)}
    foreign = modules - sys.stdlib_module_names - {"ds_gpt2"}
    return {distributions.get(name, [name])[0].lower().replace("-", "_") for name in foreign}


def test_a_base_installation_has_all_imports_of_the_code() -> None:
    found = packages_of(sorted((PROJECT / "ds_gpt2").rglob("*.py")))
    assert found - OPTIONAL <= names_of(DECLARED["dependencies"])
    assert found >= OPTIONAL
    extras = set().union(*(names_of(DECLARED["optional-dependencies"][extra]) for extra in EXTRAS))
    assert extras == OPTIONAL


def test_a_base_installation_has_all_imports_of_zero_to_fp32() -> None:
    specification = util.find_spec("deepspeed")
    assert specification is not None and specification.origin is not None
    script = Path(specification.origin).parent / "utils" / "zero_to_fp32.py"
    found = packages_of([script])
    assert found <= names_of(DECLARED["dependencies"])
    assert {"torch", "deepspeed", "huggingface_hub"} <= found


@pytest.mark.parametrize("package", sorted(names_of(DECLARED["dependencies"])))
def test_the_tested_version_of_each_dependency_is_pinned(package: str) -> None:
    pinned = (PROJECT / "ds_gpt2" / "assets" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert package in names_of([line for line in pinned if "==" in line])
