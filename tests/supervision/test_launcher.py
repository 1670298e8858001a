"""Starting and stopping: real processes, real signals, and nobody left afterwards."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from launched import TRAIN, end_session, run, start

from ds_gpt2 import cli
from ds_gpt2.checkpoint.catalog import newest_tag, scan
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.host import free_port
from ds_gpt2.config.settings import dump_settings, load_settings
from ds_gpt2.distributed import device
from ds_gpt2.run_dir import exit_report
from ds_gpt2.supervision import launcher
from ds_gpt2.supervision.launcher import RankLayout

FOR_EVER = {"steps": 1_000_000, "warmup_steps": 3}


@pytest.fixture
def endless(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    return write_config(tmp_path, schedule=FOR_EVER, samples={"every": 0}, validation={"every": 0})


def _read_until(process: subprocess.Popen[str], pattern: str, seconds: float = 120) -> str:
    """Output of ``process`` up to the first line that matches."""
    assert process.stdout is not None
    deadline, lines = time.monotonic() + seconds, []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
    raise AssertionError(f"ended without {pattern!r}:\n{''.join(lines)}")


def _end(process: subprocess.Popen[str], seconds: float = 90) -> str:
    """What is left of its output; not by ``communicate``, which knows nothing of lines that are read ahead."""
    assert process.stdout is not None
    deadline = threading.Timer(seconds, end_session, [process.pid])
    deadline.start()
    try:
        output = process.stdout.read()
        process.wait()
        return output
    finally:
        deadline.cancel()
        end_session(process.pid)


def test_ctrl_c_saves_the_step_just_done_and_leaves_nobody(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with nothing but Python on it, too: no compiler and no git are needed."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    process = start([sys.executable, "-m", "ds_gpt2", "train", str(endless), "--num_gpus", "2"])
    output = _read_until(process, r"^step +3/")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # impatience must not tear the save
    output += _end(process)
    assert process.returncode == exit_report.STOPPED, output
    assert "Traceback" not in output
    last = int(re.findall(r"^step +(\d+)/", output, re.MULTILINE)[-1])
    assert newest_tag(endless.parent / "checkpoints" / "test") == f"rolling_step_{last:06d}"
    assert f"stopped on request at step {last} of 1000000" in output
    assert _ranks_of(endless) == []


def test_a_stop_while_starting_ends_at_once_and_leaves_nobody(endless: Path) -> None:
    process = start([sys.executable, "-m", "ds_gpt2", "train", str(endless), "--num_gpus", "2"])
    _read_until(process, "^starting 2 ranks")
    _wait_for_a_rank(endless)  # it is importing
    process.send_signal(signal.SIGTERM)
    output = _end(process, 60)
    assert process.returncode == exit_report.STOPPED
    assert "Traceback" not in output and "stopped before the first step of this start" in output
    assert _ranks_of(endless) == []


def test_ctrl_c_under_deepspeeds_own_launcher_saves_too(endless: Path) -> None:
    """On a terminal SIGINT reaches every process of the group at once."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    process = start([*runner, str(TRAIN), "--config", str(endless)])
    _read_until(process, r"^step +3/")
    os.killpg(process.pid, signal.SIGINT)
    output = _end(process)
    directory = endless.parent / "checkpoints" / "test"
    assert f"checkpoint {directory / str(newest_tag(directory))}" in output
    assert len(scan(directory)) >= 1
    assert _ranks_of(endless) == []


@pytest.mark.parametrize("request_by", ["a STOP file", "SIGUSR1 to one rank"])
def test_one_request_anywhere_stops_all_ranks_within_the_step(
    tmp_path: Path, write_config: Callable[..., Path], request_by: str
) -> None:
    """32 micro-batches a step: the one under way is dropped, what was finished is saved."""
    batch = {"tokens_per_step": 8192, "micro_batch": 2, "sequence_length": 64}
    config = write_config(
        tmp_path, schedule=FOR_EVER, batch=batch, samples={"every": 0}, validation={"every": 0}, checkpoint={
            "dir": str(tmp_path / "checkpoints"), "every": 250
        }
    )  # fmt: skip
    process = start([sys.executable, "-m", "ds_gpt2", "train", str(config), "--num_gpus", "2"])
    output = _read_until(process, r"^step +2/")
    stop_file = tmp_path / "runs" / "test" / "STOP"
    if request_by == "a STOP file":
        stop_file.touch()
    else:
        rank = next(found for found in psutil.process_iter(["environ", "cmdline"]) if _is_rank_one(found, config))
        rank.send_signal(signal.SIGUSR1)
    output += _end(process)
    assert process.returncode == exit_report.STOPPED, output
    last = int(re.findall(r"^step +(\d+)/", output, re.MULTILINE)[-1])
    assert newest_tag(tmp_path / "checkpoints" / "test") == f"rolling_step_{last:06d}"
    assert not stop_file.exists()
    assert _ranks_of(config) == []


