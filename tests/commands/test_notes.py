"""``notes``: notes are stored and shown in TensorBoard."""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launched import PROJECT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_gpt2 import cli
from ds_gpt2.commands import notes
from ds_gpt2.common.errors import UserError
from ds_gpt2.monitoring.note_events import show_in_tensorboard
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.notes import Note, read_notes

CONFIG = """
run: {name: test, dir: RUNS}
model: {preset: 7M}
data: {dir: data}
schedule: {steps: 10, warmup_steps: 1}
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a run with 20 steps and TensorBoard, killed while it wrote the record of step 21."""
    directory = tmp_path / "runs" / "test"
    (directory / "tensorboard").mkdir(parents=True)
    (directory / "config.yaml").write_text(CONFIG.replace("RUNS", str(tmp_path / "runs")))
    at_step(directory, 20, tail='{"step": 21, "train/l')
    return directory


def at_step(run_dir: Path, step: int, tail: str = "") -> None:
    """Write metrics up to ``step``."""
    lines = "".join(f'{{"step": {number}, "train/loss": 3.0}}\n' for number in range(1, step + 1))
    (run_dir / "metrics.jsonl").write_text(lines + tail)


def run(run_dir: Path, *words: str) -> int:
    """Run the command with parsed arguments."""
    parser = argparse.ArgumentParser()
    notes.add_arguments(parser)
    return notes.run(parser.parse_args([str(run_dir), *words]))


def shown(run_dir: Path) -> list[tuple[int, str]]:
    """Return the notes that TensorBoard's own reader finds."""
    events = EventAccumulator(str(run_dir / "tensorboard" / "notes"))
    events.Reload()
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("notes")]


def test_a_note_is_stored_with_time_and_step_and_shown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(run_dir, "halved", "the *rate*") == exit_codes.DONE
    assert capsys.readouterr().out == f"noted at step 20 in {run_dir / 'NOTES.md'} and in TensorBoard\n"
    entry = re.fullmatch(
        r"\n## (\S+ \S+ [+-]\d{4}), step 20\n\nhalved the \*rate\*\n", (run_dir / "NOTES.md").read_text()
    )
    assert entry is not None
    assert read_notes(run_dir) == [Note(entry[1], 20, "halved the *rate*")]
    assert shown(run_dir) == [(20, f"**{entry[1]}**\n\nhalved the *rate*")]


def test_notes_at_one_step_are_one_text_and_steps_are_ordered(run_dir: Path) -> None:
    """TensorBoard's fast reader keeps one text per step and drops later steps if a step occurs again."""
    for step, text in ((20, "a"), (20, "b"), (30, "c"), (10, "back to 10")):
        at_step(run_dir, step)
        run(run_dir, text)
    found = [(step, re.sub(r"\*\*.*\*\*\s+", "", text)) for step, text in shown(run_dir)]
    assert found == [(10, "back to 10"), (20, "a\n\nb"), (30, "c")]
    assert [note.text for note in read_notes(run_dir)] == ["a", "b", "c", "back to 10"]
    assert len(list((run_dir / "tensorboard" / "notes").iterdir())) == 1


def test_concurrent_writers_lose_no_note(run_dir: Path) -> None:
    code = "import sys, pathlib, argparse; from ds_gpt2.commands import notes; p = argparse.ArgumentParser();"
    code += (
        "notes.add_arguments(p); [notes.run(p.parse_args([*sys.argv[1:], f'{n} ' + 'x' * 5000])) for n in range(10)]"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(run_dir), name], cwd=PROJECT, stdout=subprocess.DEVNULL)
        for name in ("red", "blue")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    expected = sorted(f"{name} {number} {'x' * 5000}" for name in ("red", "blue") for number in range(10))
    assert sorted(note.text for note in read_notes(run_dir)) == expected
    ((_, text),) = shown(run_dir)
    assert all(note in text for note in expected)


