"""Which checkpoints are kept. Pure functions over a list; deleting is somebody else's job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ds_gpt2.checkpoint.naming import Role

PROTECTED = 2  # so many of the newest verified checkpoints are never deleted


@dataclass(frozen=True)
class RetentionCandidate:
    """What a policy knows of a checkpoint."""

    tag: str
    role: Role
    step: int
    verified: bool  # written or verified by this process, or by one before it that said so
    healthy: bool = False  # saved while the guards found nothing wrong, see ``TrainState.is_healthy``


Policy = Callable[
    [Sequence[RetentionCandidate]], Iterable[RetentionCandidate]
]  # of all checkpoints, newest first, those worth keeping


def keep_last(count: int) -> Policy:
    """The newest ``count`` rolling ones; where there are fewer, superseded ones fill up the number."""
    return lambda found: [*_of(found, "rolling"), *_of(found, "superseded")][:count]


def keep_every(steps: int) -> Policy:
    """Rolling ones at multiples of ``steps``; 0 for none."""
    return lambda found: [kept for kept in _of(found, "rolling") if steps and kept.step % steps == 0]


def keep_epochs(count: int | None) -> Policy:
    """The newest ``count`` ends of epochs; None for all."""
    return lambda found: _of(found, "epoch")[:count]


def keep_best(found: Sequence[RetentionCandidate]) -> Iterable[RetentionCandidate]:
    """The best by validation loss."""
    return _of(found, "best")


def protect(found: Sequence[RetentionCandidate]) -> list[RetentionCandidate]:
    """What no policy and no lack of space may take: the newest two that are verified, the best, and those that a
    rollback resumes from: the newest two healthy ones, and the newest two healthy ones that are verified.

    A process that resumes within a divergence has verified none of those that precede it.
    """
    history = [kept for kept in _newest_first(found) if kept.role in ("rolling", "epoch")]
    verified = {kept for kept in history if kept.verified}
    healthy = {kept for kept in history if kept.healthy}
    protected = {*_newest_two(verified), *_newest_two(healthy), *_newest_two(verified & healthy)}
    return [*(kept for kept in history if kept in protected), *_of(found, "best")]


def to_delete(found: Iterable[RetentionCandidate], policies: Iterable[Policy]) -> list[RetentionCandidate]:
    """What is neither protected nor kept by any policy, oldest first."""
    newest_first = _newest_first(found)
    kept = set(protect(newest_first)).union(*(policy(newest_first) for policy in policies))
    return [one for one in reversed(newest_first) if one not in kept]


def deletion_order(found: Iterable[RetentionCandidate]) -> list[RetentionCandidate]:
    """When the disk is full: what to delete first. Superseded ones, rolling ones, ends of epochs, each oldest first."""
    newest_first = _newest_first(found)
    protected = set(protect(newest_first))
    roles: tuple[Role, ...] = ("superseded", "rolling", "epoch")
    order = [kept for role in roles for kept in reversed(_of(newest_first, role))]
    return [kept for kept in order if kept not in protected]


def _newest_two(found: Iterable[RetentionCandidate]) -> list[RetentionCandidate]:
    """Those of the newest two steps; some steps have several names."""
    found = list(found)
    steps = sorted({kept.step for kept in found}, reverse=True)[:PROTECTED]
    return [kept for kept in found if kept.step in steps]


def _newest_first(found: Iterable[RetentionCandidate]) -> list[RetentionCandidate]:
    return sorted(found, key=lambda kept: (kept.step, kept.tag), reverse=True)


def _of(found: Iterable[RetentionCandidate], role: Role) -> list[RetentionCandidate]:
    return [kept for kept in found if kept.role == role]
