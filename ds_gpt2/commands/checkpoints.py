"""``list``, ``verify`` and ``prune``: which checkpoints a run has, whether they are good, and away with the old ones.

All three may be used while the run trains: what it replaces or deletes meanwhile is no error, and what it is writing
is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from tqdm import tqdm

from ds_gpt2 import outcome
from ds_gpt2.checkpoint import commit, housekeeping, manifest, retention
from ds_gpt2.checkpoint.disk import Disk
from ds_gpt2.checkpoint.generations import Generation, candidates, open_generation, scan
from ds_gpt2.checkpoint.layout import LATEST, LATEST_BACKUP, MANIFEST, PARTIAL, role_of
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.commands.train import find_run
from ds_gpt2.config import PROJECT_DIR, CheckpointSettings, Settings, load_settings
from ds_gpt2.errors import UserError

Check = Callable[[Generation], str | None]  # what is wrong with a checkpoint whose manifest is good; None if nothing


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
        "run", nargs="?", metavar="RUN", help="a run's name, or a directory of checkpoints (default: the newest run)"
    )
    parser.add_argument("--json", action="store_true", help="for programs to read")


def show(options: argparse.Namespace) -> int:
    """``list``: a table of the checkpoints, newest first, and of what is unfinished."""
    place = _find(options.run)
    rows = [*_rows(place), *(_unfinished_row(path, what) for path, what in _unfinished(place.directory).items())]
    if options.json:
        _print_json([asdict(row) for row in rows])
    elif rows:
        print(f"{place.directory}\n\n{_table(rows)}")
    else:
        print(f"no checkpoints in {place.directory}")
    return outcome.DONE


def verify(options: argparse.Namespace) -> int:
    """``verify``: one line for each checkpoint asked for; exit code 1 if any is bad."""
    generations = _chosen(options)
    verdicts = []
    with _hashing(generations) as hashes:
        checks: list[Check] = [hashes.problem_of, *([_deep_problem] if options.deep else [])]
        for generation in generations:
            verdict = _examine(generation.path, checks)
            if verdict is None and options.all:
                continue  # the run has deleted it since: not one of all any more
            problem = verdict.problem if verdict else "was deleted while it was looked at"
            verdicts.append({"tag": generation.tag, "step": _step(generation), "ok": not problem, "problem": problem})
            if not options.json:
                tqdm.write(f"{generation.tag}: {problem or 'ok'}")
    if options.json:
        _print_json(verdicts)
    return outcome.DONE if all(verdict["ok"] for verdict in verdicts) else outcome.CRASHED


def prune(options: argparse.Namespace) -> int:
    """``prune``: delete what the run's settings do not keep; exit code 1 if something could not be deleted."""
    place = _find(options.run)
    policies = housekeeping.policies(_settings_of(place))
    doomed = retention.to_delete(housekeeping.known(place.directory, _newest_good(place)), policies)
    paths = [place.directory / kept.tag for kept in doomed]
    pruned = _Pruned([path.name for path in paths], _freed_by(paths), []) if options.dry_run else _delete(paths)
    if options.json:
        _print_json({"directory": str(place.directory), "dry_run": options.dry_run, **asdict(pruned)})
    else:
        would_be = "would be " if options.dry_run else ""
        lines = [f"{tag} {would_be}deleted" for tag in pruned.deleted] + pruned.failures
        print("\n".join([*lines, f"{_size(pruned.freed_bytes)} {would_be}freed"]))
    return outcome.CRASHED if pruned.failures else outcome.DONE


@dataclass(frozen=True)
class _Place:
    """A directory of checkpoints, those in it, and the settings of the run that made them where these are known."""

    directory: Path
    found: list[Generation]
    settings: CheckpointSettings | None


def _find(run: str | None) -> _Place:
    """The checkpoints of ``run``: a run's name or directory, or a directory of checkpoints; None for the newest run.

    Raises:
        UserError: there is no such run, or its checkpoints cannot be looked at.
    """
    try:
        directory = _bare_directory(run)
        if directory is not None:
            return _Place(directory, scan(directory), _settings_of_run_in(directory))
        settings = _settings_by_name(run)
        return _Place(settings.checkpoint_dir, scan(settings.checkpoint_dir), settings.checkpoint)
    except OSError as error:
        raise UserError(f"the checkpoints of {run or 'the newest run'} cannot be read: {error}") from None


