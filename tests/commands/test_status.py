"""``status``: what a person, a phone, cron and a program get."""

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

from ds_gpt2 import cli
from ds_gpt2.commands import status_news
from ds_gpt2.config import lookup, run_location
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.heartbeat import Heartbeat
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.supervision.alerts import alerts

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
    for module in (run_location, lookup):
        monkeypatch.setattr(module, "PROJECT_DIR", tmp_path)
    for name, age in (("old", 100), ("new", 0)):
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        config = CONFIG.replace("FOLDER", str(tmp_path)).replace("NAME", name)
        (run_dir / "config.yaml").write_text(config)
        os.utime(run_dir / "config.yaml", (time.time() - age,) * 2)
        now = time.time()
        records = [{"step": step, "time": now - 40 + step, "train/loss": 3.0} for step in range(1, 41)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        Journal(run_dir).write("start", "started", 0)
    Heartbeat(tmp_path / "runs" / "new", 0).begin_step(41, 41)
    return tmp_path


def die(folder: Path) -> None:
    (folder / "runs" / "new" / "heartbeat" / "rank_00000").unlink()


def live(folder: Path) -> None:
    Heartbeat(folder / "runs" / "new", 0).begin_step(41, 41)


def status(*words: str) -> int:
    return cli.main(["status", *words])


def test_the_newest_run_is_shown_and_the_exit_code_says_whether_it_is_well(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status() == exit_report.DONE
    said = capsys.readouterr().out
    assert said.startswith("new: running ")
    assert "\033" not in said
    die(folder)
    assert status() == exit_report.CRASHED == 1
    said = capsys.readouterr().out
    assert said.startswith("new: dead ")
    assert "! no process of it is left" in said


@pytest.mark.parametrize("words", [["old"], ["{folder}/runs/old"], ["{folder}/checkpoints/old"]])
def test_a_run_can_be_named(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*(word.format(folder=folder) for word in words)) == 1
    assert capsys.readouterr().out.startswith("old: dead ")


def test_several_runs_have_a_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["old", "new", "old"], ["--all"]):
        assert status(*words) == 1
        assert capsys.readouterr().out == (
            "! old          dead        40%  3.000      1m\n  new          running     40%  3.000      1m\n"
        )
    assert status("new", "new") == 0
    assert capsys.readouterr().out.startswith("new: running ")


def test_all_of_one_run_is_a_line_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "runs" / "old")
    assert status("--all") == 0
    assert capsys.readouterr().out.startswith("  new          running ")


def test_a_run_that_cannot_be_read_hides_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_program_gets_every_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["healthy"], found["problems"]) == ("new", "running", True, [])
    assert found["progress"]["left_seconds"] == pytest.approx(60)
    assert found["finish_time"] == pytest.approx(time.time() + 60, abs=30)
    assert status("--json", "--all") == 1
    assert [each["run"] for each in json.loads(capsys.readouterr().out)] == ["old", "new"]
    assert status("old", "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem == {"kind": "crash", "text": "no process of it is left; go on with ./launch.sh resume old"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "no run gone: known in .*runs are old, new"),
        (["old", "--all"], "--all shows every run: leave out old, or --all"),
    ],
)
def test_no_such_run_is_another_exit_code(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*words) == exit_report.MISTAKE == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_a_run_that_cannot_be_read_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs" / "old" / "metrics.jsonl").unlink()
    (folder / "runs" / "old" / "metrics.jsonl").mkdir()
    assert status("old") == exit_report.MISTAKE
    assert "old/metrics.jsonl cannot be read: Is a directory" in capsys.readouterr().err


def test_no_runs_at_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").rename(folder / "elsewhere")
    for words in ([], ["--all"]):
        assert status(*words) == exit_report.MISTAKE
        assert "start one with `./launch.sh quickstart`" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--watch", "old"], ["--watch", "0"], ["--watch", "inf"]])
def test_seconds_are_a_number(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*words) == exit_report.MISTAKE
    assert "is no number of seconds up to 86,400; a RUN stands before --watch" in capsys.readouterr().err


