"""``tensorboard``: a real server queried over HTTP, and the printed commands."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT, end_session
from project_dir import add_run
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ds_gpt2.commands import tensorboard
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import event_directory
from ds_gpt2.monitoring.note_events import show_in_tensorboard
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.notes import Note
from ds_gpt2.tools.tensorboard import server
from ds_gpt2.tools.tensorboard.server import link_runs, ssh_command, tmux_command

CONFIG = """
run: {name: NAME, dir: FOLDER/runs}
model: {preset: 7M}
data: {dir: data}
schedule: {steps: 10, warmup_steps: 1}
"""


def make_run(folder: Path, name: str, more: str = "") -> Path:
    return add_run(folder, name, CONFIG + more)


def write_events(directory: Path) -> None:
    writer = EventFileWriter(str(directory))
    writer.add_event(Event(wall_time=1.0, step=7, summary=Summary(value=[Summary.Value(tag="loss", simple_value=3.5)])))
    writer.close()


@contextlib.contextmanager
def serving(*words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in its own session and check that no process is left at the end."""
    command = [sys.executable, "-m", "ds_gpt2", "tensorboard", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, start_new_session=True, **pipes)
    try:
        yield process
        process.terminate()
        process.communicate(timeout=30)  # the data server holds the pipe until it exits
    finally:
        left = end_session(process.pid)
    assert left == []


def query(url: str, is_complete: Callable[[Any], bool], seconds: float = 60) -> Any:
    """Return the reply to ``url`` as soon as it is complete."""
    deadline, answer = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
            if is_complete(answer):
                return answer
        time.sleep(0.2)
    raise AssertionError(f"{url} answers {answer}")


@pytest.mark.slow
def test_all_runs_are_served_including_later_ones(tmp_path: Path) -> None:
    shown = make_run(tmp_path, "shown")
    elsewhere = make_run(tmp_path, "elsewhere", f"monitor: {{dir: {tmp_path / 'other disk'}}}\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with serving(
        str(tmp_path / "runs"), SSH_CONNECTION="10.0.0.9 5000 10.0.0.1 2222", TMPDIR=str(temporary)
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        address = re.fullmatch(r"TensorBoard of .*/runs: (http://127\.0\.0\.1:(\d+)/) \(Ctrl\+C stops it\)\n", lines[0])
        assert address is not None, lines
        url, port = address.groups()
        assert lines[1] == "no curves yet: they appear when a run has written some\n"
        assert lines[3].startswith(f"  ssh -N -L {port}:localhost:{port} -p 2222 ") and lines[3].endswith("@10.0.0.1\n")
        assert lines[5] == f"  tmux new -d -s tensorboard './launch.sh tensorboard {tmp_path}/runs --port {port}'\n"
        write_events(shown / "tensorboard")
        write_events(shown / "tensorboard" / "reference")
        write_events(event_directory(elsewhere))
        write_events(make_run(tmp_path, "later") / "tensorboard")
        notes = [Note("2026-01-01 00:00:00 +0000", step, f"note {step}") for step in range(150)]
        show_in_tensorboard(notes, shown / "tensorboard" / "notes")  # more than TensorBoard loads by default
        tags = query(url + "data/plugin/scalars/tags", lambda answer: len(answer) == 4)
        runs = ["shown", "shown/reference", "elsewhere", "later"]
        assert {run: list(names) for run, names in tags.items()} == {run: ["loss"] for run in runs}
        text = url + "data/plugin/text/text?run=shown%2Fnotes&tag=notes"
        assert "<p>note 0</p>" in query(text, lambda answer: len(answer) == 150)[0]["text"]
    assert process.returncode == exit_codes.DONE
    assert [path.name for path in temporary.iterdir() if path.name.startswith("ds_gpt2")] == []


@pytest.mark.slow
def test_a_port_in_use_is_a_one_line_error(tmp_path: Path) -> None:
    make_run(tmp_path, "test")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "ds_gpt2", "tensorboard", str(tmp_path / "runs" / "test"), "--port", str(port)]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (exit_codes.MISTAKE, "")
    error = rf"error: port {port} is in use: omit --port, or give another, such as \d+\n"
    assert re.fullmatch(error, result.stderr), result.stderr


