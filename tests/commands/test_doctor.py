"""The command ``doctor``: exit codes, JSON and printed rows."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from doctor_helpers import flip

from ds_gpt2.commands import doctor
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision import launcher
from ds_gpt2.tools.doctor.finding import Finding


def run(*words: str | Path) -> int:
    """Run the command with ``words`` as the command line does; return the exit code."""
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    options, rest = parser.parse_known_args([str(word) for word in words])
    options.settings += rest
    return doctor.run(options)


@pytest.mark.slow
def test_all_checks_and_the_exit_code_of_a_failed_one(
    tmp_path: Path, dataset_dir: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(dataset_dir, tmp_path / "data")
    config = write_config(tmp_path / "folder", data={"dir": str(copied)})
    flip(copied / open_dataset(copied).shards[0].file)
    assert run(config, "--num_gpus", "2", "--json") == exit_codes.MISTAKE
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows if row["status"] == "fail"] == ["checksums"]
    assert {row["group"] for row in rows} >= {"settings", "disk", "data", "memory", "limits", "machine", "network"}
    of_ranks = [row for row in rows if row["group"] == "ranks"]
    assert [row["name"] for row in of_ranks] == ["ranks", "rank 0", "rank 1"]
    pattern = r"4 bytes in [\d.]+ ms, 1 MiB at [\d.]+ GB/s, 16 MiB at [\d.]+ GB/s on the bus"
    assert all(re.fullmatch(pattern, row["found"]) for row in of_ranks[1:])
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["run.yaml"]


def test_printed_rows_and_summary(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert run(config, "--quick") == exit_codes.DONE
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= doctor.WIDTH
    assert re.fullmatch(r"\d+ ok.*: ready, as far as can be checked.*", lines[-1])
    assert "memory" in lines and not any(line.startswith("  FAIL") for line in lines)
    assert run(config, "--quick", "checkpoint.min_free_gb=1e9") == exit_codes.MISTAKE
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  FAIL free space "))
    assert any(line.strip().startswith("-> at least") for line in lines[at : at + 3])
    # The clock is "not known" in most containers.
    assert re.search(r", 1 FAIL(, 1 not known)?: not ready; fix the checks marked FAIL", lines[-1])


@pytest.mark.parametrize(("gpus", "fix"), [(0, "set run.device=cpu"), (2, "give --num_gpus 2")])
def test_ranks_that_cannot_be_chosen_are_a_finding_with_a_fix(
    tmp_path: Path,
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    fix: str,
) -> None:
    monkeypatch.setattr(launcher, "gpus_of_machine", lambda: gpus)
    code = run(write_config(tmp_path), "--quick", "--json", "run.device=cuda", "--num_gpus", "4096")
    rows = json.loads(capsys.readouterr().out)
    assert (code, rows[0]["name"], rows[0]["status"]) == (exit_codes.MISTAKE, "device", "fail")
    assert rows[0]["fix"] == fix and fix not in rows[0]["found"]
    assert len(rows) > 10


def test_long_findings_are_wrapped_and_indented() -> None:
    row = Finding("a name that is rather long", "warn", "found " * 40, "fix " * 40)
    lines = doctor.lines_of(row)
    assert max(map(len, lines)) <= doctor.WIDTH
    assert lines[0].startswith("  warn a name that is rather long found")
    assert next(line for line in lines if "->" in line).strip().startswith("-> fix")
