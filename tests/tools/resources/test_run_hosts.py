"""The hosts of a run, from its journal."""

from __future__ import annotations

from typing import Any

import pytest

from ds_gpt2.run_dir.journal import Event
from ds_gpt2.tools.resources.run_hosts import RunHost, hosts_of, names_of


def _event(time: float, kind: str, **facts: Any) -> Event:
    return Event(time, kind, "as it was", None, facts)


LAUNCH = _event(1, "launch", restart=False, hosts={"a": 2, "b": 2, "c": 0})
LOST = _event(2, "host_lost", host="b", reason="no answer")
RESTART = _event(3, "launch", restart=True, hosts={"a": 2})


def test_a_run_on_one_machine_has_no_hosts() -> None:
    assert hosts_of([_event(1, "launch", restart=False), _event(2, "start")]) == []


def test_hosts_are_those_of_the_newest_launch() -> None:
    hosts = hosts_of([LAUNCH, _event(2, "start")])
    assert hosts == [RunHost("a", 2), RunHost("b", 2), RunHost("c", 0)]
    assert names_of(hosts) == "4 ranks on 2 hosts: a (2), b (2)"


def test_a_lost_host_is_away_until_it_is_back() -> None:
    away = RunHost("b", 0, 2, "no answer")
    assert hosts_of([LAUNCH, LOST]) == [RunHost("a", 2), RunHost("c", 0), away]
    assert hosts_of([LAUNCH, LOST, RESTART]) == [RunHost("a", 2), away]
    back = _event(4, "host_back", host="b")
    assert hosts_of([LAUNCH, LOST, RESTART, back]) == [RunHost("a", 2), RunHost("b", 0)]
    again = _event(5, "launch", restart=True, hosts={"a": 2, "b": 2})
    assert hosts_of([LAUNCH, LOST, RESTART, back, again]) == [RunHost("a", 2), RunHost("b", 2)]


def test_a_new_reason_does_not_change_since_when_a_host_is_away() -> None:
    other = _event(4, "host_lost", host="b", reason="its clock is 3 s ahead")
    assert hosts_of([LAUNCH, LOST, RESTART, other])[1] == RunHost("b", 0, 2, "its clock is 3 s ahead")


def test_hosts_that_the_supervisor_waits_for_are_away() -> None:
    few = _event(9, "few_hosts", away={"b": "refused", "c": "no answer"})
    assert hosts_of([LAUNCH, LOST, few])[1:] == [RunHost("b", 0, 2, "refused"), RunHost("c", 0, 9, "no answer")]


def test_a_start_by_hand_has_all_its_hosts() -> None:
    first = _event(9, "launch", restart=False, hosts={"a": 2})
    assert hosts_of([LAUNCH, LOST, first]) == [RunHost("a", 2)]
    assert hosts_of([LAUNCH, LOST, _event(9, "launch", restart=False)]) == []


@pytest.mark.parametrize("fact", [None, 3, "a", ["a"], {"a": "two", "b": None, "c": True}])
def test_damaged_facts_are_ignored(fact: object) -> None:
    events = [_event(1, "launch", hosts=fact), _event(2, "host_lost", host=fact), _event(3, "host_back", host=fact)]
    names = {host.name for host in hosts_of([*events, _event(4, "few_hosts", away=fact)])}
    assert names <= {"a"}
