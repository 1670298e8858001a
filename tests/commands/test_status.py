"""``status``: text output, JSON, exit codes, messages."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT
from project_dir import add_run, use_as_project

from ds_gpt2 import cli
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.heartbeat import Heartbeat
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.supervision.alerts import alerts
from ds_gpt2.tools.status import news

CONFIG = """
run: {name: NAME, dir: FOLDER/runs}
model: {preset: 7M}
data: {dir: FOLDER/data}
schedule: {steps: 100, warmup_steps: 1}
checkpoint: {dir: FOLDER/checkpoints, every: 50, min_free_gb: 0}
"""
PROGRAM = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "status"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, of which the newer is trained by this process, and the older has died."""
    use_as_project(tmp_path, monkeypatch)
    for name, age in (("old", 100), ("new", 0)):
        run_dir = add_run(tmp_path, name, CONFIG)
        os.utime(run_dir / "config.yaml", (time.time() - age,) * 2)
        now = time.time()
        records = [{"step": step, "time": now - 40 + step, "train/loss": 3.0} for step in range(1, 41)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        Journal(run_dir).write("start", "started", 0)
    Heartbeat(tmp_path / "runs" / "new", 0).begin_step(41, 41)
    return tmp_path


def remove_heartbeat(folder: Path) -> None:
    (folder / "runs" / "new" / "heartbeat" / "rank_00000").unlink()


def add_heartbeat(folder: Path) -> None:
    Heartbeat(folder / "runs" / "new", 0).begin_step(41, 41)


def status(*words: str) -> int:
    return cli.main(["status", *words])


def test_status_shows_the_newest_run_and_its_exit_code_is_the_health(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status() == exit_codes.DONE
    output = capsys.readouterr().out
    assert output.startswith("new: running ")
    assert "\033" not in output
    remove_heartbeat(folder)
    assert status() == exit_codes.CRASHED == 1
    output = capsys.readouterr().out
    assert output.startswith("new: dead ")
    assert "! the run has no process" in output


@pytest.mark.parametrize("words", [["old"], ["{folder}/runs/old"], ["{folder}/checkpoints/old"]])
def test_run_is_selected_by_name_or_directory(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*(word.format(folder=folder) for word in words)) == 1
    assert capsys.readouterr().out.startswith("old: dead ")


def test_several_runs_have_one_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["old", "new", "old"], ["--all"]):
        assert status(*words) == 1
        assert capsys.readouterr().out == (
            "! old          dead        40%  3.000      1m\n  new          running     40%  3.000      1m\n"
        )
    assert status("new", "new") == 0
    assert capsys.readouterr().out.startswith("new: running ")


def test_all_prints_a_line_for_a_single_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "runs" / "old")
    assert status("--all") == 0
    assert capsys.readouterr().out.startswith("  new          running ")


def test_unreadable_run_does_not_hide_other_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "old" / "config.yaml").write_text("run: {name: [")
    for words in (["--all"], ["old", "new"]):
        assert status(*words) == 1
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("  new ") for line in lines) and len(lines) == 2
        assert any(line.startswith("old: ") and "not valid YAML" in line for line in lines)
    assert status("--all", "--json") == 1
    found = {each["run"]: each for each in json.loads(capsys.readouterr().out)}
    assert "not valid YAML" in found["old"]["error"] and found["new"]["state"] == "running"
    assert status("new") == 0
    capsys.readouterr()
    assert status("old") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_run_without_settings_is_shown_among_all_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "old" / "config.yaml").unlink()
    assert status("--all") == 1
    old, new = sorted(capsys.readouterr().out.splitlines(), reverse=True)
    assert new.startswith("  new ")
    fix = "restore it from a copy of the run"
    assert old == f"old: config not found: {folder}/runs/old/config.yaml; {fix}"
    (folder / "runs" / "new" / "config.yaml").unlink()
    assert status() == exit_codes.MISTAKE
    assert "new/config.yaml of the newest run is missing" in capsys.readouterr().err


def test_json_contains_all_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["healthy"], found["problems"]) == ("new", "running", True, [])
    assert found["progress"]["left_seconds"] == pytest.approx(60)
    assert found["finish_time"] == pytest.approx(time.time() + 60, abs=30)
    assert status("--json", "--all") == 1
    assert [each["run"] for each in json.loads(capsys.readouterr().out)] == ["old", "new"]
    assert status("old", "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem == {"kind": "crash", "text": "the run has no process; resume with ./launch.sh resume old"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "no run gone; runs in .*runs: old, new"),
        (["old", "--all"], "--all includes every run: remove old or --all"),
    ],
)
def test_unknown_run_is_an_error(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*words) == exit_codes.MISTAKE == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_unreadable_file_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "old" / "metrics.jsonl").unlink()
    (folder / "runs" / "old" / "metrics.jsonl").mkdir()
    assert status("old") == exit_codes.MISTAKE
    fix = "move it away, or restore the file from a copy of the run"
    assert f"old/metrics.jsonl cannot be read: Is a directory; {fix}" in capsys.readouterr().err


