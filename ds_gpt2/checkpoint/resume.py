"""Choosing what a run goes on from: the newest checkpoint that verifies, agreed upon by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import contents as contents_of
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.storage import reason_of
from ds_gpt2.checkpoint.catalog import Generation, before, candidates, check_identity, problem_of
from ds_gpt2.checkpoint.deepspeed_io import MODEL_FILE, partition_file, unpickle
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest
from ds_gpt2.common.errors import UserError
from ds_gpt2.distributed import collectives

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint, and this rank's files of it."""

    generation: Generation
    manifest: Manifest
    contents: dict[str, Any]  # by file name; of all ranks if another number of ranks saved them


def choose_checkpoint(directory: Path, wanted: str, identity: dict[str, Any], backup: Backup | None = None) -> Restored:
    """The first of the candidates for ``wanted`` whose every byte is as it was written; every rank calls this.

    Ranks share the reading: each verifies its part of the files and unpickles what it needs. A candidate that is bad on
    any rank is named with the reason, and all go on to the next. Where no newest one is left, copies are fetched.

    Args:
        wanted: see ``catalog.candidates``.
        identity: what the checkpoint must share with the run.
        backup: the run's copies, if it has any.

    Raises:
        UserError: on every rank: nothing fits ``wanted``, all that does is bad, or it is of another run's making.
    """
    tried = []
    for generation in _to_try(directory, wanted, backup):
        tried.append(generation.tag)
        if generation.manifest is not None:
            check_identity(generation, generation.manifest, identity)
        reason, contents = _read(generation)
        reasons = [one for one in collectives.gather_objects(reason) if one]
        if not reasons:
            assert generation.manifest is not None
            _warn_if_too_new(generation, wanted)
            return Restored(generation, generation.manifest, contents)
        log.warning(f"checkpoint {generation.path} cannot be used: {reasons[0]}")
    if not tried:
        raise UserError(f"nothing to resume: {directory} has no checkpoint; start a new run")
    raise UserError(
        f"none of {', '.join(tried)} in {directory} can be used (the reasons are above):"
        f" restore one from a backup, or resume from another: ./launch.sh resume {directory.name} --from TAG"
    )


def _warn_if_too_new(generation: Generation, wanted: str) -> None:
    step = before(wanted)
    if step is not None and generation.step >= step:
        log.warning(
            f"no good checkpoint precedes step {step:,}, where the trouble began: going back to step"
            f" {generation.step:,}, which may have it already"
        )


def _to_try(directory: Path, wanted: str, backup: Backup | None) -> Iterator[Generation]:
    """Candidates, the same on every rank; a copy is fetched only when all before it were bad."""
    yield from collectives.broadcast_from_main(lambda: candidates(directory, wanted))
    if backup is None or wanted not in ("latest", "auto"):
        return
    for tag in collectives.broadcast_slow_from_main(partial(_copies, backup)):
        yield from collectives.broadcast_slow_from_main(partial(_fetched, backup, tag, directory))


def _copies(backup: Backup) -> list[str]:
    try:
        return [copy.tag for copy in backup.copies() if copy.manifest.kind == "full"]
    except OSError as error:
        log.warning(f"backups in {backup.where()} cannot be looked at: {reason_of(error)}")
        return []


def _fetched(backup: Backup, tag: str, directory: Path) -> list[Generation]:
    log.info(f"fetching {tag} from {backup.where()} ...")
    try:
        return [backup.fetch(tag, directory)]
    except (OSError, DamagedError) as error:
        log.warning(f"{tag} cannot be fetched: {reason_of(error)}")
        return []


def _read(generation: Generation) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong, this rank's files), alike on all ranks but for the files: read, unpickled and compared.

    Nothing is unpickled on any rank before all ranks' parts are verified.
    """
    problem, contents = _unpickled(generation)
    problems = [one for one in collectives.gather_objects(problem) if one is not None]
    if problems or generation.manifest is None:
        return problem or problems[0], {}
    partitions = [content for name, content in contents.items() if name != MODEL_FILE]
    found = sum(map(contents_of.elements, partitions))
    if generation.manifest.world_size == collectives.world_size():  # each rank has its own
        found = sum(collectives.gather_objects(found))
    return contents_of.problem_of_sum(found, contents[MODEL_FILE]), contents


def _unpickled(generation: Generation) -> tuple[str | None, dict[str, Any]]:
    problem = problem_of(generation, collectives.rank(), collectives.world_size())
    if generation.weights_only:
        problem = "it holds weights only: export it, or resume from another"
    problems = collectives.gather_objects(problem)
    if any(problems) or generation.manifest is None:
        return problem, {}
    saved_by = generation.manifest.world_size
    ranks = [collectives.rank()] if saved_by == collectives.world_size() else range(saved_by)
    names = [MODEL_FILE, *map(partition_file, ranks)]
    if unlisted := [name for name in names if name not in generation.manifest.files]:
        return f"its manifest does not list {unlisted[0]}", {}
    try:
        contents = {name: unpickle(generation.path / name) for name in names}
    except Exception as error:  # whatever a forged file may bring about: the other ranks wait for this one's word
        return f"its files cannot be loaded safely: {' '.join(str(error).split())[:300]}", {}
    for name, content in contents.items():
        compare = contents_of.problem_of_model if name == MODEL_FILE else contents_of.problem_of_partition
        if (found := compare(content, generation.manifest)) is not None:
            return f"{name} {found}", {}
    return None, contents
