"""Forks of one run, trained on real ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import Launched, end_session, run, start
from small_run import MODEL

from ds_gpt2 import cli
from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.catalog import open_generation
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import Manifest, read
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.config.run_location import CONFIG
from ds_gpt2.run_dir.journal import read_journal
from ds_gpt2.run_dir.metrics import METRICS, read_metrics

pytestmark = pytest.mark.ranks

STEPS, FORKED = 16, 8


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "ds_gpt2", "train", str(config), "--num_gpus", "2", *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Path:
    """The folder of the run ``base``: warm-up, stable learning rate and decay, with dropout, on two ranks."""
    folder = tmp_path_factory.mktemp("forks")
    config = write_config(
        folder,
        model=MODEL,
        schedule={"steps": STEPS, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 0, "shape": "wsd", "decay_steps": 4},
        checkpoint={"dir": str(folder / "checkpoints"), "every": 4, "keep_last": 9},
        samples={"every": 0},
    )
    done = run(command(config, "run.name=base"))
    assert done.code == 0, done.output
    return folder


def fork(folder: Path, tag: str, *words: str) -> Launched:
    done = run(command(folder / "runs" / "base" / CONFIG, "--fork", f"{folder / 'runs' / 'base'}:{tag}", *words))
    assert done.code == 0, done.output
    return done


def metrics(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """Return the metrics of a run by step, without times and the marks of the best loss."""
    ignored = ("perf/", "time", "marks/")
    return {
        record["step"]: {tag: value for tag, value in record.items() if not tag.startswith(ignored)}
        for record in read_metrics(folder / "runs" / name / METRICS)
    }


def manifest(folder: Path, name: str, step: int) -> Manifest:
    found = open_generation(folder / "checkpoints" / name / rolling_tag(step)).manifest
    assert found is not None
    return found


def test_an_unchanged_fork_continues_bit_for_bit_like_its_parent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its history is its own: the best loss of the parent, of step 6, is not the fork's."""
    done = fork(folder, str(FORKED), "run.name=same")
    assert f"run same: forked from base at step {FORKED} (rolling_step_000008)" in done.output
    assert "other than in base" not in done.output and "cannot be used" not in done.output
    base, same = metrics(folder, "base"), metrics(folder, "same")
    assert sorted(same) == list(range(FORKED + 1, STEPS + 1))
    assert same == {step: base[step] for step in same}
    ends = [manifest(folder, name, STEPS) for name in ("base", "same")]
    assert ends[0].state["weights"] == ends[1].state["weights"] and ends[0].state["ledger"] == ends[1].state["ledger"]
    assert manifest(folder, "base", FORKED).state["best_step"] == 6
    bests = [event.step for event in read_journal(folder / "runs" / "same") if event.kind == "best"]
    assert bests and bests[0] == 12
    first = next(event for event in read_journal(folder / "runs" / "same") if event.kind == "start")
    assert first.step == FORKED and first.text.startswith("forked from base at step 8 (rolling_step_000008), ")

    run_dirs = [str(folder / "runs" / name) for name in ("base", "same")]
    for words in (["list", run_dirs[1]], ["status", run_dirs[1]], ["diff", *run_dirs]):
        capsys.readouterr()
        assert cli.main(words) == 0
        assert "forked from base at step 8" in capsys.readouterr().out
    assert cli.main(["report", run_dirs[1], "--json"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert figures["forked_from"]["run"] == "base" and (figures["step"], figures["resumes"]) == (STEPS, 0)
    assert figures["tokens"] == base[STEPS]["train/tokens"] and figures["lost_seconds"] == 0
    assert cli.main(["report", run_dirs[1]]) == 0
    page = (folder / "runs" / "same" / "report.html").read_text(encoding="utf-8")
    assert "<tr><th>forked from</th><td>base at step 8</td></tr>" in page


def test_a_fork_may_decay_the_learning_rate_earlier(folder: Path) -> None:
    done = fork(folder, str(FORKED), "run.name=short", "schedule.steps=12")
    assert f"other than in base: schedule.steps {STEPS} -> 12" in done.output
    assert "learning rate: 0.003 at step 8; now " in done.output and "run.name base" not in done.output
    base, short = metrics(folder, "base"), metrics(folder, "short")
    assert sorted(short) == [9, 10, 11, 12]
    decay = [base[step]["train/lr"] for step in range(13, 17)]
    assert [short[step]["train/lr"] for step in short] == decay and decay[0] > decay[-1]
    assert short[9]["train/loss"] == base[9]["train/loss"]  # before the first update at another rate
    assert short[12]["train/loss"] != base[12]["train/loss"] and short[12]["val/loss"] != base[12]["val/loss"]


def test_a_fork_that_is_killed_before_its_start_is_completed_although_its_parent_is_deleted(
    folder: Path, tmp_path: Path
) -> None:
    for part in ("runs", "checkpoints"):
        shutil.copytree(folder / part / "base", tmp_path / part / "base")
    config = tmp_path / "run.yaml"
    config.write_text((folder / "run.yaml").read_text().replace(str(folder), str(tmp_path)))
    forking = command(config, "--auto", "--fork", f"{tmp_path / 'runs' / 'base'}:{FORKED}", "run.name=killed")
    process = start(forking)
    try:
        latest = tmp_path / "checkpoints" / "killed" / "latest"
        deadline = time.monotonic() + 60
        while not latest.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end_session(process.pid)
        assert process.stdout is not None
        process.stdout.close()
    assert not (tmp_path / "runs" / "killed" / METRICS).exists()
    for part in ("runs", "checkpoints"):
        shutil.rmtree(tmp_path / part / "base")
    done = run(forking)
    assert done.code == 0, done.output
    base, killed = metrics(folder, "base"), metrics(tmp_path, "killed")
    assert killed == {step: base[step] for step in range(FORKED + 1, STEPS + 1)}


def test_a_fork_of_a_checkpoint_that_is_still_evaluated_repeats_the_evaluation(folder: Path) -> None:
    """It records the step of the checkpoint itself, as its parent does."""
    path, base = folder / "checkpoints" / "base" / rolling_tag(STEPS - 4), metrics(folder, "base")
    complete = read(path)
    begun = {name: value for name, value in base[STEPS - 4].items() if name.startswith("train/")}
    before = {"unevaluated": begun, "val_loss": base[6]["val/loss"], "val_step": 6, "best_step": 6}
    unevaluated = complete.model_copy(
        update={"state": {**complete.state, **before, "best_val_loss": base[6]["val/loss"]}, "roles": []}
    )
    commit.replace_manifest(Disk(), path, unevaluated)
    try:
        done = fork(folder, str(STEPS - 4), "run.name=evaluated")
    finally:
        commit.replace_manifest(Disk(), path, complete)
    assert "cannot be used" not in done.output
    found = metrics(folder, "evaluated")
    assert sorted(found) == list(range(STEPS - 4, STEPS + 1))
    assert found[STEPS - 4]["val/loss"] == base[STEPS - 4]["val/loss"]
    assert all(found[step] == base[step] for step in range(STEPS - 3, STEPS + 1))
    assert cli.main(["status", str(folder / "runs" / "evaluated")]) == 0
    assert cli.main(["verify", str(folder / "runs" / "evaluated"), "--all"]) == 0
