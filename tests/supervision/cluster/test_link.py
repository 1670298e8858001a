"""The supervisor's connection to an agent, whose part a small program plays."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster import link
from ds_gpt2.supervision.cluster.link import AgentLink, LostHostError, StartMethod

HELLO = """
import json, sys, time
def send(**message):
    print(json.dumps(message), flush=True)
send(hello={"pid": 1, "start": "1"})
"""
Connect = Callable[[str], AgentLink]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Return a function that connects to an agent with the given program."""

    def start(program: str) -> AgentLink:
        monkeypatch.setattr(link, "start_command", lambda *_: [sys.executable, "-c", HELLO + program])
        connected = AgentLink("node1", "local")
        connected.wait_for_start()
        return connected

    return start


class _Unread:
    """A terminal that does not read."""

    def __init__(self) -> None:
        self.text = ""
        self.is_waiting, self.reads = threading.Event(), threading.Event()

    def write(self, text: str) -> None:
        self.is_waiting.set()
        assert self.reads.wait(60)
        self.text += text

    def flush(self) -> None:
        pass


def test_a_terminal_that_does_not_read_is_not_the_loss_of_a_host(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(link, "PING_SECONDS", 0.1)
    terminal = _Unread()
    monkeypatch.setattr(sys, "stdout", terminal)
    connected = connect("""
for number in range(30):
    send(output=f"line {number}\\n", stream=1)
    time.sleep(0.1)
""")
    assert terminal.is_waiting.wait(30)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert connected.problem is None
        time.sleep(0.1)
    terminal.reads.set()
    assert connected.wait(60)
    assert terminal.text == "".join(f"line {number}\n" for number in range(30))


@pytest.mark.parametrize("message", ['report={"launch": "x"}', 'hello={"pid": 1}', 'output="x", stream="y"'])
def test_a_message_that_is_not_understood_ends_the_connection(connect: Connect, message: str, tmp_path: Path) -> None:
    connected = connect(f"""
send({message})
for _ in sys.stdin: pass
open({str(tmp_path / "ended")!r}, "w").close()
""")
    with pytest.raises(LostHostError, match="has sent a message that is not understood") as error:
        connected.call("ping", 60)
    assert "\n" not in str(error.value)
    assert connected.wait(60) and (tmp_path / "ended").exists()


def test_an_agent_on_this_machine_may_let_its_ranks_save_although_its_connection_is_killed(
    connect: Connect, tmp_path: Path
) -> None:
    connected = connect(f"""
for _ in sys.stdin: send(id=-1)
time.sleep(1)
open({str(tmp_path / "saved")!r}, "w").close()
""")
    connected.kill()
    assert connected.problem == "the connection to its agent was ended"
    assert connected.wait(60) and (tmp_path / "saved").exists()


def test_an_agent_says_why_it_ends(connect: Connect) -> None:
    connected = connect('send(end="its agent has received SIGTERM"); time.sleep(0.5)')
    assert connected.is_open  # the ranks may be saving
    with pytest.raises(LostHostError, match=r"^its agent has received SIGTERM$"):
        connected.call("ping", 60)


def _error_at_start(monkeypatch: pytest.MonkeyPatch, script: str, method: StartMethod = "ssh") -> str:
    """Return why an agent has not started whose shell runs ``script`` first."""
    monkeypatch.setattr(link, "start_command", lambda *_: ["sh", "-c", script])
    connected = AgentLink("node1", method)
    with pytest.raises(LostHostError) as error:
        connected.wait_for_start()
    connected.kill()
    assert connected.wait(60)
    return str(error.value)


def test_output_of_the_shell_before_the_first_message_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = shlex.join([sys.executable, "-u", str(link.AGENT)])
    script = f"""printf '{{"id": 1}}\\n\\377 no newline'; exec {agent}"""
    monkeypatch.setattr(link, "start_command", lambda *_: ["sh", "-c", script])
    connected = AgentLink("node1", "ssh")
    connected.wait_for_start()
    assert isinstance(connected.call("ping", 30), float)
    connected.close()
    assert connected.wait(30)


def test_a_shell_that_waits_is_named_with_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_START_SECONDS", 2.0)
    advice = "; a startup file of the shell there may wait: `ssh node1 true` must end at once and print nothing"
    text = f"its agent has not started within 2 s ({sys.executable} {link.AGENT})"
    assert _error_at_start(monkeypatch, "echo welcome; exec sleep 60") == f"{text}, last output: welcome{advice}"
    assert _error_at_start(monkeypatch, "exec sleep 60") == text + advice
    assert _error_at_start(monkeypatch, "exec sleep 60", "srun") == text


def test_a_shell_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "This account is currently not available."
    assert _error_at_start(monkeypatch, f"echo '{message}'; exit 1") == f"its agent cannot be started: {message}"
    assert _error_at_start(monkeypatch, "echo 1; echo 2 >&2; exit 1") == "its agent cannot be started: 2"
    assert _error_at_start(monkeypatch, "exit 1") == "its agent cannot be started: exit status 1"
    assert len(_error_at_start(monkeypatch, "printf '%5000s' x; printf '%5000s' y >&2; exit 1")) < 300


def test_an_error_of_ssh_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo welcome; echo 'Host key verification failed.' >&2; exit 255"
    assert _error_at_start(monkeypatch, script).startswith("ssh: its host key is not known: accept it with")


@pytest.mark.parametrize(("method", "advice"), [("ssh", "install the client of OpenSSH"), ("srun", "is for Slurm")])
def test_a_program_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, method: StartMethod, advice: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=f"^{method} cannot be started: No such file or directory: .*{advice}"):
        AgentLink("node1", method)


