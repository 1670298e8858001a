"""A pytest plugin for tests of alerts: a service that receives them, and helpers."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_gpt2.config.settings import AlertSettings
from ds_gpt2.run_dir.journal import read_journal
from ds_gpt2.supervision.alerts.channels import ADDRESSES

SECRET = "hunter2secret"  # in each address of the service


class Service:
    """Receives what apprise's ``json://`` posts; ``status`` is its answer, which waits while ``answers`` is not set."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.requests = 0
        self.status = 200
        self.answers = threading.Event()
        self.answers.set()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = service.status  # read before the request is counted: a test may change it after that
                service.requests += 1
                service.answers.wait(60)
                if status == 200:
                    service.received.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"json://me:{SECRET}@127.0.0.1:{self._server.server_port}/{SECRET}?+X-Token={SECRET}"

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.received]

    def close(self) -> None:
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def alert_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without addresses, so that no message of a test reaches the user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(ADDRESSES, raising=False)
    return tmp_path / "home"


@pytest.fixture
def service(alert_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A running service, whose address is in the environment."""
    service = Service()
    monkeypatch.setenv(ADDRESSES, service.address)
    yield service
    service.close()


def settings_with_command(run_dir: Path) -> AlertSettings:
    """Return settings with a command that appends each title and text to a file beside ``run_dir``."""
    return AlertSettings(command=f'(echo "== $DS_GPT2_TITLE"; cat) >> "{run_dir.parent / "messages"}"', per_hour=3)


def command_messages(run_dir: Path) -> list[str]:
    """Return the messages that the command of ``settings_with_command`` got."""
    file = run_dir.parent / "messages"
    return file.read_text(encoding="utf-8").split("== ")[1:] if file.exists() else []


def alert_events(run_dir: Path) -> list[str]:
    """Return what the journal records about deliveries."""
    return [event.text for event in read_journal(run_dir) if event.kind == "alert"]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_addresses(file: Path, text: str, mode: int = 0o600) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file
