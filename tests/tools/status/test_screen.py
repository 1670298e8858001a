"""Text output of ``status``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_files import CONFIG, NOW, RunFiles, set_free_bytes

from ds_gpt2.common.formatting import clock
from ds_gpt2.tools.resources.run_hosts import RunHost
from ds_gpt2.tools.status.screen import WIDTH, line, screen


def test_two_disks_have_one_line_each(healthy_run: RunFiles) -> None:
    status = healthy_run.status()
    (disk,) = status.disks
    assert {Path(name).parent.name for name in disk.directories} == {"runs", "checkpoints"}
    other = replace(disk, directories=disk.directories[1:], days_left=3.25)
    lines = screen(replace(status, disks=[disk, other])).splitlines()
    assert lines[-2].startswith("runs        enough to the end, ")
    assert lines[-1].startswith("checkpoints 3.2 days left, ")


def test_percentage_is_100_only_after_the_last_step(healthy_run: RunFiles) -> None:
    healthy_run.train(1999)
    assert "step        1,999 of 2,000, 99.9%" in screen(healthy_run.status())
    assert " 99% " in line(healthy_run.status())
    healthy_run.train(2000)
    assert "step        2,000 of 2,000, 100.0%" in screen(healthy_run.status())


def test_reference_loss_is_shown_for_a_comparable_run(files: RunFiles) -> None:
    files.configure(CONFIG.replace("7M", "124M"))
    files.train(4000)
    with (files.run_dir / "metrics.jsonl").open("a") as records:
        records.write(json.dumps({"step": 4001, "time": NOW, "val/loss": 3.7}) + "\n")
    text = screen(files.status())
    assert "validation  3.7000 at step 4,001" in text
    assert "llm.c       3.6179 at that step: +0.0821" in text


def test_gpus_are_shown_if_recorded(healthy_run: RunFiles) -> None:
    assert healthy_run.status().gpus is None
    healthy_run.train(1000, **{"perf/gpu_temperature_c": 71.0, "perf/gpu_throttled": 2.0})
    assert "GPU         71 °C, 2 throttled" in screen(healthy_run.status())


def test_screen_has_at_most_46_columns(healthy_run: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gpt2-124m-fineweb-edu-five-epochs-second-attempt"
    healthy_run.run_dir = healthy_run.run_dir.rename(healthy_run.run_dir.with_name(name))
    healthy_run.configure(CONFIG.replace("7M", "124M").replace("2000", "100000"))
    gpus = {"perf/gpu_temperature_c": 71.0, "perf/gpu_throttled": 2.0, "perf/tokens_per_s": 1_178_123.0}
    healthy_run.train(12_000, 123.4, **gpus, **{"val/loss": 3.4})
    shutil.move(healthy_run.folder / "checkpoints" / "test", healthy_run.folder / "checkpoints" / name)
    for kind in ("spike", "divergence", "skipped_run", "not_finite", "hang"):
        healthy_run.journal(kind, 100, 990, "loss 5.1234 is 93 deviations above the recent 3.1234, the 20th in a row")
    healthy_run.journal("save_failed", 90, 12_000)
    healthy_run.journal("start", 80, 11_000)
    healthy_run.beat("evaluating", 12_000)
    set_free_bytes(10_000, monkeypatch)
    status = healthy_run.status(later=9000)
    assert len(status.problems) == 5
    lines = screen(status).splitlines()
    assert max(map(len, lines)) <= WIDTH == 46
    assert len(screen(replace(status, problems=[])).splitlines()) <= 25
    assert lines[0].startswith("gpt2-124m-fineweb-...: hung?  ")
    assert len(line(status)) <= WIDTH


def test_colors_are_used_only_on_request(healthy_run: RunFiles) -> None:
    plain, colored = screen(healthy_run.status()), screen(healthy_run.status(), colored=True)
    assert "\033" not in plain
    assert colored.replace("\033[32m", "").replace("\033[0m", "") == plain
    assert colored.startswith("test: \033[32mrunning\033[0m ")
    healthy_run.journal("save_failed", 60, 1000)
    assert "\033[31m! step 1,000 could not be saved\033[0m" in screen(healthy_run.status(), colored=True)


def test_line_has_the_main_figures(healthy_run: RunFiles) -> None:
    assert line(healthy_run.status()) == "  test         running     50%  9.024  2h 46m"
    healthy_run.journal("save_failed", 60, 1000)
    assert line(healthy_run.status()).startswith("! test ")


def test_hosts_are_shown_if_there_are_several(healthy_run: RunFiles) -> None:
    status = healthy_run.status()
    assert status.hosts == [] and "hosts" not in screen(status)
    hosts = [RunHost("node1", 2), RunHost("node3", 0), RunHost("node2", 0, NOW - 60, "no answer")]
    lines = screen(replace(status, hosts=hosts)).splitlines()
    first = next(number for number, text in enumerate(lines) if text.startswith("hosts"))
    assert lines[first : first + 3] == [
        "hosts       2 ranks on 1 host: node1 (2)",
        "  idle      node3",
        f"  away      node2 since {clock(NOW - 60)}",
    ]
    many = [RunHost(f"gpu-cluster-node-{number:03d}.example", 8) for number in range(64)]
    lines = screen(replace(status, hosts=many)).splitlines()
    assert lines[first] == "hosts       512 ranks on 64 hosts:"
    assert lines[first + 2].endswith(" ...") and lines[first + 3].startswith("loss ")
    assert max(map(len, lines)) <= WIDTH
