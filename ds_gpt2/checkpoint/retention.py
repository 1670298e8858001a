"""Retention: which checkpoints to retain and which to delete. Pure functions over a list; nothing is deleted here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ds_gpt2.checkpoint.naming import Role

PROTECTED = 2  # the number of newest verified checkpoints that are never deleted


@dataclass(frozen=True)
class RetentionCandidate:
    """The properties of a checkpoint that retention policies use."""

    tag: str
    role: Role
    step: int
    verified: bool  # written or verified by this process, or recorded as such by an earlier one
    healthy: bool = False  # the guards had found no anomaly when it was saved, see ``TrainState.is_healthy``


# From all checkpoints, newest first, selects those to retain.
Policy = Callable[[Sequence[RetentionCandidate]], Iterable[RetentionCandidate]]


def keep_last(count: int) -> Policy:
    """Retain the newest ``count`` rolling checkpoints; if there are fewer, superseded ones make up the number."""
    return lambda found: [*_of(found, "rolling"), *_of(found, "superseded")][:count]


def keep_every(steps: int) -> Policy:
    """Retain the rolling checkpoints at multiples of ``steps``; 0 for none."""
    return lambda found: [candidate for candidate in _of(found, "rolling") if steps and candidate.step % steps == 0]


def keep_epochs(count: int | None) -> Policy:
    """Retain the newest ``count`` epoch checkpoints; None for all."""
    return lambda found: _of(found, "epoch")[:count]


def keep_best(found: Sequence[RetentionCandidate]) -> Iterable[RetentionCandidate]:
    """Retain the checkpoint with the best validation loss."""
    return _of(found, "best")


def protect(found: Sequence[RetentionCandidate]) -> list[RetentionCandidate]:
    """Return the checkpoints that are never deleted, regardless of the policies and the free space.

    These are the newest two verified checkpoints, the best, and those that a rollback needs: the newest two healthy
    ones, and the newest two that are healthy and verified. The last rule matters if a process resumes during a
    divergence: it has verified no checkpoint from before the divergence.
    """
    history = [candidate for candidate in _newest_first(found) if candidate.role in ("rolling", "epoch")]
    verified = {candidate for candidate in history if candidate.verified}
    healthy = {candidate for candidate in history if candidate.healthy}
    protected = {*_newest_two(verified), *_newest_two(healthy), *_newest_two(verified & healthy)}
    return [*(candidate for candidate in history if candidate in protected), *_of(found, "best")]


def to_delete(found: Iterable[RetentionCandidate], policies: Iterable[Policy]) -> list[RetentionCandidate]:
    """Return the checkpoints that are neither protected nor retained by a policy, oldest first."""
    newest_first = _newest_first(found)
    retained = set(protect(newest_first)).union(*(policy(newest_first) for policy in policies))
    return [candidate for candidate in reversed(newest_first) if candidate not in retained]


def deletion_order(found: Iterable[RetentionCandidate]) -> list[RetentionCandidate]:
    """Return the checkpoints that may be deleted if the disk is full, in this order.

    Superseded checkpoints come first, then rolling, then epoch checkpoints, each oldest first.
    """
    newest_first = _newest_first(found)
    protected = set(protect(newest_first))
    roles: tuple[Role, ...] = ("superseded", "rolling", "epoch")
    order = [candidate for role in roles for candidate in reversed(_of(newest_first, role))]
    return [candidate for candidate in order if candidate not in protected]


def _newest_two(found: Iterable[RetentionCandidate]) -> list[RetentionCandidate]:
    """Return the candidates of the newest two steps; a step may have several tags."""
    found = list(found)
    steps = sorted({candidate.step for candidate in found}, reverse=True)[:PROTECTED]
    return [candidate for candidate in found if candidate.step in steps]


def _newest_first(found: Iterable[RetentionCandidate]) -> list[RetentionCandidate]:
    return sorted(found, key=lambda candidate: (candidate.step, candidate.tag), reverse=True)


def _of(found: Iterable[RetentionCandidate], role: Role) -> list[RetentionCandidate]:
    return [candidate for candidate in found if candidate.role == role]
