"""``list`` and how the commands find checkpoints, on checkpoints that were never trained."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FILES, SIZE, size_of, write_checkpoint
from launched import PROJECT

from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.run_dir import exit_codes

Command = Callable[..., tuple[int, str, str]]
InJson = Callable[..., tuple[int, Any]]


def test_list_has_all_fields_of_each_checkpoint(history: Path, in_json: InJson) -> None:
    code, rows = in_json("list", "test")
    assert code == exit_codes.DONE
    assert [row["tag"] for row in rows] == [
        rolling_tag(300),
        "epoch_00001",
        rolling_tag(200),
        "best_model",
        rolling_tag(100),
    ]
    newest, epoch, second, best, oldest = rows
    created = newest.pop("created")
    assert datetime.fromisoformat(created).tzinfo is not None
    assert newest.pop("age_seconds") == pytest.approx(3 * 3600 + 12 * 60, abs=60)
    assert newest == {
        "tag": rolling_tag(300),
        "kind": "full",
        "step": 300,
        "epoch": 0.75,
        "bytes": size_of(history / rolling_tag(300)),
        "freed_bytes": 0,
        "roles": ["epoch_00001"],
        "val_loss": 4.25,
        "pointers": ["latest"],
        "resumable": True,
        "problem": None,
    }
    assert (epoch["roles"], epoch["pointers"]) == ([rolling_tag(300)], [])
    assert (second["roles"], second["pointers"], best["roles"]) == (
        ["best_model"],
        ["latest_backup"],
        [rolling_tag(200)],
    )
    assert oldest["roles"] == [] and oldest["freed_bytes"] == oldest["bytes"] > SIZE


def test_the_table_has_one_line_per_checkpoint(history: Path, command: Command) -> None:
    code, out, _ = command("list", "test")
    assert code == exit_codes.DONE
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == [str(history)]
    assert " ".join(lines[3]) == (
        "rolling_step_000300 300 0.75 3h 12m 0.0 MB 0.0 MB 4.2500 resumable; latest; same files as epoch_00001"
    )
    assert [line[0] for line in lines[4:]] == ["epoch_00001", rolling_tag(200), "best_model", rolling_tag(100)]


def test_list_shows_damaged_and_unfinished_checkpoints(history: Path, in_json: InJson, command: Command) -> None:
    write_checkpoint(history, "epoch_00002", 400, kind="weights", state={"step": 400})
    name = next(iter(FILES))
    with (history / rolling_tag(200) / name).open("ab") as file:
        file.write(b"!")
    (history / rolling_tag(100) / "manifest.json").write_text("{}")
    (history / "rolling_step_000500.tmp").mkdir()
    (history / "rolling_step_000500.tmp" / name).write_bytes(b"half")
    (history / "rolling_step_000500.tmp" / "manifest.json").touch()  # as just before the rename
    (history / rolling_tag(50)).mkdir()
    (history / "latest.tmp").write_text("x")
    (history / "something else").mkdir()
    rows = {row["tag"]: row for row in in_json("list", "test")[1]}
    assert [*rows] == [
        "epoch_00002",
        rolling_tag(300),
        "epoch_00001",
        rolling_tag(200),
        "best_model",
        rolling_tag(100),
        rolling_tag(50),
        "rolling_step_000500.tmp",
    ]
    weights = rows["epoch_00002"]
    assert (weights["kind"], weights["resumable"], weights["problem"], weights["val_loss"]) == (
        "weights",
        False,
        None,
        None,
    )
    for tag in (rolling_tag(200), "best_model"):
        assert rows[tag]["problem"] == f"{name} has 701 bytes, 700 were written"
        assert not rows[tag]["resumable"]
    damaged = rows[rolling_tag(100)]
    assert (damaged["kind"], damaged["step"], damaged["epoch"]) == ("unknown", 100, None)
    assert damaged["problem"] == "manifest.json is damaged: it cannot be parsed"
    partial = rows["rolling_step_000500.tmp"]
    assert (partial["kind"], partial["bytes"], partial["freed_bytes"], partial["resumable"]) == (
        "unfinished",
        4,
        4,
        False,
    )
    assert partial["problem"] == "being written, or left by a crash"
    assert rows[rolling_tag(50)]["problem"] == "being deleted, or left by a crash"
    table = command("list", "test")[1]
    assert "weights only" in table and "BAD: manifest.json is damaged" in table and "  being written, or" in table


def test_json_is_valid_for_any_manifest(run_with: Callable[..., Path], command: Command) -> None:
    directory = run_with()
    for step, created in ((1, "yesterday"), (2, "0001-01-01T00:00:00+14:00"), (3, "2020-01-01T00:00:00")):
        write_checkpoint(directory, rolling_tag(step), step, created=created)
    write_checkpoint(directory, rolling_tag(4), 4, state={"step": 4, "val_step": 4, "val_loss": float("nan")})
    rows = json.loads(command("list", "test", "--json")[1], parse_constant=lambda word: pytest.fail(word))
    assert rows[0]["val_loss"] is None
    assert rows[3]["age_seconds"] is None and rows[1]["age_seconds"] > 1e8
    assert command("list", "test")[0] == exit_codes.DONE


def test_the_table_is_narrow_for_any_manifest(run_with: Callable[..., Path], command: Command) -> None:
    state = {"step": 4, "val_step": 4, "val_loss": 1.5e300}
    write_checkpoint(run_with(), rolling_tag(4), 4, state=state, epoch=2e200)
    table = command("list", "test")[1]
    assert "1.5e+300" in table and "2e+200" in table and max(map(len, table.splitlines()[1:])) < 150


def test_settings_that_are_not_a_regular_file_are_an_error(run_with: Callable[..., Path], command: Command) -> None:
    run_with()
    config = run_with("other").parents[1] / "runs" / "other" / "config.yaml"
    config.unlink()
    os.mkfifo(config)
    code, _, err = command("list", "other")
    assert (code, err) == (
        exit_codes.MISTAKE,
        f"error: {config} is not a regular file: restore it from a copy of the run\n",
    )


@pytest.mark.parametrize("name", ["test", "RUN", "CHECKPOINTS", None])
def test_a_run_is_found_by_name_and_directory_and_by_default(
    history: Path, run_with: Callable[..., Path], in_json: InJson, name: str | None
) -> None:
    run_dir = history.parents[1] / "runs" / "test"
    run_with("older")
    os.utime(history.parents[1] / "runs" / "older" / "config.yaml", (1, 1))
    named = {"test": "test", "RUN": run_dir, "CHECKPOINTS": history}
    code, rows = in_json("list", *([named[name]] if name else []))
    assert (code, len(rows)) == (exit_codes.DONE, 5)


def test_a_directory_of_checkpoints_needs_no_run(history: Path, in_json: InJson, tmp_path: Path) -> None:
    backup = shutil.copytree(history, tmp_path / "backup")
    assert len(in_json("list", backup)[1]) == 5
    assert in_json("verify", backup, "--all")[0] == exit_codes.DONE
    assert in_json("prune", backup)[1]["deleted"] == [rolling_tag(100)]  # by the settings in the manifests
    assert not (backup / rolling_tag(100)).exists() and (history / rolling_tag(100)).exists()


def test_checkpoints_of_a_deleted_run_are_found_by_its_name(history: Path, in_json: InJson) -> None:
    shutil.rmtree(history.parents[1] / "runs" / "test")
    assert len(in_json("list", "test")[1]) == 5


def test_the_path_of_a_missing_backup_does_not_denote_a_run(history: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    for verb in ("list", "verify", "prune"):
        code, _, err = command(verb, tmp_path / "mounted" / "test")
        assert (code, err.count("\n")) == (exit_codes.MISTAKE, 1)
        assert f"no run {tmp_path}/mounted/test; runs in" in err
    assert (history / rolling_tag(100)).exists()


def test_errors_are_one_line(run_with: Callable[..., Path], command: Command, tmp_path: Path) -> None:
    run_with()
    assert command("list", "nothing")[::2] == (
        exit_codes.MISTAKE,
        f"error: no run nothing; runs in {tmp_path}/project/runs: test\n",
    )
    assert command("list", "test") == (
        exit_codes.MISTAKE,
        "",
        f"error: no checkpoints in {tmp_path}/project/checkpoints/test\n",
    )
    assert command("list", "test", "--json")[:2] == (exit_codes.MISTAKE, "[]\n")
    code, _, err = command("verify", "test")
    assert code == exit_codes.MISTAKE and err.startswith("error: no checkpoints in ") and err.count("\n") == 1


def test_an_unreadable_directory_is_named(history: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    code, _, err = command("list", "test")
    assert code == exit_codes.MISTAKE
    assert err.startswith("error: the checkpoints of test cannot be read: ") and "Permission denied" in err


@pytest.mark.parametrize("words", [["list"], ["verify", "--all"], ["prune", "--dry-run"]])
def test_the_commands_start_without_pytorch(tmp_path: Path, words: list[str]) -> None:
    """Importing PyTorch and DeepSpeed takes seconds; the commands take less than one second of CPU time."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, rolling_tag(step), step)
    code = (
        "import sys; from ds_gpt2 import cli; code = cli.main(sys.argv[1:]);"
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules]); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, words[0], str(tmp_path), *words[1:]]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (result.returncode, result.stderr) == (exit_codes.DONE, "")
    assert result.stdout.endswith("\n[]\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
