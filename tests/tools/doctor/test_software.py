"""Checks of packages and of the compiler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ds_gpt2.tools.doctor import software


def test_a_compiler_is_required_only_if_the_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert [software.compiler(setting, "cpu").status for setting in ("auto", False, True)] == ["ok", "ok", "fail"]
    assert "no C++ compiler (no-such-compiler)" in software.compiler(True, "cpu").found
    monkeypatch.setenv("CXX", sys.executable)
    assert software.compiler(True, "cpu").status == "ok"


def test_package_versions_are_checked_against_pyproject(tmp_path: Path) -> None:
    assert [row.status for row in software.versions()] == ["ok"]
    assert software.tensorboard().status == "ok"
    ranges = 'requires-python = ">=3.99"\ndependencies = [\n  "torch>=99",\n  "no-such-package>=1",\n  "numpy",\n]\n'
    (tmp_path / "pyproject.toml").write_text(ranges)
    rows = software.versions(tmp_path / "pyproject.toml")
    assert [(row.name, row.status) for row in rows] == [
        ("Python", "fail"),
        ("torch", "warn"),
        ("no-such-package", "fail"),
    ]
