"""The tools that read the code: a finding is a failure."""

import re
import subprocess
import sys

import pytest
from launched import PROJECT


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    ],
    ids=["ruff check", "ruff format", "mypy", "lint-imports"],
)
def test_the_tool_finds_nothing(command: list[str]) -> None:
    result = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


CONTRIBUTING = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TABLE = CONTRIBUTING[CONTRIBUTING.index("## Where is") : CONTRIBUTING.index("## Rules")]


def test_every_file_that_contributing_names_exists() -> None:
    named = [PROJECT / "ds_gpt2" / path for path in re.findall(r"`([a-z0-9_/]+\.py)`", TABLE)]
    named += [PROJECT / path for path in re.findall(r"`((?:ds_gpt2|tests|docs)/[a-z0-9_/]+\.(?:py|md))`", CONTRIBUTING)]
    named += [PROJECT / path for path in re.findall(r"`((?:ds_gpt2|tests)/(?:[a-z_]+/)*)`", CONTRIBUTING)]
    assert len(named) > 60
    assert [str(path) for path in named if not path.exists()] == []


def test_every_row_of_the_map_exists_and_every_folder_has_a_row() -> None:
    folders = set(re.findall(r"^    ([a-z_/]+/) ", CONTRIBUTING, re.MULTILINE))
    package = PROJECT / "ds_gpt2"
    top = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert [folder for folder in folders if not (package / folder).is_dir()] == []
    assert top - folders == set()


def test_every_name_that_the_table_gives_occurs_in_its_file() -> None:
    rows = [
        (path, re.findall(r"`(\w+)`", names)) for path, names in re.findall(r"`([a-z0-9_/]+\.py)` \(([^)]*)\)", TABLE)
    ]
    missing = [
        f"{path}: {name}"
        for path, names in rows
        for name in names
        if name not in (PROJECT / "ds_gpt2" / path).read_text(encoding="utf-8")
    ]
    assert len(rows) > 8
    assert missing == []