def test_an_agent_that_did_not_hear_of_this_process_is_not_lost(connect: Connect) -> None:
    connected = connect('send(end="it has not heard of the supervisor for 10 s"); time.sleep(0.5)')
    assert not connected.was_cut_off
    assert connected.wait(60) and connected.was_cut_off
    connected.kill()
    assert connected.was_cut_off and connected.problem == "it has not heard of the supervisor for 10 s"
    other = connect('send(end="its agent has received SIGTERM")')
    assert other.wait(60) and not other.was_cut_off


def test_time_in_which_this_process_was_stopped_is_no_silence(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            nonlocal now
            now += 1000.0
            return now

    monkeypatch.setattr(link, "PING_SECONDS", 0.05)
    connected = connect("time.sleep(60)")
    monkeypatch.setattr(link, "time", Clock)
    pings = connected._requests.qsize
    time.sleep(0.5)
    assert connected.problem is None and pings() == 0
    monkeypatch.undo()
    connected.kill()
    connected._process.kill()


def test_forwardings_and_commands_of_the_ssh_configuration_are_not_used(tmp_path: Path) -> None:
    if shutil.which("ssh") is None:
        pytest.skip("needs OpenSSH's client, which evaluates its configuration")
    config = tmp_path / "config"
    config.write_text("Host node1\nLocalForward 8080 localhost:80\nRemoteCommand tmux\nPermitLocalCommand yes\n")
    ssh, *options = link.start_command("node1", "ssh")[:-1]
    done = subprocess.run([ssh, "-F", str(config), "-G", *options], capture_output=True, text=True, check=True)
    found = dict(line.split(" ", 1) for line in done.stdout.lower().splitlines() if " " in line)
    assert found["permitlocalcommand"] == "no" and found["clearallforwardings"] == "yes"
    assert found.get("remotecommand", "none") == "none"


def test_an_unknown_request_is_refused() -> None:
    connected = AgentLink("localhost", "local")
    connected.wait_for_start()
    with pytest.raises(UserError, match=r"^host localhost: the request 'x' is unknown$"):
        connected.call("x", 30)
    assert isinstance(connected.call("ping", 30), float)
    connected.close()
    assert connected.wait(30)
