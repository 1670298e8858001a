"""Types and helpers of the tests of exported models."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2.cli import main
from ds_gpt2.run_dir import exit_codes

TAG = "rolling_step_000012"

Exported = tuple[Path, Path]  # a run's folder, a Hugging Face directory exported from it


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run a command that must fail with a one-line error; return that line."""
    assert main([str(word) for word in words]) == exit_codes.MISTAKE
    *before, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and not [line for line in before if not line.endswith(" on cpu")]
    return error
