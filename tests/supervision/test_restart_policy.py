"""What follows on each way in which a run may end."""

from __future__ import annotations

import pytest

from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir.exit_report import CRASHED, DONE, MISTAKE, ROLLBACK, STOPPED, Outcome
from ds_gpt2.supervision.restart_policy import Again, Ended, Finish, GiveUp, Restarts

SETTINGS = SupervisorSettings(restarts=4, backoff_seconds=5, longest_backoff_seconds=30)


def _ended(code: int = CRASHED, step: int = 0, saved: int = -1, origin: int = 0, asked: bool = False) -> Ended:
    return Ended(Outcome(code), asked, step=step, batch=step, from_step=origin, saved_step=saved)


@pytest.mark.parametrize("code", [DONE, STOPPED, MISTAKE])
def test_what_ended_in_order_or_by_a_mistake_is_never_started_again(code: int) -> None:
    assert Restarts(SETTINGS, -1).after(_ended(code)) == Finish(code)


@pytest.mark.parametrize(("code", "exit_code"), [(CRASHED, CRASHED), (ROLLBACK, CRASHED), (STOPPED, STOPPED)])
def test_nothing_is_started_against_a_request_to_stop(code: int, exit_code: int) -> None:
    assert Restarts(SETTINGS, -1).after(_ended(code, step=7, asked=True)) == Finish(exit_code)


def test_a_run_that_gets_nowhere_is_given_up_after_longer_and_longer_waits() -> None:
    restarts = Restarts(SETTINGS, -1)
    waits = []
    while isinstance(decision := restarts.after(_ended()), Again):
        waits.append(decision.seconds)
        assert decision.resume == "auto"
    assert isinstance(decision, GiveUp)
    assert waits == [5, 10, 20, 30]


def test_a_run_that_gets_on_is_started_again_for_ever() -> None:
    restarts = Restarts(SETTINGS, 0)
    for number in range(1, 200):
        decision = restarts.after(_ended(step=10 * number + 3, saved=10 * number))
        assert isinstance(decision, Again) and decision.seconds == 5


def test_steps_that_are_never_saved_are_no_progress() -> None:
    restarts = Restarts(SETTINGS, 100)
    decisions = [restarts.after(_ended(step=101 + number, saved=100, origin=100)) for number in range(5)]
    assert isinstance(decisions[-1], GiveUp)


def test_a_run_that_diverges_on_any_data_is_told_what_may_be_the_cause() -> None:
    restarts = Restarts(SupervisorSettings(restarts=2), 40)
    diverged = [Outcome(ROLLBACK, 40, tuple(range(42 + 20 * n, 62 + 20 * n))) for n in range(3)]
    ends = [Ended(outcome, False, step=61, batch=61, from_step=40, saved_step=40) for outcome in diverged]
    decision = [restarts.after(ended) for ended in ends][-1]
    assert isinstance(decision, GiveUp) and "schedule.max_lr may be too high" in decision.text
    crashed = Restarts(SupervisorSettings(restarts=2), 40)
    decision = [crashed.after(_ended(step=61, saved=40, origin=40)) for _ in range(3)][-1]
    assert isinstance(decision, GiveUp) and "max_lr" not in decision.text


def test_restarts_can_be_forbidden() -> None:
    assert isinstance(Restarts(SupervisorSettings(restarts=0), 0).after(_ended(step=9, saved=5)), GiveUp)


def test_the_same_step_again_suspects_the_checkpoint_then_the_data() -> None:
    restarts = Restarts(SETTINGS, 10)
    crash = _ended(step=13, saved=10, origin=10)
    resumes = [restarts.after(crash) for _ in range(3)]
    assert [one.resume for one in resumes if isinstance(one, Again)] == ["auto", "before:10", "auto"]
    assert isinstance(resumes[2], Again)
    assert "batch 13" in resumes[2].text and "skip_data" in resumes[2].text and resumes[2].leave_out == ()


def test_data_is_left_out_only_where_the_user_allows_it() -> None:
    restarts = Restarts(SETTINGS.model_copy(update={"skip_data": True}), 10)
    decisions = [restarts.after(_ended(step=13, saved=10, origin=10)) for _ in range(3)]
    assert isinstance(decisions[2], Again) and decisions[2].leave_out == (13,)


def test_crashes_at_different_steps_accuse_nobody() -> None:
    restarts = Restarts(SETTINGS, 10)
    decisions = [restarts.after(_ended(step=step, saved=10, origin=10)) for step in (13, 14, 13)]
    assert [one.resume for one in decisions if isinstance(one, Again)] == ["auto"] * 3


def test_a_rollback_goes_to_before_the_trouble_and_further_each_time_that_it_comes_again() -> None:
    restarts = Restarts(SETTINGS, 40)

    def rolled_back(origin: int, batches: tuple[int, ...]) -> Again:
        outcome = Outcome(ROLLBACK, before=42, leave_out=batches)
        decision = restarts.after(Ended(outcome, False, step=45, batch=45, from_step=origin, saved_step=40))
        assert isinstance(decision, Again)
        return decision

    first = rolled_back(0, (42, 43))
    assert (first.resume, first.leave_out) == ("before:42", (42, 43))
    assert "42-43" in first.text
    assert rolled_back(40, (44, 45)).resume == "before:40"
    assert rolled_back(35, (46, 47)).resume == "before:35"


def test_starts_that_begin_no_step_resume_from_the_newest_checkpoint_and_suspect_no_data() -> None:
    """As when a directory cannot be written: no heartbeat of such a start, and no line in the journal."""
    restarts = Restarts(SupervisorSettings(restarts=9, skip_data=True), 40)
    assert isinstance(restarts.after(_ended(step=46, saved=40, origin=0)), Again)
    for _ in range(5):
        again = restarts.after(Ended(Outcome(CRASHED), False, step=0, batch=0, from_step=None, saved_step=40))
        assert isinstance(again, Again) and (again.resume, again.leave_out) == ("auto", ())
    same_step = Ended(Outcome(CRASHED), False, step=46, batch=46, from_step=None, saved_step=40)
    resumed = [restarts.after(same_step) for _ in range(3)]
    assert all(isinstance(again, Again) and again.resume == "auto" for again in resumed)
