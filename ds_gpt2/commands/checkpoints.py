"""``list``, ``verify`` and ``prune``: list, verify and delete the checkpoints of a run.

All three can be used while the run trains: checkpoints that the run replaces or deletes meanwhile are not errors, and
unfinished checkpoints are not touched.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ds_gpt2.checkpoint import pruning
from ds_gpt2.checkpoint.catalog import Generation, candidates, files_instead_of_checkpoints, open_generation
from ds_gpt2.checkpoint.listing import CheckpointRow, rows_of, step_of, unfinished, unfinished_row
from ds_gpt2.checkpoint.naming import LATEST, MANIFEST, role_of
from ds_gpt2.checkpoint.verify import Check, deep_problem, examine, hashing
from ds_gpt2.commands import inspect
from ds_gpt2.commands.arguments import path_text
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import duration, size, table
from ds_gpt2.config.run_location import CONFIG, run_of
from ds_gpt2.config.settings import PROJECT_DIR, RUNS
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.fork_record import read_fork
from ds_gpt2.tools.resources.run_checkpoints import bare_directory, find_run_checkpoints


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "tag",
        nargs="?",
        metavar="TAG",
        help="a tag, a step, best, or latest_backup: the checkpoint before the newest (default: the newest)",
    )
    parser.add_argument("--all", action="store_true", help="verify every checkpoint")
    parser.add_argument(
        "--deep", action="store_true", help="also load the files: check that numbers are finite and shapes are right"
    )


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be deleted, delete nothing")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="?",
        type=path_text("RUN"),
        metavar="RUN",
        help="a run's name, or a directory of checkpoints (default: the newest run)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(options: argparse.Namespace) -> int:
    """``list``: print a table of the checkpoints, newest first, and of unfinished checkpoints.

    Raises:
        UserError: there is no such run, or it has no checkpoints.
    """
    checkpoints = find_run_checkpoints(options.run)
    rows = [
        *rows_of(checkpoints.directory, checkpoints.found),
        *(unfinished_row(path, problem) for path, problem in unfinished(checkpoints.directory).items()),
    ]
    if options.json:
        _print_json([asdict(row) for row in rows])
    if not rows:
        raise UserError(f"no checkpoints in {checkpoints.directory}")
    if not options.json:
        run_dir = run_of(checkpoints.directory)
        fork = None if run_dir is None else read_fork(run_dir)
        origin = "" if fork is None else f"\nforked from {fork.lineage}"
        print(f"{checkpoints.directory}{origin}\n\n{as_table(rows)}")
    return exit_codes.DONE


def verify(options: argparse.Namespace) -> int:
    """``verify``: print one line per checkpoint, or per shard of a dataset; exit code 1 if any is damaged.

    Raises:
        UserError: there is no such run, checkpoint or dataset.
    """
    if options.all and options.tag is not None:
        raise UserError(f"--all includes every checkpoint: remove {options.tag} or --all")
    if options.run is not None and inspect.is_data(options.run):
        if unused := ([options.tag] if options.tag else []) + (["--deep"] if options.deep else []):
            remove = f"remove {' and '.join(unused)}"
            raise UserError(f"{options.run} is a dataset, of which every shard is verified: {remove}")
        return inspect.verify(Path(options.run), options.json)
    if options.run is not None and _is_unknown_directory(options.run):
        return inspect.verify(Path(options.run), options.json)  # reports that it has no shards
    generations, misplaced = _chosen(options)
    verdicts = []
    with hashing(generations) as hashes:
        checks: list[Check] = [hashes.problem_of, *([deep_problem] if options.deep else [])]
        for generation in generations:
            verdict = examine(generation.path, checks)
            if verdict is None and options.all:
                continue  # the run has deleted it since
            problem = verdict.problem if verdict else "was deleted while it was read"
            verdicts.append({"tag": generation.tag, "step": step_of(generation), "ok": not problem, "problem": problem})
            if not options.json:
                tqdm.write(f"{generation.tag}: {problem or 'ok'}")
    for path, problem in misplaced.items():
        verdicts.append({"tag": path.name, "step": step_of(open_generation(path)), "ok": False, "problem": problem})
        if not options.json:
            print(f"{path.name}: {problem}")
    if options.json:
        _print_json(verdicts)
    return exit_codes.DONE if all(verdict["ok"] for verdict in verdicts) else exit_codes.CRASHED


def prune(options: argparse.Namespace) -> int:
    """``prune``: delete the checkpoints that the run's settings do not keep; exit code 1 if a deletion failed.

    Raises:
        UserError: there is no such run, it has no checkpoints, or too few of them are good.
    """
    checkpoints = find_run_checkpoints(options.run)
    if not checkpoints.found:
        raise UserError(f"no checkpoints in {checkpoints.directory}")
    settings = checkpoints.retention_settings()
    paths = pruning.to_prune(checkpoints.directory, checkpoints.found, settings)
    pruned = pruning.preview(paths) if options.dry_run else pruning.delete(paths)
    if options.json:
        _print_json({"directory": str(checkpoints.directory), "dry_run": options.dry_run, **asdict(pruned)})
    else:
        would_be = "would be " if options.dry_run else ""
        lines = [f"{tag} {would_be}deleted" for tag in pruned.deleted] + pruned.failures
        print("\n".join([*lines, f"{size(pruned.freed_bytes)} {would_be}freed"]))
    return exit_codes.CRASHED if pruned.failures else exit_codes.DONE


def as_table(rows: Sequence[CheckpointRow]) -> str:
    """Return the table that ``list`` prints."""
    head = ("tag", "step", "epoch", "age", "size", "frees", "val loss", "state")
    return table([head, *map(_cells, rows)], last_left=True)


def _cells(row: CheckpointRow) -> tuple[str, ...]:
    return (
        row.tag,
        "" if row.step is None else str(row.step),
        "" if row.epoch is None else _fixed(row.epoch, 2),
        "" if row.age_seconds is None else duration(row.age_seconds),
        size(row.bytes),
        size(row.freed_bytes),
        "" if row.val_loss is None else _fixed(row.val_loss, 4),
        "; ".join([_state(row), *row.pointers, *([f"same files as {', '.join(row.roles)}"] if row.roles else [])]),
    )


def _fixed(number: float, digits: int) -> str:
    """Return a number with fixed decimals; one from a damaged file may be huge and has three significant digits."""
    return f"{number:.{digits}f}" if abs(number) < 1e6 else f"{number:.3g}"


def _state(row: CheckpointRow) -> str:
    if row.problem is not None:
        return row.problem if row.kind == "unfinished" else f"BAD: {row.problem}"
    return "weights only" if row.kind == "weights" else "resumable"


def _is_unknown_directory(name: str) -> bool:
    """Return whether this is a directory, but neither of a run nor of checkpoints."""
    directory = Path(name)
    if not directory.is_dir() or (directory / MANIFEST).is_file() or role_of(name):
        return False
    is_run = any((path / CONFIG).is_file() for path in (PROJECT_DIR / RUNS / name, directory))
    return not is_run and run_of(directory) is None and bare_directory(name) is None


def _chosen(options: argparse.Namespace) -> tuple[list[Generation], dict[Path, str]]:
    """Return the checkpoints that ``verify`` verifies, and with ``--all`` the files in the place of checkpoints.

    Raises:
        UserError: there is no such checkpoint, or none at all.
    """
    if options.run is not None and (Path(options.run) / MANIFEST).is_file():
        if options.tag is not None:
            raise UserError(f"{options.run} is one checkpoint: remove {options.tag}, or give its run and {options.tag}")
        return [open_generation(Path(options.run))], {}
    if options.tag is None and options.run is not None and role_of(options.run):
        options.run, options.tag = None, options.run  # only a tag is given: of the newest run
    checkpoints = find_run_checkpoints(options.run)
    if not checkpoints.found:
        raise UserError(f"no checkpoints in {checkpoints.directory}: there is nothing to verify")
    if options.all:
        return checkpoints.found, files_instead_of_checkpoints(checkpoints.directory)
    if options.tag not in (None, LATEST, "auto"):
        return candidates(checkpoints.directory, options.tag)[:1], {}
    return [next((found for found in checkpoints.found if not found.is_superseded), checkpoints.found[0])], {}


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))