def _settings_by_name(run: str | None) -> Settings:
    """The settings of a run. The path of a backup that is not there must not be taken for the run of that name."""
    run_dir = find_run(run)
    settings = load_settings(run_dir / "config.yaml")
    meant = {run_dir.resolve(), settings.checkpoint_dir.resolve()}
    if run is not None and meant.isdisjoint({Path(run).resolve(), (PROJECT_DIR / "runs" / run).resolve()}):
        raise UserError(f"no checkpoints in {run}: give a directory that holds some, or a run's name")
    return settings


def _bare_directory(run: str | None) -> Path | None:
    """Where ``run`` names checkpoints themselves: a backup, or those of a run whose own directory is gone."""
    if run is None or (PROJECT_DIR / "runs" / run / "config.yaml").is_file():
        return None
    places = (Path(run), PROJECT_DIR / "checkpoints" / run)
    return next((path for path in places if scan(path) or _unfinished(path)), None)


def _settings_of_run_in(directory: Path) -> CheckpointSettings | None:
    config = PROJECT_DIR / "runs" / directory.resolve().name / "config.yaml"
    if not config.is_file():
        return None
    settings = load_settings(config)
    return settings.checkpoint if settings.checkpoint_dir.resolve() == directory.resolve() else None


def _settings_of(place: _Place) -> CheckpointSettings:
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
    place = _find(options.run)
    if not place.found:
        raise UserError(f"no checkpoints in {place.directory}: there is nothing to verify")
    if options.all:
        return place.found
    if options.tag not in (None, LATEST, "auto"):
        return candidates(place.directory, options.tag)[:1]
    return [next((one for one in place.found if one.role != "superseded"), place.found[0])]


@dataclass(frozen=True)
class _Verdict:
    generation: Generation
    problem: str | None


def _examine(path: Path, checks: Iterable[Check]) -> _Verdict | None:
    """The checkpoint in ``path`` and the first thing wrong with it; None if it is there no more.

    A run may replace it (``best_model``) or delete it between two reads: what was found wrong is then not.
    """
    while (before := _mark(path)) is not None:
        generation = open_generation(path)
        problem = generation.problem or next((found for check in checks if (found := check(generation))), None)
        if problem is None or _mark(path) == before:
            return _Verdict(generation, problem)
    return None


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when another checkpoint takes this place; None where there is none."""
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _newest_good(place: _Place) -> set[str]:
    """The tags of the newest checkpoints that verify, as many steps as retention protects.

    Raises:
        UserError: bad ones stand in the way of finding so many: then nothing is to be deleted.
    """
    steps: set[int] = set()
    good, bad = set(), set()
    history = [one for one in place.found if one.role in ("rolling", "epoch") and not one.weights_only]
    with _hashing([]) as hashes:  # how many are to be read shows on the way
        for generation in history:
            if len(steps) == retention.PROTECTED and generation.step not in steps:
                break
            verdict = _examine(generation.path, [hashes.problem_of])
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
        if _mark(path) is None:
            continue  # the run was faster
        size = _freed_by([path])
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


class _Hashes:
    """Reads the files of checkpoints again, one with several names only once. Shows a bar on a terminal."""

    def __init__(self, generations: Iterable[Generation]) -> None:
        total = sum(entry.bytes for generation in generations for entry in _entries(generation).values())
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", leave=False, disable=None, delay=1)
        self._seen: dict[tuple[int, int, FileEntry], str | None] = {}

    def problem_of(self, generation: Generation) -> str | None:
        """Why a file is not the one that was written; None if all are. Sizes come first, they cost nothing."""
        problem = _wrong_size(generation)
        for name, entry in _entries(generation).items():
            problem = problem or self._problem_of_file(generation.path, name, entry)
            self.bar.update(entry.bytes)
        return problem

    def _problem_of_file(self, checkpoint: Path, name: str, entry: FileEntry) -> str | None:
        try:
            status = (checkpoint / name).stat()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        key = (status.st_dev, status.st_ino, entry)
        if key not in self._seen:
            self._seen[key] = manifest.problem_of(checkpoint, name, entry)
        return self._seen[key]


@contextlib.contextmanager
def _hashing(generations: Iterable[Generation]) -> Iterator[_Hashes]:
    hashes = _Hashes(generations)
    try:
        yield hashes
    finally:
        hashes.bar.close()


def _wrong_size(generation: Generation) -> str | None:
    problems = (manifest.size_problem_of(generation.path, name, entry) for name, entry in _entries(generation).items())
    return next((problem for problem in problems if problem is not None), None)


def _entries(generation: Generation) -> Mapping[str, FileEntry]:
    return generation.manifest.files if generation.manifest is not None else {}


def _deep_problem(generation: Generation) -> str | None:
    """What hashes cannot show: files that do not load, numbers that are not finite, tensors of another model."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for one when it is imported; a run may have them
    from ds_gpt2.checkpoint.serializer import MODEL_FILE, partition_file, unpickle
    from ds_gpt2.checkpoint.weights import WEIGHTS_FILE

    assert generation.manifest is not None
    files, ranks = generation.manifest.files, generation.manifest.world_size
    full = [MODEL_FILE, *map(partition_file, range(min(ranks, len(files))))]  # a forged number of ranks may be huge
    if missing := [name for name in ([WEIGHTS_FILE] if generation.weights_only else full) if name not in files]:
        return f"{MANIFEST} does not list {missing[0]}"
    for name in sorted(files):
        if not name.endswith(".pt"):
            continue
        try:
            content = unpickle(generation.path / name)
        except Exception as error:  # there is no end to the ways in which unpickling fails
            return f"{name} cannot be loaded safely: {' '.join(str(error).split())[:300]}"
        if (where := _not_finite(content, name)) is not None:
            return f"{where} has numbers that are not finite"
        if name in (MODEL_FILE, WEIGHTS_FILE) and (problem := _wrong_shape(content, generation.manifest)) is not None:
            return f"{name}: {problem}"
    return None


