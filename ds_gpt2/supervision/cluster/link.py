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
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.formatting import truncated
from ds_gpt2.supervision.cluster.channel import OutputQueue
from ds_gpt2.supervision.cluster.messages import (
    NOT_HEARD,
    PING_SECONDS,
    SILENCE_SECONDS,
    NodeReport,
    encode,
    node_report,
)
from ds_gpt2.supervision.cluster.ssh_errors import advice_on

AGENT = Path(__file__).with_name("agent.py")
_ANSWER_SECONDS = 5.0  # for a host to accept a connection
_START_SECONDS = 30.0  # for the agent to start: Python may be on a slow network disk
_READ_SECONDS = 1.0  # for what an agent has sent before it has ended
_MAX_REASON = 200  # characters
_HELLO = b'{"hello"'  # start of an agent's first message
_SSH_FAILED = 255  # the exit status of ssh if it cannot connect
_SSH = [
    "ssh", "-T", "-a", "-x",
    *("-o", "BatchMode=yes"),  # no question for a password
    *("-o", f"ConnectTimeout={_ANSWER_SECONDS:.0f}"),
    *("-o", "ControlMaster=no", "-o", "ControlPath=none"),  # a shared connection would end with another program
    *("-o", f"ServerAliveInterval={PING_SECONDS * 3:.0f}", "-o", "ServerAliveCountMax=3"),
    *("-o", "ClearAllForwardings=yes", "-o", "RemoteCommand=none"),  # those of the user's configuration
    *("-o", "PermitLocalCommand=no", "-o", "LogLevel=ERROR"),
]  # fmt: skip
_NEEDED = {"ssh": ": install the client of OpenSSH", "srun": ": cluster.launch=srun is for Slurm jobs"}
_SRUN = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--cpu-bind=none", "--unbuffered"]

StartMethod = Literal["ssh", "srun", "local"]


class LostHostError(Exception):
    """A host does not answer, or its agent has ended. The message says why, without the name of the host."""


def start_command(host: str, method: StartMethod) -> list[str]:
    """Return the command that starts the agent of ``host``; Python and the project have the same path on all hosts."""
    program = [sys.executable, "-u", str(AGENT)]
    if method == "local":
        return program
    if method == "srun":
        return [*_SRUN, f"--nodelist={host}", *program]
    return [*_SSH, host, f"exec {shlex.join(program)}"]


