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


def test_every_module_that_contributing_names_exists() -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## Where is") : text.index("## Rules")]
    named = [PROJECT / "ds_gpt2" / path for path in re.findall(r"`([a-z_/]+\.py)`", table)]
    named += [PROJECT / path for path in re.findall(r"`((?:ds_gpt2|tests)/[a-z_/]+\.py)`", text)]
    assert len(named) > 40
    assert [str(path) for path in named if not path.is_file()] == []