@pytest.fixture
def _signals() -> Iterator[None]:
    """Restore the signal handlers: the command sets those of its process, which is the process of the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_the_server_is_open_to_the_network_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, hosts = make_run(tmp_path, "test"), []

    def launch(links: Path, host: str, port: int | None, title: str) -> int:
        hosts.append((host, title))
        return 6006

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "launch", launch)
    monkeypatch.setattr(time, "sleep", interrupt)
    parser = argparse.ArgumentParser()
    tensorboard.add_arguments(parser)
    assert tensorboard.run(parser.parse_args([str(run_dir)])) == exit_codes.DONE
    assert capsys.readouterr().err == ""
    assert tensorboard.run(parser.parse_args([str(run_dir), "--open-to-network"])) == exit_codes.DONE
    printed = capsys.readouterr()
    assert printed.err.startswith("WARNING: anyone who can reach port 6006 of this machine can read everything")
    assert "--port 6006 --open-to-network'\n" in printed.out and "ssh" not in printed.out
    assert hosts == [("127.0.0.1", "test"), ("0.0.0.0", "test")]


def test_the_ssh_command_has_the_address_of_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "me")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.1 22")
    assert ssh_command(6006) == "ssh -N -L 6006:localhost:6006 me@10.0.0.1"
    monkeypatch.setenv("SSH_CONNECTION", "fe80::9 50000 fe80::1 2222")
    assert ssh_command(7000) == "ssh -N -L 7000:localhost:7000 -p 2222 me@fe80::1"
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.setattr("socket.getfqdn", lambda: "gpu1.example.org")
    assert ssh_command(6006) == "ssh -N -L 6006:localhost:6006 me@gpu1.example.org"


def test_the_ssh_command_has_a_placeholder_for_an_unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown_user() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setattr("getpass.getuser", unknown_user)
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost.localdomain")
    address = ssh_command(6006).removeprefix("ssh -N -L 6006:localhost:6006 USER@")
    assert address and not address.startswith("localhost")


def test_the_tmux_command_is_quoted() -> None:
    line = tmux_command("/my runs/it's", 6006)
    shell = line.replace("tmux", f'"{sys.executable}" -c "import sys; print(sys.argv)"', 1)
    received = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    command = ast.literal_eval(received)[-1]  # tmux passes it to its own shell
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
    assert words.splitlines() == ["./launch.sh", "tensorboard", "/my runs/it's", "--port", "6006"]


def test_links_follow_the_runs(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    first, second = make_run(tmp_path, "first"), make_run(tmp_path, "second")
    link_runs(tmp_path / "runs", links)
    assert list(links.iterdir()) == []  # nothing written yet
    for run_dir in (first, second):
        (run_dir / "tensorboard").mkdir()
    link_runs(tmp_path / "runs", links)
    assert {link.name for link in links.iterdir()} == {"first", "second"}
    shutil.rmtree(second)
    link_runs(tmp_path / "runs", links)
    assert {link.name: link.resolve() for link in links.iterdir()} == {"first": first / "tensorboard"}


def test_a_run_without_settings_is_linked(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "lost")
    (run_dir / "config.yaml").rename(run_dir / "metrics.jsonl")
    links = tmp_path / "links"
    links.mkdir()
    write_events(run_dir / "tensorboard")
    link_runs(tmp_path / "runs", links)
    assert [link.resolve() for link in links.iterdir()] == [run_dir / "tensorboard"]


def test_event_files_are_found_by_the_settings_or_in_the_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "test", f"monitor: {{dir: {tmp_path / 'other'}}}\n")
    assert event_directory(run_dir) == tmp_path / "other" / "test"
    moved = Path(shutil.copytree(run_dir, tmp_path / "moved"))
    (moved / "tensorboard").mkdir()
    assert event_directory(moved) == moved / "tensorboard"
    (moved / "config.yaml").write_text("no: {such: setting}")
    assert event_directory(moved) == moved / "tensorboard"


def test_a_broken_tensorboard_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.program", None)
    monkeypatch.delattr("tensorboard.program", raising=False)
    with pytest.raises(UserError, match=r"^TensorBoard cannot be imported \(.*\): reinstall it with `.*`$"):
        server._import_tensorboard()


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_an_invalid_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    tensorboard.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--port", port])
    assert f"'{port}'" in capsys.readouterr().err
