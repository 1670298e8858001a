"""The command ``doctor``: exit codes, JSON and printed rows."""

from __future__ import annotations

import argparse
import json
import os
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
from ds_gpt2.tools.doctor.finding import Finding, Row


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


@pytest.fixture
def ssh_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no route to host >&2\nexit 255\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.slow
def test_hosts_are_checked_although_one_does_not_answer(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], ssh_that_fails: None
) -> None:
    config, hostfile = write_config(tmp_path / "folder"), tmp_path / "hosts"
    hostfile.write_text("localhost slots=1\nnode2 slots=2\n127.0.0.1 slots=1\n")
    assert run(config, "--hostfile", hostfile, "--quick", "--json") == exit_codes.MISTAKE
    rows = json.loads(capsys.readouterr().out)
    connections = [(row["host"], row["status"], row["fix"]) for row in rows if row["name"] == "connection"]
    fix = "`ssh node2 true` must work without a password"
    assert [row[:2] for row in connections] == [("localhost", "ok"), ("node2", "fail"), ("127.0.0.1", "ok")]
    assert "no route to host" in next(row["found"] for row in rows if row["host"] == "node2")
    assert any(fix in row["found"] + row["fix"] for row in rows if row["host"] == "node2")
    for host in ("localhost", "127.0.0.1"):
        names = [row["name"] for row in rows if row["host"] == host]
        assert names[0] == "connection" and {"memory", "open files", "loopback"} <= set(names)
        assert not {"terminal", "logout", "port 6006"} & set(names)
    own = [row["name"] for row in rows if row["host"] is None]
    assert own[:4] == ["time limit", "terminal", "logout", "port 6006"]
    assert own[4:] == ["versions", "devices", "directories", "rank 0"]
    devices = next(row for row in rows if row["name"] == "devices")
    assert devices["status"] == "fail" and "localhost and 127.0.0.1 have the same host name" in devices["found"]
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["run.yaml"]


def test_rows_of_hosts_are_printed_under_their_host(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("disk", Finding("free space", "ok", "enough"), "node1"),
        Row("disk", Finding("inodes", "ok", "enough"), "node1"),
        Row("disk", Finding("free space", "warn", "little"), "node2"),
        Row("network", Finding("node1 - node2", "ok", "fast")),
    ]
    assert list(doctor._shown(rows)) == rows
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        ["node1:", "disk"], ["ok", "free"], ["ok", "inodes"], ["node2:", "disk"], ["warn", "free"], ["network"],
        ["ok", "node1"],
    ]  # fmt: skip


def test_long_findings_are_wrapped_and_indented() -> None:
    row = Finding("a name that is rather long", "warn", "found " * 40, "fix " * 40)
    lines = doctor.lines_of(row)
    assert max(map(len, lines)) <= doctor.WIDTH
    assert lines[0].startswith("  warn a name that is rather long found")
    assert next(line for line in lines if "->" in line).strip().startswith("-> fix")
