"""What follows the end of a launch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir.exit_codes import CRASHED, DONE, MISTAKE, ROLLBACK, STOPPED
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.supervision.restart_policy import Finish, GiveUp, LaunchResult, Restart, RestartPolicy

SETTINGS = SupervisorSettings(restarts=4, backoff_seconds=5, longest_backoff_seconds=30)


def _result(code: int = CRASHED, step: int = 0, saved: int = -1, origin: int = 0, stop: bool = False) -> LaunchResult:
    return LaunchResult(Outcome(code), stop, step=step, batch=step, from_step=origin, saved_step=saved)


@pytest.mark.parametrize("code", [DONE, STOPPED, MISTAKE])
def test_a_run_that_is_done_or_stopped_or_misconfigured_is_not_restarted(code: int) -> None:
    assert RestartPolicy(SETTINGS, -1).decide(_result(code)) == Finish(code)


@pytest.mark.parametrize(("code", "exit_code"), [(CRASHED, CRASHED), (ROLLBACK, CRASHED), (STOPPED, STOPPED)])
def test_a_run_is_not_restarted_after_a_stop_request(code: int, exit_code: int) -> None:
    assert RestartPolicy(SETTINGS, -1).decide(_result(code, step=7, stop=True)) == Finish(exit_code)


def test_a_run_without_progress_is_given_up_after_growing_waits() -> None:
    policy = RestartPolicy(SETTINGS, -1)
    waits = []
    while isinstance(decision := policy.decide(_result()), Restart):
        waits.append(decision.seconds)
        assert decision.resume == "auto"
    assert isinstance(decision, GiveUp)
    assert waits == [5, 10, 20, 30]


def test_a_run_with_progress_is_restarted_without_limit() -> None:
    policy = RestartPolicy(SETTINGS, 0)
    for number in range(1, 200):
        decision = policy.decide(_result(step=10 * number + 3, saved=10 * number))
        assert isinstance(decision, Restart) and decision.seconds == 5


def test_unsaved_steps_do_not_count_as_progress() -> None:
    policy = RestartPolicy(SETTINGS, 100)
    decisions = [policy.decide(_result(step=101 + number, saved=100, origin=100)) for number in range(5)]
    assert isinstance(decisions[-1], GiveUp)


def test_the_learning_rate_is_suspected_if_a_run_diverges_on_different_data() -> None:
    policy = RestartPolicy(SupervisorSettings(restarts=2), 40)
    diverged = [Outcome(ROLLBACK, 40, tuple(range(42 + 20 * n, 62 + 20 * n))) for n in range(3)]
    results = [LaunchResult(outcome, False, step=61, batch=61, from_step=40, saved_step=40) for outcome in diverged]
    decision = [policy.decide(result) for result in results][-1]
    assert isinstance(decision, GiveUp) and "schedule.max_lr may be too high" in decision.text
    crashed = RestartPolicy(SupervisorSettings(restarts=2), 40)
    decision = [crashed.decide(_result(step=61, saved=40, origin=40)) for _ in range(3)][-1]
    assert isinstance(decision, GiveUp) and "max_lr" not in decision.text


def test_restarts_can_be_disabled() -> None:
    assert isinstance(RestartPolicy(SupervisorSettings(restarts=0), 0).decide(_result(step=9, saved=5)), GiveUp)


def test_repeated_crashes_at_one_step_avoid_first_the_checkpoint_then_the_data() -> None:
    policy = RestartPolicy(SETTINGS, 10)
    crash = _result(step=13, saved=10, origin=10)
    decisions = [policy.decide(crash) for _ in range(3)]
    assert [each.resume for each in decisions if isinstance(each, Restart)] == ["auto", "before:10", "auto"]
    last = decisions[2]
    assert isinstance(last, Restart)
    assert "batch 13" in last.text and "skip_data" in last.text and last.leave_out == ()


def test_data_is_skipped_only_if_the_settings_allow_it() -> None:
    policy = RestartPolicy(SETTINGS.model_copy(update={"skip_data": True}), 10)
    decisions = [policy.decide(_result(step=13, saved=10, origin=10)) for _ in range(3)]
    assert isinstance(decisions[2], Restart) and decisions[2].leave_out == (13,)


def test_crashes_at_different_steps_avoid_nothing() -> None:
    policy = RestartPolicy(SETTINGS, 10)
    decisions = [policy.decide(_result(step=step, saved=10, origin=10)) for step in (13, 14, 13)]
    assert [each.resume for each in decisions if isinstance(each, Restart)] == ["auto"] * 3


def test_each_further_rollback_at_one_step_resumes_from_an_older_checkpoint() -> None:
    policy = RestartPolicy(SETTINGS, 40)

    def roll_back(origin: int, batches: tuple[int, ...]) -> Restart:
        outcome = Outcome(ROLLBACK, before=42, leave_out=batches)
        decision = policy.decide(LaunchResult(outcome, False, step=45, batch=45, from_step=origin, saved_step=40))
        assert isinstance(decision, Restart)
        return decision

    first = roll_back(0, (42, 43))
    assert (first.resume, first.leave_out) == ("before:42", (42, 43))
    assert "42-43" in first.text
    assert roll_back(40, (44, 45)).resume == "before:40"
    assert roll_back(35, (46, 47)).resume == "before:35"


def test_the_loss_of_a_host_does_not_cancel_a_rollback() -> None:
    outcome = Outcome(ROLLBACK, before=42, leave_out=(42, 43))
    result = LaunchResult(outcome, False, step=45, batch=45, from_step=0, saved_step=40, lost_hosts=("b",))
    decision = RestartPolicy(SETTINGS, 40).decide(result)
    assert isinstance(decision, Restart) and (decision.resume, decision.leave_out) == ("before:42", (42, 43))
    crash = replace(result, outcome=Outcome(CRASHED))
    decisions = [RestartPolicy(SETTINGS, 40).decide(crash) for _ in range(9)]
    assert all(isinstance(each, Restart) and each.text.endswith("on the hosts that answer") for each in decisions)


def test_launches_without_a_step_resume_from_the_newest_checkpoint_and_skip_no_data() -> None:
    """If a directory cannot be written, such a launch leaves neither a heartbeat nor an event in the journal."""
    policy = RestartPolicy(SupervisorSettings(restarts=9, skip_data=True), 40)
    assert isinstance(policy.decide(_result(step=46, saved=40, origin=0)), Restart)
    for _ in range(5):
        restart = policy.decide(LaunchResult(Outcome(CRASHED), False, step=0, batch=0, from_step=None, saved_step=40))
        assert isinstance(restart, Restart) and (restart.resume, restart.leave_out) == ("auto", ())
    same_step = LaunchResult(Outcome(CRASHED), False, step=46, batch=46, from_step=None, saved_step=40)
    decisions = [policy.decide(same_step) for _ in range(3)]
    assert all(isinstance(each, Restart) and each.resume == "auto" for each in decisions)


@pytest.mark.parametrize(("saved", "text"), [(-1, "from the beginning"), (0, "from the newest checkpoint")])
def test_the_text_of_a_restart_says_what_it_starts_from(saved: int, text: str) -> None:
    restart = RestartPolicy(SETTINGS, -1).decide(_result(step=1, saved=saved))
    assert isinstance(restart, Restart) and (restart.resume, restart.text) == ("auto", text)


def test_the_text_of_a_rollback_of_a_run_without_a_checkpoint_does_not_name_one() -> None:
    outcome = Outcome(ROLLBACK, before=7, leave_out=(8,))
    restart = RestartPolicy(SETTINGS, -1).decide(LaunchResult(outcome, False, 9, 9, from_step=0, saved_step=-1))
    assert isinstance(restart, Restart)
    assert (restart.resume, restart.text) == ("before:7", "from the beginning, excluding batches 8 of the data")
