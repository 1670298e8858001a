"""``prepare``: what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gpt2 import cli
from ds_gpt2.data import hellaswag
from ds_gpt2.run_dir import exit_codes


@pytest.fixture(autouse=True)
def _no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "missing").as_uri())


def test_a_failed_download_of_hellaswag_leaves_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "hellaswag"
    assert cli.main(["prepare", "hellaswag", "--out", str(out)]) == exit_codes.MISTAKE
    assert "cannot be downloaded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_of_hellaswag_leaves_existing_directories(tmp_path: Path) -> None:
    for out in (tmp_path / "data", tmp_path / "data" / "hellaswag"):
        out.mkdir()
        assert cli.main(["prepare", "hellaswag", "--out", str(out)]) == exit_codes.MISTAKE
        assert out.is_dir()