class AgentLink:
    """A connection to an agent. Threads read what it sends, and send it signs of life."""

    def __init__(self, host: str, method: StartMethod) -> None:
        """Start the agent; ``wait_for_start`` waits for it.

        Raises:
            UserError: ssh or srun cannot be started.
        """
        self.host = host
        self.report: NodeReport | None = None  # the newest
        self.agent: tuple[int, str] | None = None  # process id and start time
        self._method = method
        command = start_command(host, method)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl+C in the terminal must not end it
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started: {error.strerror}{_NEEDED.get(method, '')}") from None
        self._numbers = itertools.count()
        self._replies: dict[int, queue.Queue[dict[str, Any] | None]] = {}
        self._errors: deque[str] = deque(maxlen=20)  # the last lines of standard error
        self._first_output = ""  # the last line of standard output before the first message, such as of a shell
        self._end_reason: str | None = None  # why the agent ends, as it has said
        self._failure: str | None = None  # why the connection is not used any more, although it may still be open
        self._output: OutputQueue[tuple[int, str]] = OutputQueue(_print, lambda line: (2, line))
        self._hello = threading.Event()
        self._silence = 0.0  # seconds without a message, except those in which this process was stopped (SIGSTOP)
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
        return self._method == "local"

    @property
    def is_open(self) -> bool:
        """Whether the agent answers."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Why the agent does not answer; None if it does."""
        if (end := self._end) is not None:
            return end
        silence = self._silence
        return f"it has not answered for {silence:.0f} s" if silence > SILENCE_SECONDS else None

    @property
    def was_cut_off(self) -> bool:
        """Whether the agent has ended because this process did not send: it was stopped, or its network was."""
        return self._has_ended.is_set() and (self._end_reason or "").startswith(NOT_HEARD)

    def wait_for_start(self) -> None:
        """Wait until the agent has started.

        Raises:
            LostHostError: it does not start.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not self._hello.wait(0.05):
            if (end := self._end) is not None:
                raise LostHostError(end)
            if time.monotonic() > deadline:
                self.close()
                raise LostHostError(self._late_text())

    def request(self, what: str, **parameters: Any) -> None:
        """Send a request; do not wait for the reply."""
        self._requests.put(encode({"id": next(self._numbers), "do": what, **parameters}))

    def call(self, what: str, seconds: float, **parameters: Any) -> Any:
        """Send a request and return the value of its reply.

        Raises:
            LostHostError: there is no reply within ``seconds``, or the connection ends.
            UserError: the agent refuses; the message names the host.
        """
        number = next(self._numbers)
        reply = self._replies[number] = queue.Queue()
        self._requests.put(encode({"id": number, "do": what, **parameters}))
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
        """End the connection: the agent lets its ranks save, ends them and then itself, which may take stop_seconds."""
        self._is_closed = True
        self._requests.put(None)

    def kill(self) -> None:
        """End the connection at once. The agent ends as after ``close``, also one on this machine, or it hangs.

        The connection counts as lost from now on; ``end_previous`` ends what is left.
        """
        self._fail("the connection to its agent was ended")
        if not self.is_local:
            self._process.kill()

    def wait(self, seconds: float) -> bool:
        """Wait until the agent has ended after ``close``; return False if it has not within ``seconds``.

        Then what it has sent is printed, unless that takes long.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
            self._has_ended.wait(_READ_SECONDS)
            self._output.close()
            return True
        return False

    def _fail(self, reason: str) -> None:
        self._failure = self.problem or reason
        self.close()

    def _value_of(self, reply: Mapping[str, Any] | None) -> Any:
        if reply is None:
            raise LostHostError(self._end or self._end_text())
        if "error" in reply:
            raise UserError(f"host {self.host}: {reply['error']}")
        return reply["value"]

    @property
    def _end(self) -> str | None:
        """Why the connection is not used any more; None if it is."""
        return self._failure or (self._end_text() if self._has_ended.is_set() else None)

    def _end_text(self) -> str:
        """Return why the connection has ended."""
        if self._end_reason is not None:
            return self._end_reason
        last = self._last_line()
        if self._hello.is_set():
            return (
                f"the connection to its agent has ended ({last})" if last else "the connection to its agent has ended"
            )
        if self._method == "ssh" and self._process.poll() == _SSH_FAILED:
            return advice_on(self.host, list(self._errors))
        return f"its agent cannot be started: {last or f'exit status {self._process.poll()}'}"

    def _late_text(self) -> str:
        """Return that the agent has not started in time, and why perhaps."""
        text = f"its agent has not started within {_START_SECONDS:.0f} s ({sys.executable} {AGENT})"
        if last := self._last_line():
            text += f", last output: {last}"
        if self._method == "ssh":
            text += (
                f"; a startup file of the shell there may wait: `ssh {self.host} true` must end at once and print"
                " nothing"
            )
        return text

    def _last_line(self) -> str:
        """Return the last line of standard error, else of what came before the first message; "" if there is none."""
        return next((line for line in reversed(self._errors) if line), self._first_output)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                self._silence = 0.0
                if not self._hello.is_set():  # startup files of the shell may have printed something
                    before, start, rest = line.partition(_HELLO)
                    self._first_output = _shown(before) or self._first_output
                    line = start + rest
                message = safe_json.parse_object(line)
                if message is None or self._failure is not None:
                    continue
                try:
                    self._take(message)
                except Exception as error:  # the agent has other code than this process
                    reason = f"{type(error).__name__}: {one_line_reason(error, _MAX_REASON)}"
                    self._fail(f"its agent has sent a message that is not understood ({reason})")
        self._process.wait()
        self._error_reader.join(1)  # the last lines of standard error
        self._output.close(0)
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
            self._output.put((int(message["stream"]), str(message["output"])))
        elif "end" in message:
            self._end_reason = str(message["end"])
        elif (reply := self._replies.get(message.get("id", -1))) is not None:
            reply.put(dict(message))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stderr:
                self._errors.append(_shown(line))

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self._requests.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def _ping(self) -> None:
        checked = time.monotonic()
        while not self._is_closed and not self._has_ended.wait(PING_SECONDS):
            now = time.monotonic()
            self._silence += min(now - checked, 2 * PING_SECONDS)
            checked = now
            self.request("ping")


def _shown(line: bytes) -> str:
    """Return a line of output for messages."""
    return truncated(line.decode(errors="backslashreplace").strip(), _MAX_REASON)


def _print(output: tuple[int, str]) -> None:
    """Print output of ranks, given with the number of the stream."""
    number, text = output
    stream = sys.stderr if number == 2 else sys.stdout
    with contextlib.suppress(OSError, ValueError):  # a closed terminal
        stream.write(text)
        stream.flush()