def test_a_writer_holds_a_lock(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a writer that read the notes first could overwrite the event file of the other."""

    def check(notes: list[Note], directory: Path) -> None:
        with (run_dir / "NOTES.md").open("ab") as another, pytest.raises(BlockingIOError):
            fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
        checked.append(len(notes))

    checked: list[int] = []
    monkeypatch.setattr("ds_gpt2.monitoring.note_events.show_in_tensorboard", check)
    run(run_dir, "x")
    assert checked == [1]


def test_a_note_from_stdin_and_json(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines: ä\n"))
    assert run(run_dir, "-", "--json") == exit_codes.DONE
    printed = json.loads(capsys.readouterr().out)
    (note,) = read_notes(run_dir)
    expected = {"time": note.time, "step": 20, "text": "two\nlines: ä"}
    assert printed == {**expected, "file": str(run_dir / "NOTES.md"), "tensorboard": True}
    assert run(run_dir, "--json") == exit_codes.DONE
    assert json.loads(capsys.readouterr().out) == [expected]


def test_without_a_text_the_notes_are_shown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(run_dir) == exit_codes.DONE
    assert capsys.readouterr().out.startswith(f"no notes in {run_dir / 'NOTES.md'} yet: add one with ")
    (run_dir / "NOTES.md").write_text("Written by hand.\n")
    run(run_dir, "and by the command")
    capsys.readouterr()
    assert run(run_dir) == exit_codes.DONE
    printed = capsys.readouterr().out
    assert printed.startswith("Written by hand.\n\n## ") and printed.endswith(", step 20\n\nand by the command\n")


def test_notes_work_before_the_start_and_without_tensorboard(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "tensorboard").rmdir()
    assert run(run_dir, "before the start") == exit_codes.DONE
    assert capsys.readouterr().out == f"noted at step 0 in {run_dir / 'NOTES.md'}\n"
    assert not (run_dir / "tensorboard").exists()


def test_a_note_is_stored_if_tensorboard_fails(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "tensorboard" / "notes").write_text("in the way")
    assert run(run_dir, "kept") == exit_codes.DONE
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: the note is saved, but TensorBoard does not show it: ")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == f"noted at step 20 in {run_dir / 'NOTES.md'}\n"
    assert [note.text for note in read_notes(run_dir)] == ["kept"]


def test_the_event_file_of_the_training_process_is_not_changed(run_dir: Path) -> None:
    own = run_dir / "tensorboard" / "events.out.tfevents.1.host.1.0"
    own.write_bytes(b"of the training process")
    run(run_dir, "x")
    assert own.read_bytes() == b"of the training process"
    assert {path.name for path in own.parent.iterdir()} == {own.name, "notes"}


def test_a_new_event_file_is_read_after_older_ones(tmp_path: Path) -> None:
    """TensorBoard reads the files of a directory in the order of their names."""
    (tmp_path / "notes").mkdir()
    names = []
    for _ in range(3):
        show_in_tensorboard([Note("2026-01-01 00:00:00 +0000", 1, "x")], tmp_path / "notes")
        names += os.listdir(tmp_path / "notes")
    assert len(names) == len(set(names)) == 3
    assert names == sorted(names)


def test_tensorboard_never_sees_an_incomplete_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        renamed.append((source.name, target.name))
        rename(source, target)

    rename, renamed = os.replace, list[tuple[str, str]]()
    monkeypatch.setattr("os.replace", replace)
    show_in_tensorboard([Note("2026-01-01 00:00:00 +0000", 1, "x")], tmp_path / "notes")
    ((source, target),) = renamed
    assert "tfevents" not in source and "tfevents" in target
    assert os.listdir(tmp_path / "notes") == [target]


@pytest.mark.parametrize("words", [[""], [" ", "\n"]])
def test_an_empty_note_is_refused(run_dir: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match="the note is empty: give a text"):
        run(run_dir, *words)
    assert not (run_dir / "NOTES.md").exists()


def test_a_notes_file_that_cannot_be_written_is_a_one_line_error(run_dir: Path) -> None:
    (run_dir / "NOTES.md").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*NOTES\.md: Is a directory; check its perm"):
        run(run_dir, "x")
    with pytest.raises(UserError, match=r"^cannot read .*: Is a directory"):
        run(run_dir)


def test_the_command_does_not_import_torch() -> None:
    code = "import sys, ds_gpt2.commands.notes; from ds_gpt2.monitoring.note_events import _events; _events([])"
    code += "; print({'torch', 'deepspeed', 'tensorflow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_control_characters_are_escaped_and_the_notes_are_a_regular_file(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "NOTES.md").write_text("a\tb\n\x1b[2Jcleared\x07\r\x9b0m\n")
    assert run(run_dir) == exit_codes.DONE
    assert capsys.readouterr().out == "a\tb\n\\x1b[2Jcleared\\x07\\r\\x9b0m\n"
    (run_dir / "NOTES.md").unlink()
    os.mkfifo(run_dir / "NOTES.md")
    with pytest.raises(UserError, match=r"cannot read .*NOTES\.md: Not a regular file"):
        run(run_dir)


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_disk_of_the_output_is_not_blamed_on_the_notes(
    run_dir: Path, as_json: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "NOTES.md").write_text("\n## 2026-01-01 00:00:00 +0000, step 1\n\nx\n")
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        assert cli.main(["notes", str(run_dir), *as_json]) == exit_codes.CRASHED
        assert capsys.readouterr().err == "error: the output cannot be written: No space left on device\n"
