"""``tensorboard``: a real one, asked over HTTP, and what a person far away is told to type."""

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
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ds_gpt2.commands import tensorboard
from ds_gpt2.commands.tensorboard import event_directory, link_runs, ssh_command, tmux_command
from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.notes import Note, show_in_tensorboard

CONFIG = """
run: {name: NAME, dir: RUNS}
model: {preset: 7M}
data: {dir: data}
schedule: {steps: 10, warmup_steps: 1}
"""


def make_run(folder: Path, name: str, more: str = "") -> Path:
    run_dir = folder / "runs" / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG.replace("NAME", name).replace("RUNS", str(folder / "runs")) + more)
    return run_dir


def write_events(directory: Path) -> None:
    writer = EventFileWriter(str(directory))
    writer.add_event(Event(wall_time=1.0, step=7, summary=Summary(value=[Summary.Value(tag="loss", simple_value=3.5)])))
    writer.close()


@contextlib.contextmanager
def serving(*words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The verb in a session of its own; nothing of it is left afterwards."""
    command = [sys.executable, "-m", "ds_gpt2", "tensorboard", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, start_new_session=True, **pipes)
    try:
        yield process
        process.terminate()
        process.communicate(timeout=30)  # the data server holds the pipe as long as it lives
    finally:
        left = end_session(process.pid)
    assert left == []


def asked(url: str, enough: Callable[[Any], bool], seconds: float = 60) -> Any:
    """The answer to ``url`` as soon as it is ``enough``."""
    deadline, answer = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as reply:
            answer = json.load(reply)
            if enough(answer):
                return answer
        time.sleep(0.2)
    raise AssertionError(f"{url} answers {answer}")


def test_all_runs_are_served_whatever_comes_later_too(tmp_path: Path) -> None:
    shown = make_run(tmp_path, "shown")
    elsewhere = make_run(tmp_path, "elsewhere", f"monitor: {{dir: {tmp_path / 'other disk'}}}\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with serving(
        str(tmp_path / "runs"), SSH_CONNECTION="10.0.0.9 5000 10.0.0.1 2222", TMPDIR=str(temporary)
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(6)]
        address = re.fullmatch(r"TensorBoard of .*/runs: (http://127\.0\.0\.1:(\d+)/) \(Ctrl\+C ends it\)\n", said[0])
        assert address is not None, said
        url, port = address.groups()
        assert said[1] == "no curves yet: they appear as soon as a run has written some\n"
        assert said[3].startswith(f"  ssh -N -L {port}:localhost:{port} -p 2222 ") and said[3].endswith("@10.0.0.1\n")
        assert said[5] == f"  tmux new -d -s tensorboard './launch.sh tensorboard {tmp_path}/runs --port {port}'\n"
        write_events(shown / "tensorboard")
        write_events(shown / "tensorboard" / "reference")
        write_events(event_directory(elsewhere))
        write_events(make_run(tmp_path, "later") / "tensorboard")
        seen = [Note("2026-01-01 00:00:00 +0000", step, f"seen {step}") for step in range(150)]
        show_in_tensorboard(seen, shown / "tensorboard" / "notes")  # more than it shows if it is not told to
        tags = asked(url + "data/plugin/scalars/tags", lambda answer: len(answer) == 4)
        runs = ["shown", "shown/reference", "elsewhere", "later"]
        assert {run: list(names) for run, names in tags.items()} == {run: ["loss"] for run in runs}
        text = url + "data/plugin/text/text?run=shown%2Fnotes&tag=notes"
        assert "<p>seen 0</p>" in asked(text, lambda answer: len(answer) == 150)[0]["text"]
    assert process.returncode == exit_report.DONE
    assert [path.name for path in temporary.iterdir() if path.name.startswith("ds_gpt2")] == []


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    make_run(tmp_path, "test")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "ds_gpt2", "tensorboard", str(tmp_path / "runs" / "test"), "--port", str(port)]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (exit_report.MISTAKE, "")
    said = rf"error: port {port} is in use: leave --port out, or give another, such as \d+\n"
    assert re.fullmatch(said, result.stderr), result.stderr


@pytest.fixture
def _signals() -> Iterator[None]:
    """The verb handles signals of its process, which here is that of the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_only_who_asks_for_it_opens_it_to_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, hosts = make_run(tmp_path, "test"), []

    def launch(links: Path, host: str, port: int | None, title: str) -> int:
        hosts.append((host, title))
        return 6006

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard, "_launch", launch)
    monkeypatch.setattr(tensorboard.time, "sleep", interrupt)
    parser = argparse.ArgumentParser()
    tensorboard.add_arguments(parser)
    assert tensorboard.run(parser.parse_args([str(run_dir)])) == exit_report.DONE
    assert capsys.readouterr().err == ""
    assert tensorboard.run(parser.parse_args([str(run_dir), "--open-to-network"])) == exit_report.DONE
    said = capsys.readouterr()
    assert said.err.startswith("WARNING: everybody who can reach this machine's port 6006 reads everything")
    assert "--port 6006 --open-to-network'\n" in said.out and "ssh" not in said.out
    assert hosts == [("127.0.0.1", "test"), ("0.0.0.0", "test")]


def test_what_to_type_far_away_names_the_address_that_one_logged_in_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "me")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.1 22")
    assert ssh_command(6006) == "ssh -N -L 6006:localhost:6006 me@10.0.0.1"
    monkeypatch.setenv("SSH_CONNECTION", "fe80::9 50000 fe80::1 2222")
    assert ssh_command(7000) == "ssh -N -L 7000:localhost:7000 -p 2222 me@fe80::1"
    monkeypatch.delenv("SSH_CONNECTION")
    monkeypatch.setattr("socket.getfqdn", lambda: "gpu1.example.org")
    assert ssh_command(6006) == "ssh -N -L 6006:localhost:6006 me@gpu1.example.org"


def test_where_nothing_is_known_a_person_fills_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost.localdomain")
    address = ssh_command(6006).removeprefix("ssh -N -L 6006:localhost:6006 USER@")
    assert address and not address.startswith("localhost")


def test_the_line_for_tmux_survives_the_shell() -> None:
    line = tmux_command("/my runs/it's", 6006)
    shell = line.replace("tmux", f'"{sys.executable}" -c "import sys; print(sys.argv)"', 1)
    given = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    command = ast.literal_eval(given)[-1]  # which tmux hands to a shell of its own
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
    assert words.splitlines() == ["./launch.sh", "tensorboard", "/my runs/it's", "--port", "6006"]


def test_links_come_and_go_with_the_runs(tmp_path: Path) -> None:
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


def test_event_files_are_found_where_the_settings_say_or_where_the_run_lies(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "test", f"monitor: {{dir: {tmp_path / 'other'}}}\n")
    assert event_directory(run_dir) == tmp_path / "other" / "test"
    moved = Path(shutil.copytree(run_dir, tmp_path / "moved"))
    (moved / "tensorboard").mkdir()
    assert event_directory(moved) == moved / "tensorboard"
    (moved / "config.yaml").write_text("no: {such: setting}")
    assert event_directory(moved) == moved / "tensorboard"


def test_a_broken_tensorboard_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.program", None)
    monkeypatch.delattr("tensorboard.program", raising=False)
    with pytest.raises(UserError, match=r"^TensorBoard cannot be loaded \(.*\): install it again with `.*`$"):
        tensorboard._import_tensorboard()


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_an_impossible_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    tensorboard.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--port", port])
    assert f"'{port}'" in capsys.readouterr().err
