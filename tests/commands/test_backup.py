"""``backup``: its output, errors and exit codes."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched import PROJECT
from project_dir import add_run, use_as_project

from ds_gpt2 import cli
from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.failure_log import BackupReporter
from ds_gpt2.checkpoint.catalog import candidates, open_generation, problem_of
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import BEST_TAG, epoch_tag, rolling_tag
from ds_gpt2.commands import backup
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.locks import lock
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.journal import Journal, read_journal

CONFIG = """
run: {name: test, dir: FOLDER/runs}
model: {preset: 7M}
data: {dir: data}
schedule: {steps: 10, warmup_steps: 1}
checkpoint: {dir: FOLDER/checkpoints}
"""


def save(directory: Path, step: int) -> None:
    data = b"weights of %d" % step
    partial = directory / (rolling_tag(step) + ".tmp")
    partial.mkdir(parents=True)
    (partial / "model.pt").write_bytes(data)
    manifest = Manifest(
        created=f"2026-01-01T00:00:{step:02d}+00:00",
        epoch=0.5,
        state={"step": step},
        world_size=1,
        identity={},
        settings={},
        versions={},
        files={"model.pt": FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())},
    )
    commit.commit(Disk(), directory, rolling_tag(step), manifest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a run of two checkpoints and an empty backup storage."""
    add_run(tmp_path, "test", CONFIG)
    for step in (10, 20):
        save(tmp_path / "checkpoints" / "test", step)
    (tmp_path / "storage").mkdir()
    return tmp_path


def run(folder: Path, *words: str, to: str | None = "storage") -> int:
    """Run the command with parsed arguments."""
    parser = argparse.ArgumentParser()
    backup.add_arguments(parser)
    storage = ["--to", str(folder / to)] if to else []
    return backup.run(parser.parse_args([str(folder / "runs" / "test"), *storage, *words]))


def test_the_newest_checkpoint_is_copied(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == exit_codes.DONE
    where = folder / "storage" / "test" / "rolling_step_000020"
    size = "13 bytes"
    expected = f"rolling_step_000020 is in {where}: {size}, {size} sent, every file read back and verified\n"
    assert capsys.readouterr().out == expected
    assert [problem_of(found) for found in candidates(folder, str(where.parent))] == [None]
    assert run(folder) == exit_codes.DONE
    assert "13 bytes, already present, every file read back" in capsys.readouterr().out


@pytest.mark.parametrize("tag", ["10", "rolling_step_000010", "CHECKPOINTS/rolling_step_000010"])
def test_another_checkpoint_can_be_selected(folder: Path, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    tag = tag.replace("CHECKPOINTS", str(folder / "checkpoints" / "test"))
    assert run(folder, "--tag", tag, "--json") == exit_codes.DONE
    assert json.loads(capsys.readouterr().out) == {
        "tag": "rolling_step_000010",
        "location": str(folder / "storage" / "test" / "rolling_step_000010"),
        "place": str(folder / "storage" / "test" / "rolling_step_000010"),
        "bytes": 13,
        "sent": 13,
        "verified": True,
    }


def test_a_manual_copy_ends_a_failure(folder: Path) -> None:
    run_dir = folder / "runs" / "test"
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        config.replace("checkpoint: {", f"checkpoint: {{backup: {{to: {folder}/nas}}, ")
    )
    BackupReporter(Journal(run_dir)).failed("no such directory")
    assert run(folder) == exit_codes.DONE  # to another storage: no information about the configured one
    assert [event.kind for event in read_journal(run_dir)] == ["backup_failed"]
    (folder / "nas").mkdir()
    assert run(folder, to=None) == exit_codes.DONE
    assert [event.kind for event in read_journal(run_dir)] == ["backup_failed", "backup_ok"]
    assert run(folder, to=None) == exit_codes.DONE
    assert len(list(read_journal(run_dir))) == 2


def test_an_older_checkpoint_is_copied_if_the_newest_is_damaged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = folder / "checkpoints" / "test" / "rolling_step_000020"
    (newest / "model.pt").write_bytes(b"Weights of 20")
    assert run(folder) == exit_codes.DONE
    printed = capsys.readouterr()
    assert f"checkpoint {newest} was not copied: model.pt is damaged" in printed.err
    assert printed.out.startswith("rolling_step_000010 is in ")
    assert run(folder, "--tag", "20") == exit_codes.CRASHED
    assert "error: no good checkpoint to back up" in capsys.readouterr().err


def test_an_older_checkpoint_is_copied_if_a_file_of_the_newest_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = folder / "checkpoints" / "test" / "rolling_step_000020"
    (newest / "model.pt").unlink()
    assert run(folder) == exit_codes.DONE
    printed = capsys.readouterr()
    assert printed.err == f"checkpoint {newest} was not copied: model.pt is missing\n"
    assert printed.out.startswith("rolling_step_000010 is in ")
    assert not (folder / "storage" / "test" / newest.name).exists()


def test_a_refused_backup_leaves_no_files_in_the_storage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "checkpoints" / "test" / "rolling_step_000020" / "model.pt").write_bytes(b"Weights of 20")
    assert run(folder, "--tag", "20") == exit_codes.CRASHED
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: no good checkpoint to back up; `./launch.sh list DIR` shows those of the run".replace(
        "DIR",
        str(folder / "checkpoints" / "test"),  # not a run of this project: its name would not be found
    )
    assert not (folder / "storage" / "test" / "rolling_step_000020").exists()