def _is_rank_one(process: psutil.Process, config: Path) -> bool:
    return (process.info["environ"] or {}).get("RANK") == "1" and str(config) in (process.info["cmdline"] or [])


def _wait_for_a_rank(config: Path) -> None:
    deadline = time.monotonic() + 60
    while not any(_is_rank_one(found, config) for found in psutil.process_iter(["environ", "cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _ranks_of(config: Path) -> list[list[str]]:
    """Command lines of living processes that work on ``config``."""
    time.sleep(0.5)
    listed = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in listed if str(config) in words]


def test_the_signal_that_ended_a_rank_is_named(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os, signal\n\nos.kill(os.getpid(), signal.SIGKILL)\n", encoding="utf-8")
    ranks = launcher.Ranks([], RankLayout("cpu", 1), tmp_path / "outcome", {}, script)
    assert ranks.exit_status == "a rank was killed by SIGKILL"
    assert not ranks.launcher_died and ranks.gone


@pytest.fixture
def as_rank_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process as the only rank; its signal handlers and environment come back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


def test_a_taken_port_is_named_with_a_free_one(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    from ds_gpt2 import train

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        as_rank_zero.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert train.main(["--config", str(endless)]) == exit_report.MISTAKE
    assert re.fullmatch(r"error: port \d+ is in use, .* --master_port \d+ .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint.dir=/dev/null"], "cannot write to /dev/null/test"),
        (["data.dir=/nowhere"], "no data: /nowhere does not exist"),
        (["batch.micro_batch=5"], r"cannot be divided .* set batch\.micro_batch=4, or batch\.tokens_per_step=\d+"),
        (["model.preset=7B"], r"model\.preset is '7B': known are 7M"),
        (["batch.micro_batc=5"], r"did you mean batch\.micro_batch\?"),
        (["deepspeed=/nowhere.json"], "DeepSpeed file not found: /nowhere.json"),
        (["run.device=cuda"], r"run\.device is cuda, but PyTorch .* sees no GPU"),
        (["nonsense"], "not of the form key=value"),
    ],
)
def test_a_mistake_is_told_before_any_rank_starts(
    endless: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda *_, **__: pytest.fail("ranks were started"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["train", str(endless), *arguments]) == exit_report.MISTAKE
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("key", ["checkpoint.dir", "run.dir", "monitor.dir"])
def test_a_directory_that_cannot_be_written_is_named(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    from ds_gpt2 import train

    as_rank_zero.setattr("ds_gpt2.training.run.open_process_group", lambda _: None)
    assert train.main(["--config", str(endless), f"{key}={endless}"]) == exit_report.MISTAKE  # a file, not a directory
    assert re.fullmatch(rf"error: cannot write to {endless}/\S+: .*\n", capsys.readouterr().err)


def test_a_run_whose_checkpoints_lie_elsewhere_keeps_its_history(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ds_gpt2 import train

    big = endless.parent / "big"
    (big / "test" / "rolling_step_000250").mkdir(parents=True)
    (big / "test" / "rolling_step_000250" / "manifest.json").write_text("whatever it holds")
    run_dir = endless.parent / "runs" / "test"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_settings(load_settings(endless, {"checkpoint.dir": str(big)})))
    as_rank_zero.setattr("ds_gpt2.training.run.open_process_group", lambda _: None)
    assert train.main(["--config", str(endless)]) == exit_report.MISTAKE
    said = capsys.readouterr().err
    assert f"it has some in {big}/test: move that directory" in said and f"or set checkpoint.dir={big}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --config YAML"),
        (["--resume", "schedule.steps=bad"], r"schedule\.steps=bad: must be a whole number"),
        (["--resume", "nowhere.step=5"], "unknown setting nowhere"),
        (["--no-such-flag"], "not of the form key=value"),
        (["run=5", "run.seed=1"], "run was given a value of its own"),
    ],
)
def test_a_bad_command_line_of_the_ranks_is_one_line(
    endless: Path,
    as_rank_zero: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ds_gpt2 import train

    del as_rank_zero
    config = ["--config", str(endless)] if arguments else []
    assert train.main([*config, *arguments]) == exit_report.MISTAKE
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


def test_epochs_shorter_than_the_warm_up_are_refused(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ds_gpt2 import train

    as_rank_zero.setattr("ds_gpt2.training.run.open_process_group", lambda _: None)
    arguments = ["schedule.epochs=0.1", "schedule.warmup_steps=9999"]
    assert train.main(["--config", str(endless), *arguments]) == exit_report.MISTAKE
    assert "must be below the" in capsys.readouterr().err


def test_an_unknown_config_or_run_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "gpt2_123m"]) == exit_report.MISTAKE
    assert "gpt2_124m" in capsys.readouterr().err
    assert cli.main(["resume", "no-such-run"]) == exit_report.MISTAKE
    assert "no run no-such-run" in capsys.readouterr().err


