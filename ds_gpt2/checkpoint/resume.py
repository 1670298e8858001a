"""Choose the checkpoint to resume from: the newest intact one, the same on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import content_checks as contents_of
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.storage import redacted_reason
from ds_gpt2.checkpoint.catalog import (
    Generation,
    candidates,
    check_identity,
    describe_files,
    name_in_commands,
    nothing_to_resume,
    problem_of,
    step_limit,
)
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file, unpickle

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint and the content of the files that this rank needs."""

    generation: Generation
    manifest: Manifest
    contents: dict[str, Any]  # by file name; the files of all ranks if another number of ranks saved them


def choose_checkpoint(
    directory: Path, selector: str, identity: dict[str, Any], backup: Backup | None = None
) -> Restored:
    """Return the first intact checkpoint among the candidates for ``selector``; every rank must call this.

    The ranks share the work: each verifies a part of the files and unpickles those it needs. If a candidate is damaged
    on any rank, the reason is logged and all ranks try the next one. If none is left, backups are fetched (for
    ``latest`` and ``auto``).

    Args:
        selector: see ``catalog.candidates``.
        identity: the settings that the checkpoint must share with the run.
        backup: the run's backups, if it has any.

    Raises:
        UserError: on every rank: there is no candidate, all are damaged, or one was saved with another ``identity``.
    """
    tried = []
    for generation in _to_try(directory, selector, backup):
        tried.append(generation.tag)
        if generation.manifest is not None:
            check_identity(generation, generation.manifest, identity)
        reason, contents = _read(generation)
        reasons = [reported for reported in collectives.gather_objects(reason) if reported]
        if not reasons:
            assert generation.manifest is not None
            _warn_if_too_new(generation, selector)
            return Restored(generation, generation.manifest, contents)
        log.warning(f"checkpoint {generation.path} cannot be used: {reasons[0]}")
    if not tried:
        raise nothing_to_resume(directory)
    command = f"./launch.sh resume {name_in_commands(directory)} --from TAG"
    raise UserError(
        f"none of {', '.join(tried)} in {directory} can be used (the reasons are above):"
        f" restore one from a backup, or resume from another: {command}"
    )


def _warn_if_too_new(generation: Generation, selector: str) -> None:
    step = step_limit(selector)
    if step is not None and generation.step >= step:
        log.warning(
            f"no usable checkpoint precedes step {step:,}, where the anomaly began: rolling back to step"
            f" {generation.step:,}, which may already be affected"
        )


def _to_try(directory: Path, selector: str, backup: Backup | None) -> Iterator[Generation]:
    """Yield the candidates, the same on every rank. Backups are fetched only if all others are damaged."""
    yield from collectives.broadcast_from_main(lambda: _local(directory, selector))
    if backup is None or selector not in ("latest", "auto"):
        return
    for tag in collectives.broadcast_slow_from_main(partial(_copies, backup)):
        yield from collectives.broadcast_slow_from_main(partial(_fetched, backup, tag, directory))


def _local(directory: Path, selector: str) -> list[Generation]:
    """Return ``catalog.candidates``; a file in the place of a checkpoint is logged."""
    if (text := describe_files(directory)) is not None:
        log.warning(text)
    return candidates(directory, selector)


def _copies(backup: Backup) -> list[str]:
    try:
        return [copy.tag for copy in backup.copies() if copy.manifest.kind == "full"]
    except OSError as error:
        log.warning(f"backups in {backup.where()} cannot be listed: {redacted_reason(error)}")
        return []


def _fetched(backup: Backup, tag: str, directory: Path) -> list[Generation]:
    log.info(f"fetching {tag} from {backup.where()} ...")
    try:
        return [backup.fetch(tag, directory)]
    except (OSError, DamagedError) as error:
        log.warning(f"{tag} cannot be fetched: {redacted_reason(error)}")
        return []


def _read(generation: Generation) -> tuple[str | None, dict[str, Any]]:
    """Return (the problem or None, the content of this rank's files). The problem is None on all ranks or on none.

    No rank unpickles a file before all ranks have verified their parts.
    """
    problem, contents = _unpickled(generation)
    problems = [reported for reported in collectives.gather_objects(problem) if reported is not None]
    if problems or generation.manifest is None:
        return problem or problems[0], {}
    partitions = [content for name, content in contents.items() if name != MODEL_FILE]
    found = sum(map(contents_of.elements, partitions))
    if generation.manifest.world_size == collectives.world_size():  # each rank has read only its own partition
        found = sum(collectives.gather_objects(found))
    return contents_of.problem_of_sum(found, contents[MODEL_FILE]), contents


def _unpickled(generation: Generation) -> tuple[str | None, dict[str, Any]]:
    problem = problem_of(generation, collectives.rank(), collectives.world_size())
    if generation.weights_only:
        problem = "it contains only weights: export it, or resume from another"
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
    except Exception as error:  # a forged file can raise anything; the other ranks wait in the next collective
        return f"its files cannot be loaded safely: {one_line_reason(error, 300)}", {}
    for name, content in contents.items():
        compare = contents_of.problem_of_model if name == MODEL_FILE else contents_of.problem_of_partition
        if (found := compare(content, generation.manifest)) is not None:
            return f"{name} {found}", {}
    return None, contents
