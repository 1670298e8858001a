"""``notes``: add a note to a run at its current step, or show the notes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import read_small
from ds_gpt2.common.terminal import printable, printable_lines
from ds_gpt2.config.lookup import find_run
from ds_gpt2.config.run_location import event_directory
from ds_gpt2.monitoring import note_events
from ds_gpt2.run_dir import exit_codes, notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's name or directory")
    parser.add_argument(
        "text", nargs="*", metavar="TEXT", help="the note, in Markdown; - reads it from stdin; none: show the notes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    run_dir = find_run(options.run)
    if not options.text:
        return _show(run_dir, options)
    text = printable(sys.stdin.read() if options.text == ["-"] else " ".join(options.text))
    if not text.strip():
        raise UserError('the note is empty: give a text, as in `./launch.sh notes RUN "halved the learning rate"`')
    return _add(run_dir, notes.now(notes.newest_step(run_dir), text), options.json)


def _show(run_dir: Path, options: argparse.Namespace) -> int:
    file = run_dir / notes.NOTES
    try:
        if options.json:
            found = json.dumps([dataclasses.asdict(note) for note in notes.read_notes(run_dir)], ensure_ascii=False)
        elif file.exists():
            found = printable_lines(read_small(file).decode(errors="replace").strip())
        else:
            found = f'no notes in {file} yet: add one with `./launch.sh notes {shlex.quote(options.run)} "TEXT"`'
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check its permissions and its disk") from None
    print(found)
    return exit_codes.DONE


def _add(run_dir: Path, note: notes.Note, as_json: bool) -> int:
    file = run_dir / notes.NOTES
    try:
        with notes.writer_lock(run_dir):
            notes.append(run_dir, note)
            shown = _show_in_tensorboard(run_dir)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; check its permissions and its disk") from None
    if as_json:
        report = {**dataclasses.asdict(note), "file": str(file), "tensorboard": shown}
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(f"noted at step {note.step:,} in {file}{' and in TensorBoard' if shown else ''}")
    return exit_codes.DONE


def _show_in_tensorboard(run_dir: Path) -> bool:
    """Write the notes to the event files; return whether it succeeded. A failure does not affect the note itself."""
    directory = event_directory(run_dir)
    if not directory.is_dir():  # no TensorBoard, or nothing written yet
        return False
    try:
        note_events.show_in_tensorboard(notes.read_notes(run_dir), directory / note_events.TAG)
    except Exception as error:
        print(f"warning: the note is saved, but TensorBoard does not show it: {error}", file=sys.stderr)
        return False
    return True