def test_watching_draws_again_until_ctrl_c(folder: Path) -> None:
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


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_on_a_terminal_it_is_redrawn_and_coloured(folder: Path, no_color: str, coloured: bool) -> None:
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
    assert (b"new: \033[32mrunning\033[0m" in seen) is coloured
    assert (b"new: running" in seen) is not coloured


def _drain(terminal: int) -> None:
    try:
        os.read(terminal, 4096)
    except OSError:  # the other side is closed
        time.sleep(0.01)


# --- messages


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was handed over to be sent."""
    messages: list[tuple[str, str, str]] = []

    def send(self: Any, kind: str, title: str, text: str) -> bool:
        messages.append((kind, title, text))
        return True

    monkeypatch.setattr(alerts.Alerts, "send", send)
    return messages


def test_a_run_that_is_well_sends_nothing(folder: Path, sent: list[tuple[str, str, str]]) -> None:
    assert status("--alert") == 0
    assert sent == []
    assert not (folder / "runs" / "new" / status_news.MEMORY).exists()


def test_one_message_when_it_gets_ill_and_one_when_it_is_well_again(
    folder: Path, sent: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    die(folder)
    for _ in range(3):
        assert status("--alert") == 1
    (message,) = sent
    title = "new: dead: no process of it is left; go on with ./launch.sh resume new"
    assert message[:2] == ("crash", title)
    assert message[2] in capsys.readouterr().out
    live(folder)
    for _ in range(3):
        assert status("--alert") == 0
    assert [each[:2] for each in sent[1:]] == [("launch", "new: running, all is well again")]
    die(folder)
    status("--alert")
    assert len(sent) == 3


def test_another_problem_is_another_message(folder: Path, sent: list[tuple[str, str, str]]) -> None:
    journal = Journal(folder / "runs" / "new")
    journal.write("save_failed", "no", 40)
    status("--alert")
    journal.write("drift", "the ranks' weights have drifted apart", 40)
    for _ in range(2):
        status("--alert")
    assert [kind for kind, _, _ in sent] == ["save_failed", "drift"]
    journal.write("save", "saved", 41)  # both are over
    journal.write("save_failed", "no", 41)
    status("--alert")
    journal.write("save", "saved", 42)
    status("--alert")
    assert [kind for kind, _, _ in sent] == ["save_failed", "drift", "launch"]


@pytest.mark.parametrize(("kind", "told"), [("done", "done"), ("stop", "stop")])
def test_good_news_are_of_the_kind_that_they_are(
    folder: Path, sent: list[tuple[str, str, str]], kind: Any, told: str
) -> None:
    die(folder)
    status("--alert")
    Journal(folder / "runs" / "new").write(kind, "as it was", 40)
    status("--alert")
    assert [each[0] for each in sent] == ["crash", told]


def test_what_could_not_be_sent_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(alerts.Alerts, "send", lambda self, *message: bool(tried.append(message)))
    die(folder)
    for _ in range(2):
        status("--alert")
    assert len(tried) == 2


@pytest.mark.parametrize("memory", ["", "{}", "[]", '{"problems": 3}', "\x00"])
def test_a_damaged_memory_is_none(folder: Path, sent: list[tuple[str, str, str]], memory: str) -> None:
    (folder / "runs" / "new" / status_news.MEMORY).write_text(memory)
    assert status("--alert") == 0
    die(folder)
    assert status("--alert") == 1
    assert len(sent) == 1


# --- quickly


def test_the_verb_loads_no_more_than_it_needs(folder: Path) -> None:
    code = (
        "import sys; from ds_gpt2 import cli; code = cli.main(sys.argv[1:]);"
        "print(code, {'torch', 'deepspeed', 'numpy', 'plotly', 'tensorboard', 'fsspec', 'tqdm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "status", str(folder / "runs" / "new")]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 set()"


def test_launch_sh_shows_it_from_anywhere(folder: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "DS_GPT2_PYTHON": sys.executable}  # cron's
    command = f"{shlex.quote(str(PROJECT / 'launch.sh'))} status {shlex.quote(str(folder / 'runs' / 'old'))}"
    result = subprocess.run(["sh", "-c", command], cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("old: dead ")
