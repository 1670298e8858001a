"""``list``, ``verify`` and ``prune``: which checkpoints a run has, whether they are good, and away with the old ones.

All three may be used while the run trains: what it replaces or deletes meanwhile is no error, and what it is writing
is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from ds_gpt2.checkpoint import commit, retention
from ds_gpt2.checkpoint import directory as housekeeping
from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation, scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import LATEST, MANIFEST, role_of
from ds_gpt2.checkpoint.verify import Check, deep_problem, examine, hashing, identity
from ds_gpt2.commands import inspect
from ds_gpt2.commands.arguments import path_text
from ds_gpt2.commands.checkpoint_table import as_table, freed_by, rows_of, step_of, unfinished, unfinished_row
from ds_gpt2.commands.runs import find_run
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.formatting import size
from ds_gpt2.config.run_location import CONFIG, load_run_settings, run_of
from ds_gpt2.config.settings import PROJECT_DIR, CheckpointSettings
from ds_gpt2.run_dir import exit_report


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("tag", nargs="?", metavar="TAG", help="a tag, a step, best, latest_backup (default: the newest)")
    which.add_argument("--all", action="store_true", help="every checkpoint there is")
    parser.add_argument(
        "--deep", action="store_true", help="load the files too: every number finite, every shape right"
    )


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, delete nothing")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="?",
        type=path_text("RUN"),
        metavar="RUN",
        help="a run's name, or a directory of checkpoints (default: the newest run)",
    )
    parser.add_argument("--json", action="store_true", help="for programs to read")


def show(options: argparse.Namespace) -> int:
    """``list``: a table of the checkpoints, newest first, and of what is unfinished."""
    place = find_run_directories(options.run)
    rows = [
        *rows_of(place.directory, place.found),
        *(unfinished_row(path, what) for path, what in unfinished(place.directory).items()),
    ]
    if options.json:
        _print_json([asdict(row) for row in rows])
    if not rows:
        raise UserError(f"no checkpoints in {place.directory}")
    if not options.json:
        print(f"{place.directory}\n\n{as_table(rows)}")
    return exit_report.DONE


def verify(options: argparse.Namespace) -> int:
    """``verify``: one line for each checkpoint asked for, or each shard of a dataset; exit code 1 if any is bad."""
    if options.run is not None and inspect.is_data(options.run):
        return inspect.verify(Path(options.run), options.json)
    if options.run is not None and _is_nothing(options.run):
        return inspect.verify(Path(options.run), options.json)  # says what it lacks, and where shards are instead
    generations = _chosen(options)
    verdicts = []
    with hashing(generations) as hashes:
        checks: list[Check] = [hashes.problem_of, *([deep_problem] if options.deep else [])]
        for generation in generations:
            verdict = examine(generation.path, checks)
            if verdict is None and options.all:
                continue  # the run has deleted it since: not one of all any more
            problem = verdict.problem if verdict else "was deleted while it was looked at"
            verdicts.append({"tag": generation.tag, "step": step_of(generation), "ok": not problem, "problem": problem})
            if not options.json:
                tqdm.write(f"{generation.tag}: {problem or 'ok'}")
    if options.json:
        _print_json(verdicts)
    return exit_report.DONE if all(verdict["ok"] for verdict in verdicts) else exit_report.CRASHED


def prune(options: argparse.Namespace) -> int:
    """``prune``: delete what the run's settings do not keep; exit code 1 if something could not be deleted."""
    place = find_run_directories(options.run)
    if not place.found:
        raise UserError(f"no checkpoints in {place.directory}")
    policies = housekeeping.policies(_settings_of(place))
    doomed = retention.to_delete(housekeeping.retention_candidates(place.directory, _newest_good(place)), policies)
    paths = [place.directory / kept.tag for kept in doomed]
    pruned = _Pruned([path.name for path in paths], freed_by(paths), []) if options.dry_run else _delete(paths)
    if options.json:
        _print_json({"directory": str(place.directory), "dry_run": options.dry_run, **asdict(pruned)})
    else:
        would_be = "would be " if options.dry_run else ""
        lines = [f"{tag} {would_be}deleted" for tag in pruned.deleted] + pruned.failures
        print("\n".join([*lines, f"{size(pruned.freed_bytes)} {would_be}freed"]))
    return exit_report.CRASHED if pruned.failures else exit_report.DONE


@dataclass(frozen=True)
class RunDirectories:
    """A directory of checkpoints, those in it, and the settings of the run that made them where these are known."""

    directory: Path
    found: list[Generation]
    settings: CheckpointSettings | None


