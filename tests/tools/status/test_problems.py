"""Problems that ``status`` reports."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import namedtuple

import pytest
from run_files import CONFIG, DAY, NOW, RunFiles

from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.common.formatting import clock
from ds_gpt2.tools.status.screen import line, screen


def test_failed_save_is_a_problem_until_a_save_succeeds(healthy_run: RunFiles) -> None:
    healthy_run.journal("save_failed", 60, 1000)
    assert healthy_run.problems() == ["step 1,000 could not be saved"]
    healthy_run.journal("save", 30, 1000)
    assert healthy_run.status().healthy


def test_failed_backup_is_a_problem_until_a_backup_succeeds(healthy_run: RunFiles) -> None:
    healthy_run.journal("backup_failed", 3600, text="could not copy rolling_step_000950: no such bucket")
    assert healthy_run.status().healthy, "backups are not configured"
    backup = "backup: {to: 's3://nobucket/x'}, dir:"
    healthy_run.configure(CONFIG.replace("dir: FOLDER/checkpoints", f"{backup} FOLDER/checkpoints"))
    since = clock(NOW - 3600)
    assert healthy_run.problems() == [f"no backups since {since}: could not copy rolling_step_000950: no such bucket"]
    assert [problem.kind for problem in healthy_run.status().problems] == ["backup_failed"]
    healthy_run.journal("backup_ok", 60, 1000)
    assert healthy_run.status().healthy


def test_finished_run_without_a_backup_of_its_last_checkpoint_is_unhealthy(files: RunFiles) -> None:
    files.configure(CONFIG.replace("dir: FOLDER/checkpoints", "backup: {to: /nas}, dir: FOLDER/checkpoints"))
    files.train(10)
    files.journal("start", 100, 0)
    files.journal("backup_failed", 20, 10, "rolling_step_000010 could not be backed up before the end of the run")
    files.journal("done", 10, 10)
    status = files.status()
    assert (status.state, status.healthy) == ("finished", False)
    assert "could not be backed up before the end of the run" in status.problems[0].text


def test_undelivered_message_is_a_problem_until_a_message_is_delivered(healthy_run: RunFiles) -> None:
    healthy_run.journal("alert", 60, text="the command failed for 'test: crash' (exit status 1)")
    (problem,) = healthy_run.status().problems
    assert problem.kind == "alert"
    assert problem.text.startswith(f"messages have not been delivered since {clock(NOW - 60)}: the command failed")
    event = {"time": NOW - 30, "kind": "alert", "step": None, "text": "delivered", "facts": {"by": ["the command"]}}
    with (healthy_run.run_dir / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(event) + "\n")
    assert healthy_run.status().healthy


@pytest.mark.parametrize("kind", ["done", "stop"])
def test_ended_run_with_undelivered_messages_is_unhealthy(files: RunFiles, kind: str) -> None:
    files.train(10)
    files.journal("start", 100, 0)
    files.journal(kind, 20, 10)
    text = "2 messages were not delivered: the command failed with exit status 7"
    for channel in (text, "1 message was not delivered: address 1 failed (no connection)"):
        files.journal("alert", 10, text=channel, facts={"undelivered": 2})
    assert not files.status().healthy
    assert files.problems() == [f"{text}; 1 message was not delivered: address 1 failed (no connection)"]
    files.journal("alert", 5, text="delivered test: finished", facts={"by": ["the command"]})
    assert files.status().healthy


@pytest.mark.parametrize("content", [None, b"", b"\0\xff" * 100])
def test_missing_metrics_of_a_saved_run_are_a_problem(files: RunFiles, content: bytes | None) -> None:
    files.save(35)
    files.journal("start", 100, 0)
    files.journal("save", 60, 35)
    files.journal("stop", 50, 35)
    file = files.run_dir / "metrics.jsonl"
    if content is not None:
        file.write_bytes(content)
    what = "is missing" if content is None else "has no readable record"
    text = f"{file} {what}: the losses up to step 35 are unknown; restore it from a copy of the run"
    assert files.problems() == [text]
    assert files.status().progress.step == 35
    files.train(35)
    assert files.problems() == []


def test_missing_checkpoints_are_a_problem(healthy_run: RunFiles) -> None:
    """The limit is three times checkpoint.every, in steps."""
    healthy_run.train(1250)
    healthy_run.beat(step=1251)
    assert healthy_run.status().healthy
    healthy_run.train(1251)
    healthy_run.beat(step=1252)
    assert healthy_run.problems() == ["no checkpoint for 301 steps, although one is due every 100"]
    healthy_run.configure(CONFIG.replace("every: 100", "every: 0"))
    assert healthy_run.status().healthy


def test_damaged_newest_checkpoint_is_a_problem(healthy_run: RunFiles) -> None:
    newest = scan(healthy_run.folder / "checkpoints" / "test")[0].path
    (newest / "model.pt").write_bytes(bytes(999))
    assert healthy_run.problems() == ["rolling_step_000950 is damaged: model.pt has 999 bytes, 1000 were written"]
    (newest / "manifest.json").write_text("{}")
    assert "rolling_step_000950 is damaged: manifest.json is damaged" in healthy_run.problems()[0]
    assert "sizes match" not in screen(healthy_run.status())


def test_file_in_the_place_of_a_checkpoint_is_a_problem(healthy_run: RunFiles) -> None:
    directory = healthy_run.folder / "checkpoints" / "test"
    (directory / "rolling_step_000010").write_text("")
    problem = "is a file, not the directory of a checkpoint: delete it, or restore the directory from a copy"
    assert healthy_run.problems() == [f"{directory}/rolling_step_000010 {problem}"]
    (directory / "best_model").write_text("")
    (directory / "epoch_00001").write_text("")
    assert healthy_run.problems() == [f"{directory}/best_model {problem} (2 more like it)"]
    assert not healthy_run.status().healthy


@pytest.mark.parametrize("kind", ["divergence", "skipped_run", "frozen", "drift", "stuck_data", "rollback"])
def test_incident_is_a_problem_until_a_later_step_is_saved(healthy_run: RunFiles, kind: str) -> None:
    healthy_run.journal("save", 200, 1000)  # before the rollback
    healthy_run.journal(kind, 100, 990, "incident")
    assert healthy_run.problems() == ["incident; no later step has been saved"]
    healthy_run.journal("save", 90, 990)  # not a later step
    assert not healthy_run.status().healthy
    assert healthy_run.status(later=DAY).state == "hung?"
    healthy_run.beat()
    healthy_run.journal("save", 80, 1000)
    assert healthy_run.status().healthy


def test_old_incident_is_not_a_problem(healthy_run: RunFiles) -> None:
    healthy_run.journal("divergence", DAY + 60, 990)
    assert healthy_run.status().healthy


@pytest.mark.parametrize("kind", ["spike", "not_finite", "crash"])
def test_short_incident_is_counted_but_is_not_a_problem(healthy_run: RunFiles, kind: str) -> None:
    healthy_run.journal(kind, 100, 990)
    status = healthy_run.status()
    assert status.healthy
    assert status.history.incidents_24h == {kind: 1}


Filesystem = namedtuple("Filesystem", "f_flag f_blocks f_bavail f_files f_favail f_bfree f_frsize", defaults=[9, 9])


@pytest.mark.parametrize(
    ("disk", "problem"),
    [
        (Filesystem(os.ST_RDONLY, 9, 9, 9, 9), "is read-only"),
        (Filesystem(0, 9, 0, 9, 9), "is full"),
        (Filesystem(0, 9, 9, 9, 0), "has no free inodes"),
        (Filesystem(0, 9, 9, 0, 0), None),  # btrfs counts no inodes
        (Filesystem(0, 0, 0, 0, 0), None),  # a file system without block and inode counts
    ],
)
def test_unwritable_disk_is_a_problem(
    healthy_run: RunFiles, monkeypatch: pytest.MonkeyPatch, disk: Filesystem, problem: str | None
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    found = [
        text for text in healthy_run.problems() if " lasts " not in text
    ]  # the disk of this machine may be nearly full
    assert found == ([f"the disk of {healthy_run.run_dir} {problem}"] if problem else [])


def test_running_without_new_records_is_a_problem(healthy_run: RunFiles) -> None:
    healthy_run.configure(CONFIG + "supervisor: {hang_seconds: 10000}\n")
    healthy_run.beat(step=1050)
    assert healthy_run.problems(later=200) == []
    assert "nothing has been logged for 6m 40s: the ranks are at step 1,050, metrics.jsonl ends at step 1,000" in (
        healthy_run.problems(later=400)
    )
    healthy_run.beat("evaluating", step=1050)
    assert not any("logged" in problem for problem in healthy_run.problems(later=400))
    healthy_run.beat(step=1002)  # the last record may be written one step later
    assert not any("logged" in problem for problem in healthy_run.problems(later=400))


def test_finished_run_with_a_damaged_or_missing_last_checkpoint_is_unhealthy(healthy_run: RunFiles) -> None:
    last = healthy_run.save(2000)
    healthy_run.journal("save", 10, 2000)
    healthy_run.journal("done", 5, 2000)
    (healthy_run.run_dir / "heartbeat" / "rank_00000").unlink()
    assert (healthy_run.status().state, healthy_run.problems()) == ("finished", [])
    (last / "model.pt").write_bytes(b"short")
    assert healthy_run.problems() == ["rolling_step_002000 is damaged: model.pt has 5 bytes, 1000 were written"]
    shutil.rmtree(last)
    (problem,) = healthy_run.problems()
    assert problem.startswith("the last checkpoint, of step 2,000, is not in ")


def test_finished_run_without_checkpoints_is_unhealthy(files: RunFiles) -> None:
    files.train(1000)
    files.journal("save", 60, 1000)
    files.journal("done", 50, 1000)
    assert files.problems() == [f"no checkpoints in {files.folder}/checkpoints/test, although some were saved"]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])  # None: as the monitor writes it
def test_newest_loss_that_is_not_finite_is_a_problem_while_running_and_finished(
    files: RunFiles, bad: float | None
) -> None:
    files.train(1, **{"val/loss": 10.9})
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        for step in range(2, 7):
            records.write(json.dumps({"step": step, "time": NOW, "train/loss": bad, "val/loss": bad}) + "\n")
    files.journal("start", 100, 0)
    problems = [
        "the newest training loss is NaN or infinite (step 6)",
        "the newest validation loss is NaN or infinite (step 6)",
    ]
    files.beat(step=7)
    assert files.problems() == problems
    (files.run_dir / "heartbeat" / "rank_00000").unlink()
    files.journal("done", 10, 6)
    status = files.status()
    assert (status.state, status.healthy) == ("finished", False)
    assert [problem.text for problem in status.problems] == problems
    assert "loss        not finite at step 6\n  finite    9.9990 (median of last 50 steps)" in screen(status)
    assert line(status).split() == ["!", "test", "finished", "0%", "NaN"]
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        records.write(json.dumps({"step": 7, "time": NOW, "train/loss": 3.0, "val/loss": 3.0}) + "\n")
    assert files.status().healthy


def test_a_lost_host_is_a_problem_until_it_is_back(healthy_run: RunFiles) -> None:
    healthy_run.journal("launch", 300, facts={"restart": False, "hosts": {"node1": 2, "node2": 2}})
    assert healthy_run.status().healthy
    healthy_run.journal("host_lost", 200, 900, facts={"host": "node2", "reason": "it has not answered for 10 s"})
    healthy_run.journal("launch", 100, facts={"restart": True, "hosts": {"node1": 2}})
    healthy_run.journal("start", 90, 900)
    (problem,) = healthy_run.status().problems
    text = f"host node2 is away since {clock(NOW - 200)}: it has not answered for 10 s"
    assert (problem.kind, problem.text) == ("host_lost", text)
    healthy_run.journal("host_back", 50, facts={"host": "node2"})
    assert healthy_run.status().healthy


def test_waiting_for_hosts_is_a_problem_until_the_ranks_start(healthy_run: RunFiles) -> None:
    (healthy_run.run_dir / "heartbeat" / "rank_00000").unlink()
    healthy_run.journal("launch", 300, facts={"restart": False, "hosts": {"node1": 2, "node2": 2}})
    healthy_run.journal("host_lost", 200, 900, facts={"host": "node2", "reason": "it has not answered for 10 s"})
    healthy_run.journal("crash", 200, 900)
    text = "1 host of 2 answer, cluster.min_nodes is 2: waiting for more (node2: no answer)"
    healthy_run.journal("few_hosts", 150, text=text, facts={"away": {"node2": "no answer"}})
    healthy_run.supervise("waiting", next_start=NOW + 30)
    status = healthy_run.status()
    assert (status.state, [(problem.kind, problem.text) for problem in status.problems]) == (
        "waiting",
        [("few_hosts", text)],
    )
    assert "next try    in 30s" in screen(status)
    healthy_run.journal("host_back", 50, facts={"host": "node2"})
    healthy_run.journal("launch", 40, facts={"restart": True, "hosts": {"node1": 2, "node2": 2}})
    assert healthy_run.status().healthy
