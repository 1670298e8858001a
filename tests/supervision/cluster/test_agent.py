"""The agent of a host, started on this machine, and the supervisor's connection to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster import host_checks, link, messages
from ds_gpt2.supervision.cluster.environment import passed_on
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AGENT, AgentLink, LostHostError
from ds_gpt2.supervision.cluster.messages import LaunchRequest
from ds_gpt2.supervision.launcher import Place

# A program in the place of train.py: it writes a line, then waits until it is ended.
RANK = r"""
import os, signal, sys, time
words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")]
sys.stdout.write("rank " + " ".join(words) + "\n")
sys.stderr.write("an error\n")
received = set()
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: received.add(number))
open(sys.argv[-1] + "ready_" + os.environ["RANK"], "w").close()
while signal.SIGTERM not in received:
    time.sleep(0.05)
if signal.SIGHUP in received:
    open(sys.argv[-1] + "lost_" + os.environ["RANK"], "w").close()
open(sys.argv[-1] + os.environ["RANK"], "w").close()
os._exit(0)
"""


@pytest.fixture
def agent() -> Iterator[AgentLink]:
    connected = AgentLink("localhost", "local")
    connected.wait_for_start()
    yield connected
    connected.close()
    assert connected.wait(120)


def _until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _request(tmp_path: Path, script: str = RANK) -> LaunchRequest:
    program = tmp_path / "program.py"
    program.write_text(script)
    (tmp_path / "run" / "supervisor").mkdir(parents=True, exist_ok=True)
    place = Place((1, 2), 1, "127.0.0.1", 29999)
    words = ("--out", f"{tmp_path}/stopped_")
    return LaunchRequest(7, program, words, "cpu", place, {"OMP_NUM_THREADS": "3"}, tmp_path / "run", 60.0)


@pytest.mark.ranks
def test_an_agent_starts_reports_and_stops_its_ranks(
    agent: AgentLink, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    agent.call("launch", 30, request=messages.as_values(_request(tmp_path)))
    output = ""

    def printed() -> str:
        nonlocal output
        output += capfd.readouterr().out
        return output

    _until(lambda: printed().count("rank") == 2)
    assert sorted(output.split("\n")[:2]) == ["rank 1 3 3", "rank 2 3 3"]
    report = agent.report
    assert report is not None and (report.launch, report.launcher_runs, report.outcome) == (7, True, None)
    _until(lambda: len(list(tmp_path.glob("stopped_ready_*"))) == 2)
    agent.request("stop")
    _until(lambda: agent.report is not None and agent.report.has_exited)
    assert sorted(path.name for path in tmp_path.glob("stopped_[0-9]")) == ["stopped_1", "stopped_2"]


@pytest.mark.ranks
@pytest.mark.parametrize("is_signalled", [True, False])
def test_an_agent_whose_supervisor_is_gone_or_whose_host_shuts_down_lets_the_ranks_save(
    tmp_path: Path, is_signalled: bool
) -> None:
    process = subprocess.Popen([sys.executable, str(AGENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert "hello" in json.loads(process.stdout.readline())
    request = {"id": 0, "do": "launch", "request": messages.as_values(_request(tmp_path))}
    requests = process.stdin.fileno()
    os.write(requests, messages.encode(request))

    def are_ready() -> bool:
        os.write(requests, messages.encode({"id": 1, "do": "ping"}))  # their start may take long
        return len(list(tmp_path.glob("stopped_ready_*"))) == 2

    _until(are_ready)
    if is_signalled:
        process.terminate()
        sent = [json.loads(line) for line in process.stdout]
        assert any("received SIGTERM" in message.get("end", "") for message in sent)
        assert not any(message["report"]["has_exited"] for message in sent if "report" in message)
    process.stdin.close()
    process.stdout.close()
    assert process.wait(120) == 0
    assert sorted(path.name for path in tmp_path.glob("stopped_[0-9]")) == ["stopped_1", "stopped_2"]
    assert len(list(tmp_path.glob("stopped_lost_*"))) == (0 if is_signalled else 2)
    assert _ranks(tmp_path) == []


def _ranks(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(folder) in command and "--local_rank" in command and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_a_refusal_names_the_host_and_a_mistake_of_the_agent_does_not_end_it(agent: AgentLink) -> None:
    with pytest.raises(
        UserError, match=r"^host localhost: the working directory /nowhere cannot be entered: No such file"
    ):
        agent.call("facts", 30, arguments=[], cwd="/nowhere", accelerator="cpu")
    with pytest.raises(UserError, match="host localhost: TypeError: "):
        agent.call("mark", 30, unknown=1)
    assert abs(agent.call("ping", 30) - time.time()) < 5


def test_a_stopped_agent_is_lost_after_a_while(agent: AgentLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SILENCE_SECONDS", 2.0)
    assert agent.agent is not None and agent.is_open
    os.kill(agent.agent[0], signal.SIGSTOP)
    try:
        with pytest.raises(LostHostError, match=r"it has not answered for [234] s"):
            _until(lambda: agent.call("ping", 60) is None)  # its threads do not stop at once
    finally:
        os.kill(agent.agent[0], signal.SIGCONT)
    _until(lambda: agent.is_open)


def test_an_agent_that_ends_is_lost_at_once(agent: AgentLink) -> None:
    assert agent.agent is not None
    os.kill(agent.agent[0], signal.SIGKILL)
    with pytest.raises(LostHostError, match="the connection to its agent has ended"):
        agent.call("mark", 60, directories=[], name="x")


def test_an_agent_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(LostHostError, match="its agent cannot be started: exit status 1"):
        AgentLink("localhost", "local").wait_for_start()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match="/nowhere/python cannot be started: No such file or directory"):
        AgentLink("localhost", "local")


@pytest.mark.ranks
def test_a_command_ends_with_the_supervisor(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """The command is a doctor that has started ranks."""
    connected = AgentLink("localhost", "local")
    connected.wait_for_start()
    assert connected.agent is not None
    process = psutil.Process(connected.agent[0])
    connected.request("command", words=["doctor", str(write_config(tmp_path)), "--num_gpus", "2"], environment={})

    def ranks() -> list[psutil.Process]:
        return [child for child in process.children(recursive=True) if "--local_rank=1" in _command_of(child)]

    _until(ranks)
    started = process.children(recursive=True)
    connected.close()
    assert connected.wait(20)
    _, alive = psutil.wait_procs(started, timeout=5)
    assert [_command_of(child) for child in alive] == []


def _command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class _Clock:
    """The agent of a host whose clock differs."""

    host = "node1"

    def __init__(self, ahead: float) -> None:
        self._ahead = ahead

    def call(self, *_: object) -> float:
        return time.time() + self._ahead


@pytest.mark.parametrize(("ahead", "message"), [(3.0, "3.0 s ahead of"), (-70.0, "70.0 s behind")])
def test_a_clock_that_differs_is_refused(ahead: float, message: str) -> None:
    clock: Any = _Clock(ahead)
    good: Any = _Clock(0.5)
    with pytest.raises(UserError, match=f"host node1: its clock is {message} that of this machine: synchronize both"):
        host_checks.check_clock(clock)
    host_checks.check_clock(good)


def test_more_slots_than_gpus_are_refused(agent: AgentLink) -> None:
    nodes = [host_checks.Node(Host("node1", slots), agent, "node1", 2, {}, {}) for slots in (2, 3)]
    host_checks.check_slots(nodes[:1], "cuda")
    host_checks.check_slots(nodes, "cpu")
    with pytest.raises(UserError, match="host node1: slots=3, but it has 2 GPUs"):
        host_checks.check_slots(nodes, "cuda")


def test_only_variables_of_the_libraries_are_passed_on() -> None:
    environment = {
        "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "secret", "LC_ALL": "C", "PATH": "/bin", "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "1", "DS_GPT2_OUTCOME": "x", "DS_ACCELERATOR": "cpu", "LD_PRELOAD": "x",
        "TRITON_CACHE_DIR": "/tmp", "LD_LIBRARY_PATH": "/opt/lib", "SSL_CERT_FILE": "/cert", "XDG_CACHE_HOME": "/c",
    }  # fmt: skip
    passed = ["DS_ACCELERATOR", "LC_ALL", "LD_LIBRARY_PATH", "NCCL_DEBUG", "SSL_CERT_FILE", "TRITON_CACHE_DIR"]
    assert sorted(passed_on(environment)) == [*passed, "WANDB_API_KEY", "XDG_CACHE_HOME"]
