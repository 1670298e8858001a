"""``backup``: copy a checkpoint to a backup storage and verify it, list the backups, or fetch a backup."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from ds_gpt2.checkpoint.backup.backup import Backup, Copy
from ds_gpt2.checkpoint.backup.failure_log import BackupReporter
from ds_gpt2.checkpoint.backup.storage import redacted_reason
from ds_gpt2.checkpoint.catalog import Generation, candidates, name_in_commands
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.checkpoint.naming import LOCK
from ds_gpt2.checkpoint.output_check import check_outputs
from ds_gpt2.commands.arguments import path_text
from ds_gpt2.common import files, locks
from ds_gpt2.common.errors import UserError, is_wrong_path
from ds_gpt2.common.formatting import table
from ds_gpt2.common.terminal import print_error
from ds_gpt2.config.lookup import find_run
from ds_gpt2.config.run_location import load_run_settings
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.journal import Journal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's name or directory (default: the newest run)")
    parser.add_argument(
        "--to",
        type=path_text("--to"),
        metavar="STORAGE",
        help="a directory or a URL (default: the run's checkpoint.backup.to)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--tag",
        default="latest",
        metavar="TAG",
        help="copy this checkpoint: a tag, a step or best (default: the newest good checkpoint)",
    )
    what.add_argument(
        "--fetch", metavar="TAG", help="fetch this backup into the run's checkpoints: a tag, a step or best"
    )
    what.add_argument("--list", action="store_true", help="list the existing backups, copy nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    settings = load_run_settings(find_run(options.run))
    check_outputs(settings)
    storage = _storage(settings, options.to)
    backup = Backup(storage, settings.run.name, settings.checkpoint.backup, run_dir=settings.run_dir)
    try:
        backup.check_exists()
        if options.list:
            return _show(backup.copies(), backup, options.json)
        backup.check_apart_from(settings.checkpoint_dir)
        if not options.fetch:
            backup.check_named(settings.checkpoint_dir)
        if options.fetch:
            return _fetch(backup, options.fetch, settings, options.json)
        directory = settings.checkpoint_dir
        copied = _copy(backup, _candidates(directory, options.tag), directory, options.json)
        if copied == exit_codes.DONE and options.to is None:
            BackupReporter(Journal(settings.run_dir)).recovered(f"manual backup to {backup.where()}")
        return copied
    except OSError as error:
        print_error(redacted_reason(error))
        return exit_codes.MISTAKE if is_wrong_path(error) else exit_codes.CRASHED


def _storage(settings: Settings, requested: str | None) -> str:
    storage = requested or settings.checkpoint.backup.to
    if storage is None:
        raise UserError("no backup storage: give --to STORAGE (a directory, or a URL such as s3://bucket/folder)")
    return storage


def _candidates(directory: Path, tag: str) -> list[Generation]:
    """Return the checkpoints to try to back up, in order.

    Raises:
        UserError: there is none, or ``tag`` is a checkpoint in another directory.
    """
    found = candidates(directory, tag)
    if not found:
        raise UserError(f"nothing to back up: {directory} has no checkpoint")
    if any(generation.path.parent.resolve() != directory.resolve() for generation in found):
        raise UserError(f"--tag {tag}: give the name of a checkpoint in {directory}")
    return found


def _fetch(backup: Backup, selector: str, settings: Settings, as_json: bool) -> int:
    directory = settings.checkpoint_dir
    files.check_writable(directory)
    with locks.lock(directory / LOCK, f"run {settings.run.name}"):
        copy = backup.find(selector)
        tag = copy.tag
        try:
            with _bar(tag, copy.manifest.bytes) as bar:
                fetched = backup.fetch(tag, directory, bar.update)
        except DamagedError as error:
            print_error(f"{tag} was not fetched: {error}")
            return exit_codes.CRASHED
    if as_json:
        print(json.dumps({"tag": tag, "path": str(fetched.path), "step": fetched.step, "verified": True}))
    else:
        print(f"fetched {fetched.path}, step {fetched.step:,}, every file verified")
        print(f"resume from it with `./launch.sh resume {name_in_commands(directory)} --from {tag}`")
    return exit_codes.DONE


def _copy(backup: Backup, found: list[Generation], directory: Path, as_json: bool) -> int:
    for generation in found:
        try:
            sent = _copy_with_bar(backup, generation)
        except DamagedError as error:
            print(f"checkpoint {generation.path} was not copied: {error}", file=sys.stderr)
            continue
        _report(backup, generation, sent, as_json)
        return exit_codes.DONE
    others = f"`./launch.sh list {name_in_commands(directory)}` shows those of the run"
    print_error(f"no good checkpoint to back up; {others}")
    return exit_codes.CRASHED


def _copy_with_bar(backup: Backup, generation: Generation) -> int:
    size = generation.manifest.bytes if generation.manifest else 0
    with _bar(generation.tag, 2 * size) as bar:
        return backup.copy(generation, bar.update)  # each byte is sent and read back


def _bar(tag: str, size: int) -> tqdm[NoReturn]:
    return tqdm(total=size, desc=tag, unit="B", unit_scale=True, leave=False, disable=None)


def _report(backup: Backup, generation: Generation, sent: int, as_json: bool) -> None:
    assert generation.manifest is not None
    size, where = generation.manifest.bytes, backup.where(generation.tag)
    if as_json:
        copied = {"tag": generation.tag, "location": where, "bytes": size, "sent": sent, "verified": True}
        print(json.dumps(copied | {"place": where}))  # "place": the key of earlier versions
        return
    how = f"{sent:,} bytes sent" if sent else "already present"
    print(f"{generation.tag} is in {where}: {size:,} bytes, {how}, every file read back and verified")


def _show(held: list[Copy], backup: Backup, as_json: bool) -> int:
    rows = [
        {"tag": copy.tag, "step": copy.manifest.step, "bytes": copy.manifest.bytes, "created": copy.manifest.created}
        for copy in held
    ]
    if as_json:
        print(json.dumps(rows))
    elif not rows:
        print(f"no backups in {backup.where()}")
    else:
        print(f"backups in {backup.where()}, newest first:")
        head = ["tag", "step", "bytes", "created"]
        cells = [[str(row["tag"]), f"{row['step']:,}", f"{row['bytes']:,}", str(row["created"])] for row in rows]
        print(table([head, *cells], indent="  "))
    return exit_codes.DONE
