"""What an earlier supervisor of the run has left on its hosts is ended before the run starts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.run_dir.journal import read_journal
from ds_gpt2.run_dir.supervisor_record import AgentRecord, SupervisorRecord
from ds_gpt2.supervision.cluster.cluster import LeftOver
from ds_gpt2.supervision.cluster.link import AgentLink
from ds_gpt2.supervision.context import Context
from ds_gpt2.supervision.orphans import end_orphans
from ds_gpt2.supervision.stop_signals import StopSignals

RECORD = SupervisorRecord(1, 1.0, socket.gethostname(), "running", 2, start="another")


@pytest.fixture
def settings(tmp_path: Path, write_config: Callable[..., Path]) -> Settings:
    loaded = load_settings(write_config(tmp_path))
    loaded.run_dir.mkdir(parents=True)
    return loaded


@pytest.fixture
def left() -> Iterator[AgentLink]:
    """An agent on this machine that was left running."""
    agent = AgentLink("localhost", "local")
    agent.wait_for_start()
    yield agent
    agent.close()
    assert agent.wait(60)


def _texts(settings: Settings) -> list[str]:
    return [event.text for event in read_journal(settings.run_dir)]


def _end(settings: Settings, cluster: Any = None) -> None:
    end_orphans(Context(settings, StopSignals(), 2), cluster)


def test_an_agent_of_this_machine_is_ended_before_a_start_on_one_machine(settings: Settings, left: AgentLink) -> None:
    assert left.agent is not None
    agents = (AgentRecord("localhost", *left.agent), AgentRecord("node2.invalid", 7, "0.boot"))
    replace(RECORD, agents=agents).write(settings.run_dir)
    _end(settings)
    assert left.wait(10)
    assert _texts(settings) == [
        "ended processes of an earlier start on localhost",
        "processes of an earlier start may be left on node2.invalid, which this start does not use",
    ]


def test_localhost_in_the_record_of_another_machine_is_that_machine(settings: Settings, left: AgentLink) -> None:
    assert left.agent is not None
    agents = (AgentRecord("localhost", *left.agent),)
    replace(RECORD, host="elsewhere", state="ended", agents=agents).write(settings.run_dir)
    _end(settings)
    assert left.is_open and _texts(settings) == []


def test_hosts_where_processes_are_left_are_reported_as_lost(settings: Settings) -> None:
    agents = (AgentRecord("a", 7, "0.boot", 8), AgentRecord("b", 7, "0.boot", 8))
    replace(RECORD, agents=agents).write(settings.run_dir)
    cluster: Any = mock.Mock()
    cluster.end_left_over.return_value = LeftOver({"a"}, {"b": "it has not answered for 11 s"})
    cluster.newly_lost.side_effect = lambda reasons: reasons
    _end(settings, cluster)
    assert list(cluster.end_left_over.call_args.args[0]) == list(agents)
    assert _texts(settings) == [
        "ended processes of an earlier start on a",
        "host b is lost: it has not answered for 11 s",
    ]