def _not_finite(content: Any, name: str) -> str | None:
    """Where in ``content`` a tensor has a NaN or an infinity."""
    import torch

    if isinstance(content, torch.Tensor):
        return None if not content.is_floating_point() or bool(content.isfinite().all()) else name
    if isinstance(content, Mapping):
        items: Iterable[tuple[Any, Any]] = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    else:
        return None
    return next((where for key, item in items if (where := _not_finite(item, f"{name}: {key}"))), None)


def _wrong_shape(content: Any, known: Manifest) -> str | None:
    """Where the weights are not those of the model that the manifest names."""
    import torch

    from ds_gpt2.model import GPT2, ModelShape

    try:
        shape = ModelShape(
            **{name: known.identity[f"model.{name}"] for name in ("layers", "heads", "width")},
            sequence_length=known.identity["batch.sequence_length"],
        )
        with torch.device("meta"):
            model = GPT2(shape, dropout=0.0)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {str(name): tuple(tensor.shape) for name, tensor in content.get("module", content).items()}
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        return f"it cannot be compared with {MANIFEST}: {error!r}"
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not a tensor of this model"
        if found[name] != expected[name]:
            return f"{name} has the shape {found[name]}, {expected[name]} fits {MANIFEST}"
    return None


@dataclass(frozen=True)
class _Row:
    """One checkpoint, or what is left of one, as ``list --json`` prints it."""

    tag: str
    kind: Literal["full", "weights", "unknown", "unfinished"]
    step: int | None
    epoch: float | None
    created: str | None
    age_seconds: float | None
    bytes: int
    freed_bytes: int  # if it is deleted and nothing else
    roles: list[str]  # other tags of the same files
    val_loss: float | None
    pointers: list[str]  # of latest and latest_backup those that name it
    resumable: bool
    problem: str | None


def _rows(place: _Place) -> list[_Row]:
    inodes = {generation.tag: _inodes(generation.path) for generation in place.found}
    pointers = {name: commit.read_pointer(place.directory, name) for name in (LATEST, LATEST_BACKUP)}
    rows = []
    for tag in inodes:
        verdict = _examine(place.directory / tag, [_wrong_size])
        if verdict is not None:
            roles = [other for other in inodes if other != tag and inodes[other] & inodes[tag]]
            rows.append(_row(verdict, roles, [name for name, target in pointers.items() if target == tag]))
    return rows


