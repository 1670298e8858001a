"""How fast a run is and how long it takes: the definition that the console, ``status`` and ``report`` share."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gpt2.config.interval import Every
from ds_gpt2.monitoring.pace import RECENT, WINDOW, Cadence, Pace, Timed, recent, timed_of

NEVER = Cadence({}, 0)


def pace_of(records: list[dict[str, Any]], starts: list[int], cadence: Cadence = NEVER) -> Pace:
    pace = Pace(cadence, starts)
    for timed in timed_of(records):
        pace.add(timed)
    return pace


def steady(steps: range, seconds: float = 1.0, **more: float) -> list[dict[str, Any]]:
    return [{"step": step, "perf/step_ms": 1000 * seconds, **more} for step in steps]


def test_a_recent_figure_is_the_median_of_the_last_fifty_finite_values() -> None:
    values = [float(number) for number in range(200)]
    assert recent(values) == statistics.median(values[-RECENT:]) == 174.5
    assert recent([*values[:-1], math.nan, None, math.inf]) == statistics.median(values[-48:-1])
    assert recent([3.0]) == 3.0
    assert recent([]) is recent([math.nan, None]) is None


# --- the pace


def test_the_first_step_of_a_start_is_ignored() -> None:
    """It includes compilation and the time for which the run was not running."""
    records = [
        *steady(range(1, 2), 600.0),
        *steady(range(2, 101), 10.0),
        *steady(range(101, 102), 5000.0),
        *steady(range(102, 201), 10.0),
    ]
    pace = pace_of(records, [0, 100])
    assert pace.step_seconds is not None
    assert (pace.step_seconds.low, pace.step_seconds.mean, pace.step_seconds.high) == (10.0, 10.0, 10.0)
    slowed = pace_of(records, [0])
    assert slowed.step_seconds is not None and slowed.step_seconds.mean > 20
    alone = pace_of(records[:1], [0])  # better than nothing
    assert alone.left(1, 3) is not None and alone.mean_left(1, 3) == 1200
    assert pace_of([], []).left(0, 10) is None


def test_after_a_restart_with_other_ranks_only_new_steps_count() -> None:
    before, after = steady(range(1, 1001), 4.0), steady(range(1001, 1051), 2.0)
    assert pace_of(before + after[:6], [0, 1000]).mean_left(1006, 1106) == pytest.approx(400, abs=2)
    assert pace_of(before + after[:11], [0, 1000]).mean_left(1011, 1111) == 200
    assert pace_of(before + after, [0, 1000]).mean_left(1050, 1150) == 200


def test_only_the_newest_steps_count() -> None:
    pace = pace_of(steady(range(1, 3001), 9.0) + steady(range(3001, 3001 + WINDOW), 1.0), [0])
    assert pace.mean_left(5000, 5100) == 100


def test_the_pace_has_a_range() -> None:
    records = [{"step": step, "perf/step_ms": 1000.0 if step % 500 < 250 else 3000.0} for step in range(1, 2002)]
    pace = pace_of(records, [0]).step_seconds
    assert pace is not None
    assert pace.mean == pytest.approx(2.0, abs=0.02)
    assert (pace.low, pace.high) == (pytest.approx(1.0, abs=0.05), pytest.approx(3.0, abs=0.05))


def test_without_step_times_the_time_between_records_is_used() -> None:
    records: list[dict[str, Any]] = [{"step": step, "time": 10.0 * step} for step in (1, 2, 3, 5)]
    records[2] |= {"perf/eval_ms": 3000.0, "perf/save_ms": 2000.0}
    assert list(timed_of(records)) == [(2, 10.0, 0.0, 0.0), (3, 5.0, 3.0, 2.0), (5, 10.0, 0.0, 0.0)]
    assert list(timed_of([{"step": 1, "time": None}, {"step": 2, "perf/step_ms": None}])) == []


# --- time left


def test_evaluations_and_saves_are_counted_separately() -> None:
    """After each step, the time left is smaller by that step and the events that followed it."""
    cadence = Cadence({"validation": 10, "hellaswag": 20}, 25)
    costs = {(0, 1): 7.0, (1, 1): 50.0}
    records = steady(range(1, 101))
    for record in records[1:]:
        kinds = ((record["step"] - 1) % 20 == 0, (record["step"] - 1) % 10 == 0)
        record |= {"perf/eval_ms": 1000 * costs[kinds]} if any(kinds) else {}
        record |= {"perf/save_ms": 3000.0} if (record["step"] - 1) % 25 == 0 else {}
    pace, estimates = Pace(cadence, [0]), []
    for timed in timed_of(records):
        pace.add(timed)
        estimates.append(pace.mean_left(timed.step, 200))
    for (step, before), (_, now) in itertools.pairwise(enumerate(estimates, start=1)):
        if step > 51:  # each kind has occurred
            passed = (costs[(step + 1) % 20 == 0, True] if (step + 1) % 10 == 0 else 0) + 3 * ((step + 1) % 25 == 0)
            assert before is not None and now is not None and before - now == pytest.approx(1 + passed)
    # 100 steps; 110, 130, ... 190 validate, 120, ... 180 and the last do both; 125, 150, 175 and the last save
    assert estimates[-1] == pytest.approx(100 + 5 * 7 + 5 * 50 + 4 * 3)
    whole = pace.left(100, 200)
    assert whole is not None and whole.mean == pytest.approx(estimates[-1])
    assert pace.mean_left(200, 200) == 0


def test_one_slow_evaluation_does_not_change_the_usual_time() -> None:
    records = steady(range(1, 101))
    for record in records[10::10]:
        record["perf/eval_ms"] = 90_000.0 if record["step"] == 91 else 5000.0
    assert pace_of(records, [0], Cadence({"validation": 10}, 0)).mean_left(100, 200) == 100 + 10 * 5


def test_a_new_combination_at_the_end_is_estimated_from_its_parts() -> None:
    cadence = Cadence({"validation": 10, "samples": 15}, 0)
    records = steady(range(1, 22))
    records[10] |= {"perf/eval_ms": 4000.0}  # after step 10
    records[15] |= {"perf/eval_ms": 6000.0}
    records[20] |= {"perf/eval_ms": 4000.0}
    assert pace_of(records, [0], cadence).mean_left(21, 25) == 4 + 10


def test_small_times_of_every_step_are_part_of_the_step() -> None:
    pace = pace_of(steady(range(1, 101), **{"perf/eval_ms": 500.0}), [0])
    assert pace.mean_left(100, 200) == 150


def test_saves_off_the_interval_are_expected_at_their_recent_rate() -> None:
    """Best checkpoints and ends of epochs."""
    records = steady(range(1, 102))
    for step in (31, 61, 91):
        records[step - 1]["perf/save_ms"] = 2000.0
    assert pace_of(records, [0], Cadence({}, 1000)).mean_left(101, 201) == 100 + 2 * (1 + 3)


@given(
    every=st.dictionaries(st.sampled_from(["validation", "hellaswag", "samples"]), st.integers(1, 12)),
    save=st.integers(0, 12),
    step=st.integers(0, 60),
    more=st.integers(0, 40),
)
def test_the_remaining_events_equal_those_of_training(every: dict[str, int], save: int, step: int, more: int) -> None:
    steps, cadence = step + more, Cadence(every, save)
    together = [
        frozenset(name for name, each in every.items() if later in Every(each).due_steps(steps))
        for later in range(step + 1, steps + 1)
    ]
    expected = {kinds: together.count(kinds) for kinds in together if kinds}
    assert cadence.evaluations_left(step, steps) == expected
    saves = {*Every(save).due_steps(steps), steps} if steps else set()
    assert cadence.saves_left(step, steps) == sum(save_step > step for save_step in saves)


@given(every=st.integers(1, 9), other=st.integers(1, 9), save=st.integers(0, 30), newest=st.integers(1, 300))
def test_the_selected_records_are_sufficient_for_the_estimate(every: int, other: int, save: int, newest: int) -> None:
    """A pace from these records has the same usual times as one from all of them."""
    cadence = Cadence({"validation": every, "samples": other}, save)
    all_of_them, some = Pace(cadence, [0]), Pace(cadence, [0])
    records = [Timed(step, 1.0, 1.0 + step % 7, 1.0 if save and step % save == 1 else 0.0) for step in range(2, newest)]
    wanted = set(cadence.occasions(newest - 1))
    for record in records:
        all_of_them.add(record)
        if record.step in wanted:
            some.add(record)
    for step in range(1, 40):
        kinds = cadence.due(step)
        if kinds in all_of_them._evaluations:
            assert some._evaluations[kinds] == all_of_them._evaluations[kinds]
    assert list(some._saves) == list(all_of_them._saves)
