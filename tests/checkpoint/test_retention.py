"""Retention: which checkpoints are deleted, and which never are, for any checkpoints and policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.checkpoint import retention
from ds_gpt2.checkpoint.naming import BEST_TAG, Role, epoch_tag, rolling_tag, superseded_tag
from ds_gpt2.checkpoint.retention import Policy, RetentionCandidate

_steps = st.integers(0, 30)


@st.composite
def _found(draw: st.DrawFn) -> list[RetentionCandidate]:
    """Generate checkpoints of a run in any order; some steps have several tags, each verified or not."""
    found = []
    tags: dict[Role, Callable[[int], str]] = {"rolling": rolling_tag, "epoch": epoch_tag, "superseded": superseded_tag}
    for role, tag in tags.items():
        for step in draw(st.sets(_steps, max_size=12)):
            found.append(RetentionCandidate(tag(step), role, step, draw(st.booleans())))
    if draw(st.booleans()):
        found.append(RetentionCandidate(BEST_TAG, "best", draw(_steps), draw(st.booleans())))
    return draw(st.permutations(found))


_policies = st.lists(
    st.one_of(
        st.builds(retention.keep_last, st.integers(1, 15)),
        st.builds(retention.keep_every, st.integers(0, 10)),
        st.builds(retention.keep_epochs, st.none() | st.integers(1, 10)),
        st.just(retention.keep_best),
        st.builds(lambda steps: lambda found: [one for one in found if one.step in steps], st.sets(_steps)),
    ),
    max_size=4,
)


def _untouchable(found: Iterable[RetentionCandidate]) -> set[RetentionCandidate]:
    """Return the best, and the newest two verified steps of the history under all their verified tags."""
    verified = [one for one in found if one.verified and one.role in ("rolling", "epoch")]
    newest = sorted({one.step for one in verified})[-2:]
    return {one for one in verified if one.step in newest} | {one for one in found if one.role == "best"}


@given(_found(), _policies)
def test_the_newest_two_verified_and_the_best_are_never_deleted(
    found: list[RetentionCandidate], policies: list[Policy]
) -> None:
    assert _untouchable(found).isdisjoint(retention.to_delete(found, policies))
    assert _untouchable(found).isdisjoint(retention.deletion_order(found))


@given(_found())
def test_checkpoints_that_no_policy_retains_are_deleted(found: list[RetentionCandidate]) -> None:
    """Otherwise the properties above would hold for a function that deletes nothing."""
    assert set(retention.to_delete(found, [])) == set(found) - _untouchable(found)
    assert set(retention.deletion_order(found)) == set(found) - _untouchable(found)


@given(_found(), _policies)
def test_checkpoints_that_a_policy_retains_are_not_deleted(
    found: list[RetentionCandidate], policies: list[Policy]
) -> None:
    newest_first = sorted(found, key=lambda one: (one.step, one.tag), reverse=True)
    deleted = set(retention.to_delete(found, policies))
    for policy in policies:
        assert deleted.isdisjoint(policy(newest_first))


@given(_found(), _policies, _policies)
def test_several_policies_retain_the_union(
    found: list[RetentionCandidate], some: list[Policy], others: list[Policy]
) -> None:
    together = retention.to_delete(found, some + others)
    assert set(together) == set(retention.to_delete(found, some)) & set(retention.to_delete(found, others))
    assert together == retention.to_delete(found, others + some)


@given(_found(), _policies, st.randoms())
def test_the_result_does_not_depend_on_the_order_of_the_checkpoints(
    found: list[RetentionCandidate], policies: list[Policy], order: Random
) -> None:
    shuffled = order.sample(found, len(found))
    assert retention.to_delete(found, policies) == retention.to_delete(shuffled, policies)
    assert retention.deletion_order(found) == retention.deletion_order(shuffled)


@given(_found(), _policies)
def test_the_oldest_checkpoint_is_deleted_first(found: list[RetentionCandidate], policies: list[Policy]) -> None:
    steps = [one.step for one in retention.to_delete(found, policies)]
    assert steps == sorted(steps)


@given(_found())
def test_the_deletion_order_is_superseded_rolling_epochs_each_oldest_first(
    found: list[RetentionCandidate],
) -> None:
    order = [(one.role, one.step) for one in retention.deletion_order(found)]
    assert order == sorted(order, key=lambda one: (["superseded", "rolling", "epoch"].index(one[0]), one[1]))


ROLLING = [RetentionCandidate(rolling_tag(step), "rolling", step, False) for step in (600, 500, 400, 300, 200, 100)]
EPOCHS = [RetentionCandidate(epoch_tag(number), "epoch", 150 * number, False) for number in (3, 2, 1)]
SUPERSEDED = [RetentionCandidate(superseded_tag(step), "superseded", step, False) for step in (900, 800)]
BEST = RetentionCandidate(BEST_TAG, "best", 100, False)
ALL = [*SUPERSEDED, *ROLLING, *EPOCHS, BEST]


def test_each_policy_by_example() -> None:
    assert list(retention.keep_last(2)(ALL)) == ROLLING[:2]
    assert list(retention.keep_last(7)(ALL)) == [*ROLLING, SUPERSEDED[0]]
    assert [one.step for one in retention.keep_every(200)(ALL)] == [600, 400, 200]
    assert list(retention.keep_every(0)(ALL)) == []
    assert list(retention.keep_epochs(2)(ALL)) == EPOCHS[:2]
    assert list(retention.keep_epochs(None)(ALL)) == EPOCHS
    assert list(retention.keep_best(ALL)) == [BEST]


def test_two_tags_of_one_step_count_as_one_checkpoint() -> None:
    """The newest two are two steps; an epoch checkpoint of the same step and files does not count separately."""
    found = [
        RetentionCandidate(epoch_tag(2), "epoch", 600, True),
        *(RetentionCandidate(one.tag, "rolling", one.step, True) for one in ROLLING),
    ]
    assert [one.tag for one in retention.protect(found)] == [rolling_tag(600), epoch_tag(2), rolling_tag(500)]


def test_the_newest_two_healthy_checkpoints_are_retained_during_a_divergence() -> None:
    found = [RetentionCandidate(one.tag, "rolling", one.step, True, healthy=one.step <= 300) for one in ROLLING]
    assert [one.step for one in retention.to_delete(found, [retention.keep_last(1)])] == [100, 400]
    assert [one.step for one in retention.deletion_order(found)] == [100, 400]


def test_the_newest_two_healthy_checkpoints_are_retained_if_the_run_restarts_during_a_divergence() -> None:
    """The new process has verified only the checkpoint that it resumes from and those that it saves."""
    found = [
        RetentionCandidate(one.tag, "rolling", one.step, verified=one.step >= 500, healthy=one.step in (100, 200, 300))
        for one in ROLLING
    ]
    assert [one.step for one in retention.to_delete(found, [retention.keep_last(1)])] == [100, 400]
    assert [one.step for one in retention.deletion_order(found)] == [100, 400]


def test_unverified_healthy_checkpoints_do_not_replace_verified_ones() -> None:
    found = [
        RetentionCandidate(one.tag, "rolling", one.step, verified=one.step <= 300, healthy=True) for one in ROLLING
    ]
    assert [one.step for one in retention.to_delete(found, [])] == [100, 400]


def test_unverified_checkpoints_do_not_count_as_the_newest_two() -> None:
    found = [*ROLLING[:3], *(RetentionCandidate(one.tag, "rolling", one.step, True) for one in ROLLING[3:])]
    assert [one.step for one in retention.to_delete(found, [retention.keep_last(1)])] == [100, 400, 500]