def _row(verdict: _Verdict, roles: list[str], pointers: list[str]) -> _Row:
    generation, known = verdict.generation, verdict.generation.manifest
    return _Row(
        tag=generation.tag,
        kind=known.kind if known else "unknown",
        step=_step(generation),
        epoch=_finite(known.epoch) if known else None,
        created=known.created if known else None,
        age_seconds=_age(known.created) if known else None,
        bytes=_bytes_in(generation.path),
        freed_bytes=_freed_by([generation.path]),
        roles=roles,
        val_loss=_finite(known.val_loss) if known else None,
        pointers=pointers,
        resumable=not verdict.problem and not generation.weights_only,
        problem=verdict.problem,
    )


def _unfinished(directory: Path) -> dict[Path, str]:
    """Directories of our making that are no checkpoint yet, or not any more; and what they are."""
    found = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        partial = path.name.endswith(PARTIAL)
        if role_of(path.name.removesuffix(PARTIAL)) and path.is_dir() and (partial or not (path / MANIFEST).exists()):
            found[path] = f"being {'written' if partial else 'deleted'}, or left by a crash"
    return found


def _unfinished_row(path: Path, what: str) -> _Row:
    return _Row(
        tag=path.name,
        kind="unfinished",
        step=None,
        epoch=None,
        created=None,
        age_seconds=None,
        bytes=_bytes_in(path),
        freed_bytes=_freed_by([path]),
        roles=[],
        val_loss=None,
        pointers=[],
        resumable=False,
        problem=what,
    )


def _bytes_in(directory: Path) -> int:
    return sum({(file.st_dev, file.st_ino): file.st_size for file in _files_in([directory])}.values())


def _inodes(directory: Path) -> set[tuple[int, int]]:
    return {(file.st_dev, file.st_ino) for file in _files_in([directory])}


def _freed_by(directories: Iterable[Path]) -> int:
    """The bytes that deleting ``directories`` gives back: a file goes with the last of its names."""
    files = _files_in(directories)
    names = Counter((file.st_dev, file.st_ino) for file in files)
    sizes = {
        (file.st_dev, file.st_ino): file.st_size for file in files if file.st_nlink <= names[file.st_dev, file.st_ino]
    }
    return sum(sizes.values())


def _files_in(directories: Iterable[Path]) -> list[os.stat_result]:
    """The status of every file, once for each of its names; one that vanishes meanwhile is left out."""
    found = []
    for directory in directories:
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False):
                        found.append(entry.stat(follow_symlinks=False))
    return found


def _step(generation: Generation) -> int | None:
    return generation.step if generation.step >= 0 else None


def _finite(number: object) -> float | None:
    return number if isinstance(number, float) and math.isfinite(number) else None


def _age(created: str) -> float | None:
    """Seconds since then; None where the text is no time."""
    with contextlib.suppress(ValueError, OverflowError):
        return round(time.time() - datetime.fromisoformat(created).timestamp(), 1)
    return None


def _table(rows: Sequence[_Row]) -> str:
    cells = [("tag", "step", "epoch", "age", "size", "frees", "val loss", "state"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *middle, last = range(len(widths))
    return "\n".join(
        "  ".join([line[first].ljust(widths[first]), *(line[i].rjust(widths[i]) for i in middle), line[last]])
        for line in cells
    )


def _cells(row: _Row) -> tuple[str, ...]:
    return (
        row.tag,
        "" if row.step is None else str(row.step),
        "" if row.epoch is None else f"{row.epoch:.2f}",
        "" if row.age_seconds is None else _duration(row.age_seconds),
        _size(row.bytes),
        _size(row.freed_bytes),
        "" if row.val_loss is None else f"{row.val_loss:.4f}",
        "; ".join([_state(row), *row.pointers, *([f"same files as {', '.join(row.roles)}"] if row.roles else [])]),
    )


def _state(row: _Row) -> str:
    if row.problem is not None:
        return row.problem if row.kind == "unfinished" else f"BAD: {row.problem}"
    return "weights only" if row.kind == "weights" else "resumable"


def _duration(seconds: float) -> str:
    """``200000`` as ``2d 7h``, ``11520`` as ``3h 12m``; to the minute."""
    minutes = max(0, int(seconds)) // 60
    if minutes >= 1440:
        return f"{minutes // 1440}d {minutes // 60 % 24}h"
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))
