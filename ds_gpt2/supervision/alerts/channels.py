"""The channels of alerts: a command of the user, and the addresses of services that apprise supports.

A child process with a time limit sends each message, so that no service and no command can block or end the supervisor.
Addresses contain passwords: they are passed on by a pipe only, and a channel is named by where its address is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import PROJECT_DIR, AlertSettings
from ds_gpt2.supervision.alerts import apprise_child
from ds_gpt2.supervision.alerts.message import Message

ADDRESSES = "DS_GPT2_ALERT_URLS"  # environment: apprise addresses, separated by white space
LIMIT_SECONDS = 30.0  # for one delivery

_TYPES = {  # apprise's types of notification; the default is a warning
    "done": "success",
    "backup_ok": "success",
    "launch": "info",
    "start": "info",
    "save": "info",
    "best": "info",
    "test": "info",
}


@dataclass(frozen=True)
class Command:
    """A shell command that gets the message's text on stdin and the rest in its environment."""

    command: str

    @property
    def name(self) -> str:
        return "the command"

    def send(self, message: Message, seconds: float = LIMIT_SECONDS) -> str | None:
        """Return why the message was not delivered; None if it was."""
        variables = {
            "DS_GPT2_RUN": message.run,
            "DS_GPT2_KIND": message.kind,
            "DS_GPT2_STEP": "" if message.step is None else str(message.step),
            "DS_GPT2_TITLE": message.title,
        }
        code, _ = _run(["/bin/sh", "-c", self.command], message.text + "\n", seconds, variables)
        return None if code == 0 else _failure_text(code, seconds)


@dataclass(frozen=True)
class Address:
    """An apprise address."""

    name: str
    url: str = field(repr=False)

    def send(self, message: Message, seconds: float = LIMIT_SECONDS) -> str | None:
        """Return why the message was not delivered; None if it was."""
        kind = _TYPES.get(message.kind, "warning")
        code, output = self._request({"title": message.title, "body": message.text, "type": kind}, seconds)
        if code == apprise_child.UNKNOWN:
            return "apprise does not support this address"
        return None if code == apprise_child.SENT else output or _failure_text(code, seconds)

    def service(self, seconds: float = LIMIT_SECONDS) -> str | None:
        """Return the kind of service, such as ``Slack``; None if apprise does not support the address."""
        code, output = self._request({}, seconds)
        if code == apprise_child.UNKNOWN:
            return None
        return output or "?"

    def _request(self, request: dict[str, str], seconds: float) -> tuple[int | None, str]:
        text = json.dumps({"url": self.url, "seconds": max(1, round(seconds)), **request})
        return _run([sys.executable, apprise_child.__file__], text, seconds, keep_output=True)


Channel = Command | Address


def channels_of(settings: AlertSettings) -> list[Channel]:
    """Return all channels that are configured.

    Raises:
        UserError: the file of addresses cannot be used.
    """
    return [*commands(settings), *addresses(settings)]


def commands(settings: AlertSettings) -> list[Command]:
    """Return the command that is configured, if there is one."""
    return [Command(settings.command)] if settings.command else []


def addresses(settings: AlertSettings) -> list[Address]:
    """Return the addresses in the environment, then those in the file.

    Raises:
        UserError: the file cannot be used.
    """
    in_environment = enumerate(os.environ.get(ADDRESSES, "").split(), start=1)
    file = _address_file(settings)
    lines = enumerate(_read_private(file).splitlines() if file else [], start=1)
    return [
        *(Address(f"address {number} of {ADDRESSES}", url) for number, url in in_environment),
        *(Address(f"line {number} of {file}", url) for number, line in lines if (url := _address_in(line))),
    ]


def check(settings: AlertSettings) -> dict[Address, str]:
    """Check the addresses without sending a message.

    Returns:
        The kind of service at each address.

    Raises:
        UserError: the file of addresses cannot be used, or apprise is not installed or cannot use one of them.
    """
    found = addresses(settings)
    if found and importlib.util.find_spec("apprise") is None:
        install = f"{sys.executable} -m pip install --editable '{PROJECT_DIR}[alerts]'"
        raise UserError(f"alerts use {found[0].name}, but apprise is not installed: {install}")
    services = {}
    with ThreadPoolExecutor(max(1, len(found))) as threads:
        for address, service in zip(found, threads.map(Address.service, found), strict=True):
            if service is None:
                formats = "https://github.com/caronc/apprise/wiki"
                raise UserError(f"apprise does not support {address.name}; see {formats} for the formats of addresses")
            services[address] = service
    return services


def deliver(messages: Mapping[Channel, Message], seconds: float = LIMIT_SECONDS) -> dict[Channel, str | None]:
    """Send each channel its message, all at the same time, within ``seconds``.

    Returns:
        For each channel why the message was not delivered; None if it was.
    """

    def send(channel: Channel) -> str | None:
        try:
            return channel.send(messages[channel], seconds)
        except Exception as error:  # such as too little memory for a process
            return type(error).__name__

    with ThreadPoolExecutor(max(1, len(messages))) as threads:
        return dict(zip(messages, threads.map(send, messages), strict=True))


def _run(
    command: list[str],
    text: str,
    seconds: float,
    variables: Mapping[str, str] | None = None,
    keep_output: bool = False,
) -> tuple[int | None, str]:
    """Run ``command`` with ``text`` on stdin, at most for ``seconds``.

    Returns:
        The exit code, None if the command was killed after ``seconds``; and the output.
    """
    environment = {name: value for name, value in os.environ.items() if name != ADDRESSES}
    child = subprocess.Popen(
        command,
        env={**environment, **(variables or {})},
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if keep_output else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C does not reach it, and it can be killed with all processes that it starts
    )
    try:
        output, _ = child.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return None, ""
    return child.returncode, (output or "").strip()


def _failure_text(code: int | None, seconds: float) -> str:
    if code is None:
        return f"timed out after {seconds:g} s"
    return f"exit status {code}" if code >= 0 else f"killed by signal {-code}"


def _address_file(settings: AlertSettings) -> Path | None:
    """Return the configured file of addresses, else the one in the home directory; None if there is neither."""
    if settings.urls_file is not None:
        return settings.urls_file
    with contextlib.suppress(RuntimeError, OSError):  # no home directory
        file = Path("~/.config/ds_gpt2/alert_urls").expanduser()
        return file if os.path.lexists(file) else None
    return None


def _read_private(file: Path) -> str:
    """Return the text of a file that only this user can read.

    Raises:
        UserError: it is not such a file.
    """
    try:
        with open(file, encoding="utf-8", opener=_open_without_blocking) as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{file} is not a regular file: write the alert addresses to a file, one per line")
            if status.st_uid != os.geteuid():
                raise UserError(f"{file} belongs to another user: write the alert addresses into a file of your own")
            if status.st_mode & 0o077:
                raise UserError(f"{file} contains passwords and can be read by other users: chmod 600 {file}")
            return opened.read()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; it must contain the alert addresses, one per line"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: it must contain the alert addresses, one per line") from None


def _open_without_blocking(file: str, flags: int) -> int:
    """Open a file; a named pipe would otherwise block until a process opens its other end."""
    return os.open(file, flags | os.O_NONBLOCK)


def _address_in(line: str) -> str:
    return "" if line.lstrip().startswith("#") else line.strip()
