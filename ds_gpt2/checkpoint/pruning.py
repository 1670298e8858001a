"""Delete the checkpoints that no retention policy keeps, as the command ``prune`` does.

A run may train meanwhile: checkpoints that the run deletes first are not errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.checkpoint import commit, retention
from ds_gpt2.checkpoint.catalog import Generation, name_in_commands
from ds_gpt2.checkpoint.directory import policies, retention_candidates
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.listing import freed_by
from ds_gpt2.checkpoint.verify import Hashes, examine, hashing, identity
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config.settings import CheckpointSettings


@dataclass(frozen=True)
class Pruned:
    """The result of pruning, as ``prune --json`` prints it."""

    deleted: list[str]  # tags
    freed_bytes: int
    failures: list[str]  # messages


def to_prune(directory: Path, found: Sequence[Generation], settings: CheckpointSettings) -> list[Path]:
    """Return the checkpoints that no policy keeps.

    The newest checkpoints that verify are protected, regardless of the settings.

    Args:
        found: all checkpoints in ``directory``, newest first.

    Raises:
        UserError: there are damaged checkpoints and too few good ones.
    """
    known = retention_candidates(directory, _newest_good(directory, found))
    return [directory / kept.tag for kept in retention.to_delete(known, policies(settings))]


def preview(paths: Sequence[Path]) -> Pruned:
    """Return the result that deleting ``paths`` would have."""
    return Pruned([path.name for path in paths], freed_by(paths), [])


def delete(paths: Iterable[Path]) -> Pruned:
    """Delete checkpoints, each atomically."""
    disk, freed = Disk(), 0
    deleted: list[str] = []
    failures: list[str] = []
    for path in paths:
        if identity(path) is None:
            continue  # deleted by the run
        size = freed_by([path])
        try:
            commit.remove(disk, path.parent, path.name)
        except FileNotFoundError:
            pass  # deleted by the run at the same time
        except OSError as error:
            failures.append(f"could not delete {path.name}: {error}")
            continue
        deleted.append(path.name)
        freed += size
    return Pruned(deleted, freed, failures)


def _newest_good(directory: Path, found: Sequence[Generation]) -> set[str]:
    """Return the tags of the newest checkpoints that verify, for as many steps as retention protects.

    Raises:
        UserError: damaged checkpoints leave fewer good ones than that.
    """
    steps: set[int] = set()
    good: set[str] = set()
    history = [each for each in found if each.is_primary]
    with hashing([]) as hashes:  # the number of bytes to read is not known in advance
        is_damaged = False
        for generation in history:
            if len(steps) == retention.PROTECTED and generation.step not in steps:
                break
            verdict = examine(generation.path, [hashes.problem_of])
            if verdict is not None and verdict.problem is None:
                steps.add(generation.step)
                good.add(generation.tag)
            elif verdict is not None:
                is_damaged = True
        if is_damaged and len(steps) < retention.PROTECTED:
            raise _too_few_good(directory, found, len(steps), hashes)
    return good


def _too_few_good(directory: Path, found: Sequence[Generation], steps: int, hashes: Hashes) -> UserError:
    """Return the error for a run with good checkpoints of only ``steps`` steps. Verifies all of ``found``."""
    verdicts = [examine(generation.path, [hashes.problem_of]) for generation in found]
    damaged = sum(verdict is not None and verdict.problem is not None for verdict in verdicts)
    count = "only 1 step" if steps == 1 else "no step"
    return UserError(
        f"nothing is deleted: {directory} has {counted(damaged, 'damaged checkpoint')}; {count} of the run has a good"
        f" one, and {retention.PROTECTED} are required; `./launch.sh verify {name_in_commands(directory)} --all` lists"
        " the problems"
    )
