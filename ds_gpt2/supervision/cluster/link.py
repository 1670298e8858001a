"""The supervisor's connection to the agent of one host, by ssh, by srun, or directly on this machine."""

from __future__ import annotations

import contextlib
import itertools
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster.messages import PING_SECONDS, SILENCE_SECONDS, NodeReport, encode, node_report

AGENT = Path(__file__).with_name("agent.py")
_ANSWER_SECONDS = 5.0  # for a host to accept a connection
_START_SECONDS = 30.0  # for the agent to start: Python may be on a slow network disk
_SSH_FAILED = 255  # the exit status of ssh if it cannot connect
_SSH = [
    "ssh", "-T", "-a", "-x",
    *("-o", "BatchMode=yes"),  # no question for a password
    *("-o", f"ConnectTimeout={_ANSWER_SECONDS:.0f}"),
    *("-o", "ControlMaster=no", "-o", "ControlPath=none"),  # a shared connection would end with another program
    *("-o", f"ServerAliveInterval={PING_SECONDS * 3:.0f}", "-o", "ServerAliveCountMax=3"),
    *("-o", "LogLevel=ERROR"),
]  # fmt: skip
_SRUN = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--cpu-bind=none", "--unbuffered"]

Way = Literal["ssh", "srun", "local"]


class LostHostError(Exception):
    """A host does not answer, or its agent has ended. The message says why, without the name of the host."""


def start_command(host: str, way: Way) -> list[str]:
    """Return the command that starts the agent of ``host``; Python and the project have the same path on all hosts."""
    program = [sys.executable, "-u", str(AGENT)]
    if way == "local":
        return program
    if way == "srun":
        return [*_SRUN, f"--nodelist={host}", *program]
    return [*_SSH, host, f"exec {shlex.join(program)}"]


class AgentLink:
    """A connection to an agent. Threads read what it sends, and send it signs of life."""

    def __init__(self, host: str, way: Way) -> None:
        """Start the agent; ``wait_for_start`` waits for it.

        Raises:
            UserError: ssh or srun cannot be started.
        """
        self.host = host
        self.report: NodeReport | None = None  # the newest
        self.agent: tuple[int, str] | None = None  # process id and start time
        self._way = way
        command = start_command(host, way)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl+C in the terminal must not end it
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
        self._numbers = itertools.count()
        self._replies: dict[int, queue.Queue[dict[str, Any] | None]] = {}
        self._errors: deque[str] = deque(maxlen=20)  # the last lines of standard error
        self._hello = threading.Event()
        self._last_heard = time.monotonic()
        self._has_ended = threading.Event()
        self._is_closed = False
        self._requests: queue.Queue[bytes | None] = queue.Queue()
        self._error_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._error_reader.start()
        for work in (self._read, self._write, self._ping):
            threading.Thread(target=work, daemon=True).start()

    @property
    def is_local(self) -> bool:
        """Whether the host is this machine."""
        return self._way == "local"

    @property
    def is_open(self) -> bool:
        """Whether the agent answers."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Why the agent does not answer; None if it does."""
        if self._has_ended.is_set():
            return self._end_text()
        silence = time.monotonic() - self._last_heard
        return f"it has not answered for {silence:.0f} s" if silence > SILENCE_SECONDS else None

    def wait_for_start(self) -> None:
        """Wait until the agent has started.

        Raises:
            LostHostError: it does not start.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not self._hello.wait(0.05):
            if self._has_ended.is_set():
                raise LostHostError(self._end_text())
            if time.monotonic() > deadline:
                self.close()
                raise LostHostError(
                    f"its agent has not started within {_START_SECONDS:.0f} s ({sys.executable} {AGENT})"
                )

    def request(self, what: str, **words: Any) -> None:
        """Send a request; do not wait for the reply."""
        self._requests.put(encode({"id": next(self._numbers), "do": what, **words}))

    def call(self, what: str, seconds: float, **words: Any) -> Any:
        """Send a request and return the value of its reply.

        Raises:
            LostHostError: there is no reply within ``seconds``, or the connection ends.
            UserError: the agent refuses; the message names the host.
        """
        number = next(self._numbers)
        reply = self._replies[number] = queue.Queue()
        self._requests.put(encode({"id": number, "do": what, **words}))
        deadline = time.monotonic() + seconds
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    return self._value_of(reply.get(timeout=0.1))
                if (problem := self.problem) is not None:
                    raise LostHostError(problem)
                if time.monotonic() > deadline:
                    raise LostHostError(f"it has not answered the request {what!r} within {seconds:.0f} s")
        finally:
            del self._replies[number]

    def close(self) -> None:
        """End the connection: the agent ends its ranks and itself."""
        self._is_closed = True
        self._requests.put(None)

    def kill(self) -> None:
        """End the connection and the process that holds it; an agent on this machine ends, too."""
        self.close()
        self._process.kill()

    def wait(self, seconds: float) -> bool:
        """Wait until the agent has ended after ``close``; return False if it has not within ``seconds``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
            return True
        return False

    def _value_of(self, reply: Mapping[str, Any] | None) -> Any:
        if reply is None:
            raise LostHostError(self._end_text())
        if "error" in reply:
            raise UserError(f"host {self.host}: {reply['error']}")
        return reply["value"]

    def _end_text(self) -> str:
        """Return why the connection has ended."""
        last = next((line for line in reversed(self._errors) if line), None)
        if self._hello.is_set():
            return (
                f"the connection to its agent has ended ({last})" if last else "the connection to its agent has ended"
            )
        if self._way == "ssh" and self._process.poll() == _SSH_FAILED:
            return f"ssh: {last}: `ssh {self.host} true` must work without a password"
        return f"its agent cannot be started: {last or f'exit status {self._process.poll()}'}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                self._last_heard = time.monotonic()
                if (message := safe_json.parse_object(line)) is not None:
                    self._take(message)
        self._process.wait()
        self._error_reader.join(1)  # the last lines of standard error
        self._has_ended.set()
        for reply in list(self._replies.values()):
            reply.put(None)

    def _take(self, message: Mapping[str, Any]) -> None:
        if "hello" in message:
            self.agent = message["hello"]["pid"], message["hello"]["start"]
            self._hello.set()
        elif message.get("report") is not None:
            self.report = node_report(message["report"])
        elif "output" in message:
            stream = sys.stderr if message["stream"] == 2 else sys.stdout
            with contextlib.suppress(OSError, ValueError):  # a closed terminal
                stream.write(message["output"])
                stream.flush()
        elif (reply := self._replies.get(message.get("id", -1))) is not None:
            reply.put(dict(message))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stderr:
                self._errors.append(line.decode(errors="backslashreplace").strip())

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self._requests.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def _ping(self) -> None:
        while not self._is_closed and not self._has_ended.wait(PING_SECONDS):
            self.request("ping")