def test_no_runs_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").rename(folder / "elsewhere")
    for words in ([], ["--all"]):
        assert status(*words) == exit_codes.MISTAKE
        assert "start one with `./launch.sh quickstart`" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--watch", "old"], ["--watch", "0"], ["--watch", "inf"]])
def test_watch_requires_a_number_of_seconds(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*words) == exit_codes.MISTAKE
    assert "is not a number of seconds up to 86,400; put RUN before --watch" in capsys.readouterr().err


def test_watch_refreshes_until_ctrl_c(folder: Path) -> None:
    command = [*PROGRAM, str(folder / "runs" / "new"), "--watch", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = ""
    while len(re.findall("^new: running ", seen, re.MULTILINE)) < 2:
        seen += next(process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "\033" not in seen


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_terminal_output_is_redrawn_and_colored(folder: Path, no_color: str, colored: bool) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    command = [*PROGRAM, str(folder / "runs" / "new"), "--watch", "0.1"]
    process = subprocess.Popen(command, stdout=theirs, stdin=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while seen.count(b"\033[H\033[2J") < 3:
        seen += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        _drain(ours)
    os.close(ours)
    assert process.returncode == 0
    assert (b"new: \033[32mrunning\033[0m" in seen) is colored
    assert (b"new: running" in seen) is not colored


def _drain(terminal: int) -> None:
    try:
        os.read(terminal, 4096)
    except OSError:  # the other end is closed
        time.sleep(0.01)


# --- messages


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Messages passed to ``Alerts.send``."""
    messages: list[tuple[str, str, str]] = []

    def send(self: Any, kind: str, title: str, text: str) -> bool:
        messages.append((kind, title, text))
        return True

    monkeypatch.setattr(alerts.Alerts, "send", send)
    return messages


def test_healthy_run_sends_nothing(folder: Path, sent: list[tuple[str, str, str]]) -> None:
    assert status("--alert") == 0
    assert sent == []
    assert not (folder / "runs" / "new" / news.MEMORY).exists()


def test_one_message_when_unhealthy_and_one_when_healthy_again(
    folder: Path, sent: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    remove_heartbeat(folder)
    for _ in range(3):
        assert status("--alert") == 1
    (message,) = sent
    title = "new: dead: the run has no process; resume with ./launch.sh resume new"
    assert message[:2] == ("crash", title)
    assert message[2] in capsys.readouterr().out
    add_heartbeat(folder)
    for _ in range(3):
        assert status("--alert") == 0
    assert [each[:2] for each in sent[1:]] == [("launch", "new: running, healthy again")]
    remove_heartbeat(folder)
    status("--alert")
    assert len(sent) == 3


def test_each_kind_of_problem_has_its_own_message(folder: Path, sent: list[tuple[str, str, str]]) -> None:
    journal = Journal(folder / "runs" / "new")
    journal.write("save_failed", "no", 40)
    status("--alert")
    journal.write("drift", "the ranks' weights have drifted apart", 40)
    for _ in range(2):
        status("--alert")
    assert [kind for kind, _, _ in sent] == ["save_failed", "drift"]
    journal.write("save", "saved", 41)  # both problems are over
    journal.write("save_failed", "no", 41)
    status("--alert")
    journal.write("save", "saved", 42)
    status("--alert")
    assert [kind for kind, _, _ in sent] == ["save_failed", "drift", "launch"]


@pytest.mark.parametrize(("kind", "expected"), [("done", "done"), ("stop", "stop")])
def test_message_of_a_finished_or_stopped_run_has_its_kind(
    folder: Path, sent: list[tuple[str, str, str]], kind: Any, expected: str
) -> None:
    remove_heartbeat(folder)
    status("--alert")
    Journal(folder / "runs" / "new").write(kind, "as it was", 40)
    status("--alert")
    assert [each[0] for each in sent] == ["crash", expected]


def test_failed_message_is_retried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(alerts.Alerts, "send", lambda self, *message: bool(tried.append(message)))
    remove_heartbeat(folder)
    for _ in range(2):
        status("--alert")
    assert len(tried) == 2


@pytest.mark.parametrize("memory", ["", "{}", "[]", '{"problems": 3}', "\x00"])
def test_damaged_memory_file_is_ignored(folder: Path, sent: list[tuple[str, str, str]], memory: str) -> None:
    (folder / "runs" / "new" / news.MEMORY).write_text(memory)
    assert status("--alert") == 0
    remove_heartbeat(folder)
    assert status("--alert") == 1
    assert len(sent) == 1


# --- start time


def test_status_does_not_import_large_packages(folder: Path) -> None:
    code = (
        "import sys; from ds_gpt2 import cli; code = cli.main(sys.argv[1:]);"
        "print(code, {'torch', 'deepspeed', 'numpy', 'plotly', 'tensorboard', 'fsspec', 'tqdm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "status", str(folder / "runs" / "new")]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 set()"


def test_launch_sh_runs_status_from_any_directory(folder: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "DS_GPT2_PYTHON": sys.executable}  # cron's
    command = f"{shlex.quote(str(PROJECT / 'launch.sh'))} status {shlex.quote(str(folder / 'runs' / 'old'))}"
    result = subprocess.run(["sh", "-c", command], cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("old: dead ")
