"""The ways a message goes: a command of the user's, and whatever apprise reaches.

Each message is taken by a child process that is given a time limit, so that nothing that a service or a command does
can hold up or end the process that watches over the run. Addresses hold passwords: they are passed on by a pipe alone,
and a way's name says where its address is written, not what it is.
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

ADDRESSES = "DS_GPT2_ALERT_URLS"  # environment: apprise's addresses, separated by white space
LIMIT_SECONDS = 30.0

_TYPES = {
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
    """Run by the shell, with the message's text on stdin and the rest in the environment."""

    command: str

    @property
    def name(self) -> str:
        return "the command"

    def take(self, message: Message, seconds: float = LIMIT_SECONDS) -> str | None:
        """Why the message was not taken; None if it was."""
        told = {
            "DS_GPT2_RUN": message.run,
            "DS_GPT2_KIND": message.kind,
            "DS_GPT2_STEP": "" if message.step is None else str(message.step),
            "DS_GPT2_TITLE": message.title,
        }
        code, _ = _run(["/bin/sh", "-c", self.command], message.text + "\n", seconds, told)
        return None if code == 0 else _how_it_ended(code, seconds)


@dataclass(frozen=True)
class Address:
    """One of apprise's."""

    name: str
    url: str = field(repr=False)

    def take(self, message: Message, seconds: float = LIMIT_SECONDS) -> str | None:
        """Why the message was not taken; None if it was."""
        kind = _TYPES.get(message.kind, "warning")
        code, output = self._ask({"title": message.title, "body": message.text, "type": kind}, seconds)
        if code == apprise_child.UNKNOWN:
            return "apprise does not know such an address"
        return None if code == apprise_child.TAKEN else output or _how_it_ended(code, seconds)

    def service(self, seconds: float = LIMIT_SECONDS) -> str | None:
        """What kind of service it is, and nothing more; None if apprise knows none of that kind."""
        code, output = self._ask({}, seconds)
        if code == apprise_child.UNKNOWN:
            return None
        return output or "?"

    def _ask(self, request: dict[str, str], seconds: float) -> tuple[int | None, str]:
        text = json.dumps({"url": self.url, "seconds": max(1, round(seconds)), **request})
        return _run([sys.executable, apprise_child.__file__], text, seconds, keep_output=True)


Channel = Command | Address


def ways(settings: AlertSettings) -> list[Channel]:
    """All that are set up.

    Raises:
        UserError: the file of addresses cannot be used.
    """
    command = [Command(settings.command)] if settings.command else []
    return [*command, *addresses(settings)]


def addresses(settings: AlertSettings) -> list[Address]:
    """Those of the environment, then those of the file.

    Raises:
        UserError: the file cannot be used.
    """
    given = enumerate(os.environ.get(ADDRESSES, "").split(), start=1)
    file = _file_of_addresses(settings)
    lines = enumerate(_read_private(file).splitlines() if file else [], start=1)
    return [
        *(Address(f"address {number} of {ADDRESSES}", url) for number, url in given),
        *(Address(f"line {number} of {file}", url) for number, line in lines if (url := _address_in(line))),
    ]


def check(settings: AlertSettings) -> dict[Address, str]:
    """Whether messages could go out, as far as can be seen without sending one.

    Returns:
        What kind of service is at each address.

    Raises:
        UserError: the file of addresses cannot be used, apprise is missing, or knows no such address.
    """
    found = addresses(settings)
    if found and importlib.util.find_spec("apprise") is None:
        install = f"{sys.executable} -m pip install --editable '{PROJECT_DIR}[alerts]'"
        raise UserError(f"{found[0].name} is to get alerts, but apprise is not installed: {install}")
    services = {}
    with ThreadPoolExecutor(max(1, len(found))) as threads:
        for address, service in zip(found, threads.map(Address.service, found), strict=True):
            if service is None:
                where = "https://github.com/caronc/apprise/wiki"
                raise UserError(f"{address.name} is no address that apprise knows: {where} shows how they look")
            services[address] = service
    return services


def deliver(messages: Mapping[Channel, Message], seconds: float = LIMIT_SECONDS) -> dict[Channel, str | None]:
    """Give each way its message, all at once; for each, why it was not taken, or None. Takes ``seconds`` at most."""

    def take(way: Channel) -> str | None:
        try:
            return way.take(messages[way], seconds)
        except Exception as error:  # no memory for a process, for one
            return type(error).__name__

    with ThreadPoolExecutor(max(1, len(messages))) as threads:
        return dict(zip(messages, threads.map(take, messages), strict=True))


def _run(
    command: list[str],
    text: str,
    seconds: float,
    variables: Mapping[str, str] | None = None,
    keep_output: bool = False,
) -> tuple[int | None, str]:
    """Exit code (None: it was killed when the time was over) and output of a child, which has ``text`` on stdin."""
    environment = {name: value for name, value in os.environ.items() if name != ADDRESSES}
    child = subprocess.Popen(
        command,
        env={**environment, **(variables or {})},
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if keep_output else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # out of Ctrl+C's reach, and killed with all that it has started
    )
    try:
        output, _ = child.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return None, ""
    return child.returncode, (output or "").strip()


def _how_it_ended(code: int | None, seconds: float) -> str:
    if code is None:
        return f"no end within {seconds:g} s"
    return f"exit status {code}" if code >= 0 else f"killed by signal {-code}"


def _file_of_addresses(settings: AlertSettings) -> Path | None:
    """The one that is set, else the one in the home directory, if there is one."""
    if settings.urls_file is not None:
        return settings.urls_file
    with contextlib.suppress(RuntimeError, OSError):  # no home directory
        file = Path("~/.config/ds_gpt2/alert_urls").expanduser()
        return file if os.path.lexists(file) else None
    return None


def _read_private(file: Path) -> str:
    """
    Raises:
        UserError: it is not a file that only this user can read.
    """
    try:
        with open(file, encoding="utf-8", opener=_open_at_once) as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{file} is not a plain file: write one address a line into one")
            if found.st_uid != os.geteuid():
                raise UserError(f"{file} belongs to another user: alerts go by a file of your own")
            if found.st_mode & 0o077:
                raise UserError(f"{file} can be read by others, and holds passwords: chmod 600 {file}")
            return opened.read()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; it holds alert addresses, one a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: it holds alert addresses, one a line") from None


def _open_at_once(file: str, flags: int) -> int:
    """A named pipe would make one wait for its other end."""
    return os.open(file, flags | os.O_NONBLOCK)


def _address_in(line: str) -> str:
    return "" if line.lstrip().startswith("#") else line.strip()
