"""Other terminal encodings, closed descriptors and full disks do not end a program."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import PROJECT, end_session

from ds_gpt2.common import terminal
from ds_gpt2.common.terminal import Unfailing, printable

COMMAND = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py")]
ENCODINGS = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cron": {"LC_ALL": "C"},
}


def shell(
    redirected: str, *words: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run ``COMMAND WORDS`` in a shell, with redirections such as ``>&-``."""
    command = f"{shlex.join([*COMMAND, *words])} {redirected}"
    return subprocess.run(["bash", "-c", command], env={**os.environ, **(environment or {})}, capture_output=True)


@pytest.fixture(scope="module")
def trained_run(write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose supervisor has an ASCII terminal, resumed with closed standard output."""
    folder = tmp_path_factory.mktemp("terminals") / "naïve…"
    config = write_config(
        folder,
        batch={"tokens_per_step": 64, "micro_batch": 2, "sequence_length": 32},
        validation={"every": 6, "tokens": 64},
        samples={"every": 6, "prompts": ["naïve … 日本"], "tokens": 8},
    )
    for words, redirected in (
        (["train", str(config)], ">'{0}/out' 2>&1"),
        (["resume", str(folder / "runs" / "test"), "schedule.steps=14"], "<&- >&- 2>&-"),
        (["resume", str(folder / "runs" / "test"), "schedule.steps=16"], ">/dev/full 2>&1"),
    ):
        command = f"{shlex.join([*COMMAND, *words, '--num_gpus', '1'])} {redirected.format(folder)}"
        environment = {**os.environ, **ENCODINGS["ASCII"], "DS_ACCELERATOR": "cpu"}
        started = subprocess.Popen(["bash", "-c", command], env=environment, start_new_session=True)
        assert started.wait(timeout=900) == 0, (folder / "out").read_text(errors="replace")
        assert end_session(started.pid) == []
    return folder / "runs" / "test"


@pytest.mark.ranks
def test_a_run_ends_successfully_if_its_output_fails(trained_run: Path) -> None:
    steps = [json.loads(line)["step"] for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
    shown = (trained_run.parents[1] / "out").read_bytes()
    assert shown.isascii() and rb"na\xefve" in shown
    assert "naïve" in (trained_run / "train.log").read_text(encoding="utf-8")


def test_no_file_of_the_run_gets_a_closed_standard_descriptor(trained_run: Path) -> None:
    for name in ("metrics.jsonl", "journal.jsonl", "starts.jsonl"):
        for line in (trained_run / name).read_text(encoding="utf-8").splitlines():
            json.loads(line)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "words", [["notes", "RUN", "naïve … 日本"], ["notes", "RUN"], ["list", "RUN"], ["status", "RUN"], ["report", "RUN"]]
)
def test_commands_print_on_any_terminal(trained_run: Path, words: list[str], encoding: str, tmp_path: Path) -> None:
    words = [str(trained_run) if word == "RUN" else word for word in words]
    extra = ["--out", str(tmp_path / "report.html")] if words[0] == "report" else []
    done = shell("", *words, *extra, environment=ENCODINGS[encoding])
    assert done.returncode in (0, 1), done.stderr  # 1: status says that the run needs attention
    assert b"Traceback" not in done.stderr
    assert done.stdout


@pytest.mark.parametrize("redirected", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_is_not_an_error(trained_run: Path, redirected: str) -> None:
    done = shell(redirected, "list", str(trained_run))
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_on_a_full_disk_is_one_line(trained_run: Path) -> None:
    done = shell(">/dev/full", "list", str(trained_run))
    assert done.returncode == 1
    assert done.stderr == b"error: the output cannot be written: No space left on device\n"


def test_undecodable_bytes_in_a_note_are_replaced(trained_run: Path) -> None:
    words = [*map(os.fsencode, COMMAND), b"notes", os.fsencode(trained_run), b"caf\xe9 \xff"]
    assert subprocess.run(words, capture_output=True).returncode == 0
    piped = subprocess.run([*words[:-1], b"-"], input=b"\xfe piped", capture_output=True)
    assert piped.returncode == 0, piped.stderr
    noted = (trained_run / "NOTES.md").read_text(encoding="utf-8")
    assert "caf\ufffd \ufffd" in noted and "\ufffd piped" in noted


def test_a_name_with_undecodable_bytes_is_one_line() -> None:
    completed = subprocess.run([*map(os.fsencode, COMMAND), b"list", b"caf\xe9"], capture_output=True)
    assert completed.returncode == 2
    assert completed.stderr.startswith(b"error: no run caf") and completed.stderr.count(b"\n") == 1


def test_a_path_that_the_locale_does_not_support_is_one_line(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, run={"dir": str(tmp_path / "naïve")})
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "DS_ACCELERATOR": "cpu"}
    done = shell("", "train", str(config), environment=ascii_only)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1 and b"set PYTHONUTF8=1" in done.stderr


def test_writes_to_a_failing_stream_are_ignored() -> None:
    closed = io.StringIO()
    stream = Unfailing(closed)
    stream.write("text")
    assert closed.getvalue() == "text"
    closed.close()
    stream.write("lost")
    stream.flush()


def test_text_from_the_command_line_can_be_written_as_utf_8() -> None:
    assert printable("naïve") == "naïve"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\ufffd"


def test_only_control_characters_are_escaped_for_a_terminal() -> None:
    shown = "10\u00a0km, \u65e5\u672c\u8a9e\u3000x, \U0001f469\u200d\U0001f680, soft\u00adhyphen\n\ttab"
    assert terminal.printable_lines(shown) == shown
    assert terminal.printable_lines("a\r\nb\x1b[2J\u202eevil\x9b") == "a\nb\\x1b[2J\\u202eevil\\x9b"