def find_run_directories(run: str | None) -> RunDirectories:
    """The checkpoints of ``run``: a run's name or directory, or a directory of checkpoints; None for the newest run.

    Raises:
        UserError: there is no such run, its checkpoints are another run's, or they cannot be looked at.
    """
    try:
        directory = _bare_directory(run)
        if directory is not None:
            return RunDirectories(directory, scan(directory), _settings_of_run_in(directory))
        from ds_gpt2.training.preflight import check_outputs  # it loads what `list` of a directory does not need

        settings = load_run_settings(find_run(run))
        check_outputs(settings)
        return RunDirectories(settings.checkpoint_dir, scan(settings.checkpoint_dir), settings.checkpoint)
    except OSError as error:
        raise UserError(f"the checkpoints of {run or 'the newest run'} cannot be read: {reason_of(error)}") from None


def _is_nothing(name: str) -> bool:
    """Return whether this is a directory, but neither a run's nor one of checkpoints."""
    directory = Path(name)
    if not directory.is_dir() or (directory / MANIFEST).is_file() or role_of(name):
        return False
    is_run = any((path / CONFIG).is_file() for path in (PROJECT_DIR / "runs" / name, directory))
    return not is_run and run_of(directory) is None and _bare_directory(name) is None


def _bare_directory(run: str | None) -> Path | None:
    """Where ``run`` names checkpoints themselves: a backup, or those of a run whose own directory is gone."""
    if run is None or (PROJECT_DIR / "runs" / run / CONFIG).is_file():
        return None
    places = (Path(run), PROJECT_DIR / "checkpoints" / run)
    return next((Path(os.path.abspath(path)) for path in places if scan(path) or unfinished(path)), None)


def _settings_of_run_in(directory: Path) -> CheckpointSettings | None:
    run_dir = run_of(directory)
    return load_run_settings(run_dir).checkpoint if run_dir is not None else None


def _settings_of(place: RunDirectories) -> CheckpointSettings:
    """The run's settings; of a bare directory those that its newest checkpoint was made under.

    Raises:
        UserError: no checkpoint tells.
    """
    if place.settings is not None:
        return place.settings
    for generation in place.found:
        with contextlib.suppress(KeyError, ValidationError):
            if generation.manifest is not None:
                return CheckpointSettings.model_validate(generation.manifest.settings["checkpoint"])
    raise UserError(f"nothing says what to keep in {place.directory}: no checkpoint in it has readable settings")


def _chosen(options: argparse.Namespace) -> list[Generation]:
    """What ``verify`` was asked for.

    Raises:
        UserError: there is no such checkpoint, or none at all.
    """
    if options.run is not None and (Path(options.run) / MANIFEST).is_file():
        return [open_generation(Path(options.run))]
    if options.tag is None and options.run is not None and role_of(options.run):
        options.run, options.tag = None, options.run  # a tag alone, of the newest run
    place = find_run_directories(options.run)
    if not place.found:
        raise UserError(f"no checkpoints in {place.directory}: there is nothing to verify")
    if options.all:
        return place.found
    if options.tag not in (None, LATEST, "auto"):
        return candidates(place.directory, options.tag)[:1]
    return [next((one for one in place.found if not one.is_superseded), place.found[0])]


def _newest_good(place: RunDirectories) -> set[str]:
    """The tags of the newest checkpoints that verify, as many steps as retention protects.

    Raises:
        UserError: bad ones stand in the way of finding so many: then nothing is to be deleted.
    """
    steps: set[int] = set()
    good, bad = set(), set()
    history = [one for one in place.found if one.role in ("rolling", "epoch") and not one.weights_only]
    with hashing([]) as hashes:  # how many are to be read shows on the way
        for generation in history:
            if len(steps) == retention.PROTECTED and generation.step not in steps:
                break
            verdict = examine(generation.path, [hashes.problem_of])
            if verdict is not None and verdict.problem is None:
                steps.add(generation.step)
                good.add(generation.tag)
            elif verdict is not None:
                bad.add(generation.tag)
    if bad and len(steps) < retention.PROTECTED:
        raise UserError(
            f"{len(bad)} checkpoints in {place.directory} are bad and only {len(steps)} good: nothing is deleted;"
            " `./launch.sh verify --all` says what is wrong"
        )
    return good


@dataclass(frozen=True)
class _Pruned:
    """What ``prune --json`` prints."""

    deleted: list[str]
    freed_bytes: int
    failures: list[str]


def _delete(paths: Iterable[Path]) -> _Pruned:
    disk, freed = Disk(), 0
    deleted: list[str] = []
    failures: list[str] = []
    for path in paths:
        if identity(path) is None:
            continue  # the run was faster
        size = freed_by([path])
        try:
            commit.remove(disk, path.parent, path.name)
        except FileNotFoundError:
            pass  # the run deletes it at the same time
        except OSError as error:
            failures.append(f"could not delete {path.name}: {error}")
            continue
        deleted.append(path.name)
        freed += size
    return _Pruned(deleted, freed, failures)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))
