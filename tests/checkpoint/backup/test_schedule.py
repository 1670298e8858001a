"""The decision which checkpoints are due for a copy."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_backup import (
    SETTINGS,
    changed_settings,
    link,
    save,
)

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.schedule import BackupSchedule
from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.naming import BEST_TAG, epoch_tag, rolling_tag


@pytest.mark.parametrize(
    ("commits", "copied"),
    [
        ([("", 100), ("", 150), ("", 200)], [[rolling_tag(100)], [], [rolling_tag(200)]]),
        (
            [("", 90), ("", 180), ("", 190)],
            [[rolling_tag(90)], [], [rolling_tag(190)]],
        ),  # the interval counts from the last copy
        ([("", 500), ("", 400)], [[rolling_tag(500)], [rolling_tag(400)]]),  # the run was rolled back
        ([("epoch_00001", 100), ("epoch_00002", 150)], [["epoch_00001", rolling_tag(100)], ["epoch_00002"]]),
        ([("best_model", 100), ("best_model", 150)], [["best_model", rolling_tag(100)], []]),
        ([("epoch_00001 best_model", 100)], [["epoch_00001", "best_model", rolling_tag(100)]]),
    ],
)
def test_due_checkpoints(commits: list[tuple[str, int]], copied: list[list[str]]) -> None:
    schedule = BackupSchedule(SETTINGS, lambda: 0.0)
    assert [schedule.take(rolling_tag(step), roles.split(), step) for roles, step in commits] == copied


def test_only_the_configured_roles_are_due() -> None:
    roles = [epoch_tag(1), BEST_TAG]
    assert BackupSchedule(changed_settings(roles=("latest",))).due("rolling_step_000100", roles, 100) == [
        rolling_tag(100)
    ]
    assert BackupSchedule(changed_settings(roles=("epoch",))).due("rolling_step_000100", roles, 100) == [epoch_tag(1)]
    assert BackupSchedule(changed_settings(roles=("best",))).due("rolling_step_000100", roles, 100) == [BEST_TAG]
    assert BackupSchedule(changed_settings(roles=())).due("rolling_step_000100", roles, 100) == []


def test_a_best_checkpoint_is_copied_after_the_minimum_interval() -> None:
    hour = [0.0]
    schedule = BackupSchedule(changed_settings(roles=("best",)), lambda: hour[0] * 3600)
    taken = []
    for hours, roles in ((0, [BEST_TAG]), (1, []), (2, [BEST_TAG]), (167, []), (168, []), (400, [])):
        hour[0] = hours
        taken.append(schedule.take(rolling_tag(hours), roles, hours))
    assert taken == [[BEST_TAG], [], [], [], [BEST_TAG], []]


def test_a_failed_copy_is_due_again() -> None:
    schedule = BackupSchedule(SETTINGS, lambda: 0.0)
    assert schedule.take(rolling_tag(100), [epoch_tag(1), BEST_TAG], 100) == [epoch_tag(1), BEST_TAG, rolling_tag(100)]
    schedule.failed(epoch_tag(1))
    schedule.failed(BEST_TAG)
    assert schedule.take(rolling_tag(110), [], 110) == [epoch_tag(1), BEST_TAG]
    assert schedule.take(rolling_tag(120), [], 120) == []
    assert schedule.take(rolling_tag(200), [], 200) == [rolling_tag(200)]
    schedule.failed(rolling_tag(200))
    assert schedule.take(rolling_tag(210), [], 210) == [rolling_tag(210)]


@given(
    commits=st.lists(
        st.tuples(st.integers(1, 80), st.floats(0.1, 100), st.booleans(), st.booleans(), st.booleans()), max_size=40
    )
)
def test_copies_respect_the_minimum_intervals_and_no_epoch_is_missed(
    commits: list[tuple[int, float, bool, bool, bool]],
) -> None:
    """For any order of commits, ends of epochs, new best checkpoints, and failures."""
    clock, step, epochs = 0.0, 0, 0
    schedule = BackupSchedule(SETTINGS, lambda: clock)
    done: list[tuple[str, int, float]] = []
    for steps, hours, is_epoch, is_best, fails in commits:
        clock, step = clock + hours * 3600, step + steps
        epochs += is_epoch
        roles = [epoch_tag(epochs)] * is_epoch + [BEST_TAG] * is_best
        due = schedule.due(rolling_tag(step), roles, step)
        assert schedule.take(rolling_tag(step), roles, step) == due
        for tag in due:
            if fails:
                schedule.failed(tag)
            else:
                done.append((tag, step, clock))
        rolling = [at for tag, at, _ in done if tag.startswith("rolling")]
        assert fails or step - rolling[-1] < SETTINGS.every
    step += 1
    done += [(tag, step, clock) for tag in schedule.take(rolling_tag(step), [], step)]
    assert sorted(tag for tag, _, _ in done if tag.startswith("epoch")) == [epoch_tag(n + 1) for n in range(epochs)]
    rolling = [at for tag, at, _ in done if tag.startswith("rolling")]
    assert all(later - earlier >= SETTINGS.every for earlier, later in itertools.pairwise(rolling))
    best = [at for tag, _, at in done if tag == BEST_TAG]
    assert all(later - earlier >= SETTINGS.best_every_hours * 3600 for earlier, later in itertools.pairwise(best))


def test_a_new_process_continues_the_schedule_of_the_earlier_one(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    for step in (100, 160):
        backup.copy(save(run_dir, step))
    backup.copy(save(run_dir, 900))
    commit.remove(Disk(), run_dir, rolling_tag(900))  # part of a history that the run has left
    backup.copy(link(run_dir, rolling_tag(100), BEST_TAG))
    link(run_dir, rolling_tag(100), epoch_tag(1))
    hours = [1.0]
    schedule = BackupSchedule(SETTINGS, lambda: 1767225600 + hours[0] * 3600)  # hours after the start of 2026
    schedule.start_from(backup.copies(), scan(run_dir))
    assert schedule.due(rolling_tag(200), [], 200) == [epoch_tag(1)]  # 40 steps after 160 is too soon
    assert schedule.due(rolling_tag(200), [BEST_TAG], 200) == [epoch_tag(1)]
    assert schedule.due(rolling_tag(260), [], 260) == [epoch_tag(1), rolling_tag(260)]
    hours[0] = 170
    assert schedule.due(rolling_tag(200), [], 200) == [epoch_tag(1)]
    link(run_dir, rolling_tag(160), BEST_TAG)
    schedule = BackupSchedule(SETTINGS, lambda: 1767225600 + hours[0] * 3600)
    schedule.start_from(backup.copies(), scan(run_dir))
    assert schedule.due(rolling_tag(200), [], 200) == [epoch_tag(1), BEST_TAG]


def test_a_copied_epoch_does_not_count_as_the_newest_rolling_checkpoint(run_dir: Path, location: str) -> None:
    """It may be reduced to weights, from which training cannot resume."""
    backup = Backup(location, "run", SETTINGS)
    backup.copy(save(run_dir, 100))
    save(run_dir, 190)
    backup.copy(link(run_dir, rolling_tag(190), epoch_tag(1)))
    schedule = BackupSchedule(SETTINGS, lambda: 0.0)
    schedule.start_from(backup.copies(), scan(run_dir))
    assert schedule.due(rolling_tag(200), [], 200) == [rolling_tag(200)]


def test_a_copy_of_an_unevaluated_checkpoint_does_not_count_as_the_newest(run_dir: Path, location: str) -> None:
    backup = Backup(location, "run", SETTINGS)
    backup.copy(save(run_dir, 190, evaluated=False))
    schedule = BackupSchedule(SETTINGS, lambda: 0.0)
    schedule.start_from(backup.copies(), scan(run_dir))
    assert schedule.take_last(rolling_tag(190), 190) == [rolling_tag(190)]