def test_copies_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--list") == exit_codes.DONE
    assert capsys.readouterr().out == f"no backups in {folder / 'storage' / 'test'}\n"
    for tag in ("10", "20"):
        run(folder, "--tag", tag)
    capsys.readouterr()
    assert run(folder, "--list") == exit_codes.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["tag", "rolling_step_000020", "rolling_step_000010"]
    assert run(folder, "--list", "--json") == exit_codes.DONE
    newest = {"tag": "rolling_step_000020", "step": 20, "bytes": 13, "created": "2026-01-01T00:00:20+00:00"}
    assert json.loads(capsys.readouterr().out)[0] == newest


def test_a_copy_is_fetched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--tag", "10")
    directory = folder / "checkpoints" / "test"
    commit.remove(Disk(), directory, rolling_tag(10))
    capsys.readouterr()
    assert run(folder, "--fetch", rolling_tag(10)) == exit_codes.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"fetched {directory / rolling_tag(10)}, step 10, every file verified"
    assert lines[1] == f"resume from it with `./launch.sh resume {directory} --from rolling_step_000010`"
    assert [problem_of(found) for found in candidates(directory, "10")] == [None]
    (folder / "storage" / "test" / rolling_tag(10) / "model.pt").write_bytes(b"Weights of 10")
    commit.remove(Disk(), directory, rolling_tag(10))
    assert run(folder, "--fetch", rolling_tag(10)) == exit_codes.CRASHED
    assert "was not fetched: " in capsys.readouterr().err
    assert {path.name for path in directory.iterdir()} == {rolling_tag(20), "lock"}


@pytest.mark.parametrize(
    ("name", "tag"), [("10", rolling_tag(10)), ("best", BEST_TAG), ("epoch 1", epoch_tag(1)), ("30", epoch_tag(1))]
)
def test_fetch_accepts_the_names_of_a_resume(folder: Path, name: str, tag: str) -> None:
    directory = folder / "checkpoints" / "test"
    commit.link(Disk(), directory / rolling_tag(10), directory, BEST_TAG)
    save(directory, 30)
    (directory / rolling_tag(30)).rename(directory / epoch_tag(1))
    run(folder, "--tag", tag)
    commit.remove(Disk(), directory, tag)
    assert run(folder, "--fetch", name) == exit_codes.DONE
    assert problem_of(open_generation(directory / tag)) is None


@pytest.mark.parametrize(
    "words",
    [("--tag", "10", "--fetch", "20"), ("--list", "--tag", "10"), ("--list", "--fetch=10")],
)
def test_options_that_exclude_each_other_are_refused(
    folder: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(folder, *words)
    assert "not allowed with argument" in capsys.readouterr().err


def test_an_unknown_protocol_is_reported_with_a_fix(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_as_project(folder, monkeypatch)
    assert cli.main(["backup", "test", "--to", "foo://bucket"]) == exit_codes.MISTAKE
    error = "cannot back up to foo://bucket: Protocol not known: foo; give a directory, or a URL such as"
    assert error in capsys.readouterr().err


def test_a_run_of_the_project_is_named_in_the_suggested_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_as_project(folder, monkeypatch)
    run(folder, "--tag", "10")
    assert run(folder, "--fetch", rolling_tag(10)) == exit_codes.DONE
    assert "`./launch.sh resume test --from rolling_step_000010`" in capsys.readouterr().out


def test_fetch_is_refused_while_the_run_trains(folder: Path) -> None:
    directory = folder / "checkpoints" / "test"
    with lock(directory / "lock", "it"), pytest.raises(UserError, match="run test is in use by process"):
        run(folder, "--fetch", rolling_tag(10))


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, exit_codes.CRASHED), (errno.EACCES, exit_codes.MISTAKE)])
def test_a_failing_storage_is_a_one_line_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def fail(self: Disk, file: object) -> None:
        raise OSError(number, os.strerror(number), "ftp://me:hunter2@nas")

    monkeypatch.setattr(Disk, "sync", fail)
    assert run(folder) == code
    printed = capsys.readouterr()
    assert printed.err.endswith(f"error: ftp://***@nas: {os.strerror(number)}\n")
    assert printed.out == ""


@pytest.mark.parametrize(
    ("words", "to", "message"),
    [
        ([], None, "give --to STORAGE"),
        ([], "gone", "create it, or mount its disk"),
        ([], "checkpoints", "overlaps the directory of the checkpoints"),
        (["--tag", "30"], "storage", "no checkpoint '30'"),
        (["--fetch", "30"], "storage", "no backup 30 in"),
        (["--tag", "STORAGE/test"], "storage", "is not a checkpoint of ds_gpt2"),
    ],
)
def test_user_errors(folder: Path, words: list[str], to: str | None, message: str) -> None:
    (folder / "storage" / "test").mkdir()
    with pytest.raises(UserError, match=message):
        run(folder, *(word.replace("STORAGE", str(folder / "storage")) for word in words), to=to)


def test_a_checkpoint_of_another_run_is_refused(folder: Path) -> None:
    save(folder / "checkpoints" / "other", 30)
    with pytest.raises(UserError, match="give the name of a checkpoint in"):
        run(folder, "--tag", str(folder / "checkpoints" / "other"))


def test_a_run_without_checkpoints_is_an_error(folder: Path) -> None:
    for step in (10, 20):
        commit.remove(Disk(), folder / "checkpoints" / "test", rolling_tag(step))
    with pytest.raises(UserError, match="nothing to back up"):
        run(folder)


def test_the_command_does_not_import_torch() -> None:
    code = "import sys, ds_gpt2.commands.backup; print({'torch', 'deepspeed'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