def test_gpus_are_used_when_there_are_some(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    auto = load_settings(endless, {"run.device": "auto"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(launcher, "version", lambda _: "2.13.0+cu130")
    assert launcher.choose_ranks(auto, None) == RankLayout("cuda", 3)
    assert launcher.choose_ranks(auto, 2) == RankLayout("cuda", 2)
    with pytest.raises(UserError, match=r"--num_gpus 4, but this machine shows 3 GPU"):
        launcher.choose_ranks(auto, 4)
    assert launcher.choose_ranks(load_settings(endless), None) == RankLayout("cpu", 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert launcher.choose_ranks(auto, None) == RankLayout("cpu", 4)


def test_a_build_of_pytorch_for_cpus_is_not_imported_to_be_asked(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("it was asked"))
    monkeypatch.setattr(launcher, "version", lambda _: "2.13.0+cpu")
    assert launcher.choose_ranks(load_settings(endless, {"run.device": "auto"}), None) == RankLayout("cpu", 4)


STOPPED = """
import os, signal, sys, threading
from pathlib import Path
from ds_gpt2.run_dir.heartbeat import Heartbeat, open_stacks

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

running = threading.Semaphore(0)

def run_on():
    running.release()
    while True: pass

Heartbeat(Path(sys.argv[1]), 0).begin_step(1, 1)
open_stacks(Path(sys.argv[1]), 0)
for _ in range(3):
    threading.Thread(target=run_on, daemon=True).start()
    running.acquire()
stop()
run_on()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "tgkill"), reason="glibc before 2.30 cannot signal one thread")
def test_stacks_tell_where_a_rank_was_stopped_though_other_threads_are_quicker(tmp_path: Path) -> None:
    for turn in range(12):  # with a signal to the process, every third of these was of what came after
        run_dir, into = tmp_path / f"run{turn}", tmp_path / f"stacks{turn}"
        process = start([sys.executable, "-c", STOPPED, str(run_dir)])
        try:
            while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
            launcher.write_stacks(run_dir, 1, process.pid, into)
            stacks = (into / "rank_00000.txt").read_text(encoding="utf-8")
        finally:
            end_session(process.pid)
        assert "in stop\n" in stacks and stacks.count("in run_on\n") == 3, stacks


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("", ["0", "1"]), ("2,3", ["2", "3"]), ("5, 1,0", ["5", "1"]), ("GPU-89,GPU-f3", ["GPU-89", "GPU-f3"])],
)
def test_visible_devices_are_the_ones_used(visible: str, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launcher._devices(RankLayout("cuda", 2)) == seen
    assert launcher._devices(RankLayout("cpu", 2)) == ["0", "1"]


def test_ranks_see_devices_that_have_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-89,GPU-f3")
    script = tmp_path / "seen.py"
    script.write_text("import os; print('seen ' + os.environ['CUDA_VISIBLE_DEVICES'])", encoding="utf-8")
    done = run(launcher.start_command(RankLayout("cuda", 2), script, []))
    assert done.output.count("seen GPU-89,GPU-f3") == 2, done.output  # the ends of two ranks' lines may mingle


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA L40", None), ("NVIDIA RTX A4000", None), ("NVIDIA RTX A1000", None), ("NVIDIA A10G", None),
    ],
)  # fmt: skip
def test_a_peak_is_only_claimed_for_the_very_card(
    name: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    peak = device.peak_flops(torch.device("cuda", 0))
    assert peak == (None if teraflops is None else teraflops * 1e12)


def test_more_ranks_than_gpus_is_told_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 ranks but this machine shows 1 GPU\(s\): start with --num_gpus 1"):
        device.choose("cuda")


@pytest.mark.parametrize(
    ("own", "file", "content", "kills"),
    [
        ("0::/user/run", "user/run/memory.events", "low 0\noom 4\noom_kill 3\n", 3),
        ("0::/", "memory.events", "oom_kill 2\n", 2),
        ("5:cpu:/x\n4:memory:/docker/1\n0::/", "memory/docker/1/memory.oom_control", "under_oom 0\noom_kill 7\n", 7),
        ("4:cpu,memory:/docker/1", "memory/memory.oom_control", "oom_kill 5\n", 5),
    ],
)
def test_kills_for_memory_are_counted_by_every_version_of_control_groups(
    tmp_path: Path, own: str, file: str, content: str, kills: int
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    (tmp_path / "cgroup" / file).parent.mkdir(parents=True)
    (tmp_path / "cgroup" / file).write_text(content)
    groups = launcher._memory_groups(tmp_path / "cgroup", tmp_path / "own")
    found = next(group for group in groups if group.exists())
    assert launcher._kills_in(found) == kills


def test_where_no_control_group_counts_kills_the_machine_does() -> None:
    assert launcher.out_of_memory_kills() >= 0
    assert launcher._kills_in(Path("/proc/vmstat")) is not None
