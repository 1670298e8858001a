"""Starts and stops of real ranks, which leave no process behind, and errors that prevent a start."""

from __future__ import annotations

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
from launched import end_session, run, start

from ds_gpt2 import cli
from ds_gpt2.checkpoint.catalog import newest_tag, scan
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.host import free_port
from ds_gpt2.config.settings import dump_settings, load_settings
from ds_gpt2.distributed import device
from ds_gpt2.distributed.peak_flops import peak_flops
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision import launcher
from ds_gpt2.supervision.launcher import TRAIN, RankLayout

ENDLESS = {"steps": 1_000_000, "warmup_steps": 3}


@pytest.fixture
def endless(tmp_path: Path, write_config: Callable[..., Path]) -> Path:
    batch = {"tokens_per_step": 256, "micro_batch": 2, "sequence_length": 16}
    return write_config(tmp_path, batch=batch, schedule=ENDLESS, samples={"every": 0}, validation={"every": 0})


def _read_until(process: subprocess.Popen[str], pattern: str, seconds: float = 120) -> str:
    """Return the output of ``process`` up to the first line that matches ``pattern``."""
    assert process.stdout is not None
    deadline, lines = time.monotonic() + seconds, []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
        assert time.monotonic() < deadline, "".join(lines)
    raise AssertionError(f"ended without {pattern!r}:\n{''.join(lines)}")


def _end(process: subprocess.Popen[str], seconds: float = 90) -> str:
    """Wait for the end of ``process``; return the rest of its output.

    ``communicate`` would miss lines that ``_read_until`` has buffered.
    """
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


@pytest.mark.ranks
def test_ctrl_c_saves_the_last_step_and_leaves_no_process(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH has Python only: neither a compiler nor git is needed."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    process = start([sys.executable, "-m", "ds_gpt2", "train", str(endless), "--num_gpus", "1"])
    output = _read_until(process, r"^step +3/")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # a second Ctrl+C must not interrupt the save
    output += _end(process)
    assert process.returncode == exit_codes.STOPPED, output
    assert "Traceback" not in output
    last = int(re.findall(r"^step +(\d+)/", output, re.MULTILINE)[-1])
    assert newest_tag(endless.parent / "checkpoints" / "test") == f"rolling_step_{last:06d}"
    assert f"stopped on request at step {last:,} of 1,000,000" in output
    assert _ranks_of(endless) == []


@pytest.mark.ranks
def test_a_stop_during_the_start_ends_the_ranks_and_leaves_no_process(endless: Path) -> None:
    process = start([sys.executable, "-m", "ds_gpt2", "train", str(endless), "--num_gpus", "2"])
    _read_until(process, "^starting 2 ranks")
    _wait_for_a_rank(endless)  # which imports modules now
    process.send_signal(signal.SIGTERM)
    output = _end(process, 60)
    assert process.returncode == exit_codes.STOPPED
    assert "Traceback" not in output and "stopped before the first step of this start" in output
    assert _ranks_of(endless) == []


@pytest.mark.ranks
def test_ctrl_c_saves_also_with_the_deepspeed_command(endless: Path) -> None:
    """On a terminal, SIGINT reaches every process of the group."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    process = start([*runner, str(TRAIN), "--config", str(endless)])
    _read_until(process, r"^step +3/")
    os.killpg(process.pid, signal.SIGINT)
    output = _end(process)
    directory = endless.parent / "checkpoints" / "test"
    assert f"checkpoint {directory / str(newest_tag(directory))}" in output
    assert len(scan(directory)) >= 1
    assert _ranks_of(endless) == []


@pytest.mark.ranks
@pytest.mark.parametrize("request_by", ["a STOP file", "SIGUSR1 to one rank"])
def test_one_stop_request_stops_all_ranks_within_the_step(
    tmp_path: Path, write_config: Callable[..., Path], request_by: str
) -> None:
    """A step has 32 micro-batches; the unfinished step is dropped, the last finished one is saved."""
    batch = {"tokens_per_step": 2048, "micro_batch": 2, "sequence_length": 16}
    config = write_config(
        tmp_path, schedule=ENDLESS, batch=batch, samples={"every": 0}, validation={"every": 0}, checkpoint={
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
    assert process.returncode == exit_codes.STOPPED, output
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
    """Return the command lines of running processes that use ``config``."""
    time.sleep(0.5)
    listed = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in listed if str(config) in words]


@pytest.mark.ranks
def test_the_exit_status_names_the_signal_that_killed_a_rank(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os, signal\n\nos.kill(os.getpid(), signal.SIGKILL)\n", encoding="utf-8")
    ranks = launcher.Ranks([], RankLayout("cpu", 1), tmp_path / "outcome", {}, script)
    assert ranks.exit_status == "a rank was killed by SIGKILL"
    assert not ranks.launcher_was_killed and ranks.have_exited


@pytest.mark.ranks
def test_the_signal_that_killed_a_rank_is_known_also_if_another_rank_is_noticed_first(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    program = "import os, signal, sys\n\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    script.write_text(f"{program}sys.exit(1)\n", encoding="utf-8")
    ranks = launcher.Ranks([], RankLayout("cpu", 2), tmp_path / "outcome", {}, script)
    assert ranks.exit_status in ("exit status 1", "a rank was killed by SIGKILL")
    assert ranks.kills() == {1: "SIGKILL"}


@pytest.fixture
def as_rank_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Make this process the only rank; restore its signal handlers and environment afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


def test_a_port_in_use_is_reported_with_a_free_one(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    from ds_gpt2 import train

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        as_rank_zero.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert train.main(["--config", str(endless)]) == exit_codes.MISTAKE
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
        (["run.device=cuda"], r"run\.device is cuda, but PyTorch .* finds no GPU"),
        (["nonsense"], "not of the form key=value"),
    ],
)
def test_a_configuration_error_is_reported_before_any_rank_starts(
    endless: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("ranks were started"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["train", str(endless), *arguments]) == exit_codes.MISTAKE
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("key", ["checkpoint.dir", "run.dir", "monitor.dir"])
def test_a_directory_that_cannot_be_written_is_reported(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    from ds_gpt2 import train

    as_rank_zero.setattr("ds_gpt2.training.run.open_process_group", lambda _: None)
    assert train.main(["--config", str(endless), f"{key}={endless}"]) == exit_codes.MISTAKE  # a file, not a directory
    assert re.fullmatch(rf"error: cannot write to {endless}/\S+: .*\n", capsys.readouterr().err)


def test_a_run_with_checkpoints_in_another_directory_is_not_started_anew(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ds_gpt2 import train

    big = endless.parent / "big"
    (big / "test" / "rolling_step_000250").mkdir(parents=True)
    (big / "test" / "rolling_step_000250" / "manifest.json").write_text("any content")
    run_dir = endless.parent / "runs" / "test"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_settings(load_settings(endless, {"checkpoint.dir": str(big)})))
    as_rank_zero.setattr("ds_gpt2.training.run.open_process_group", lambda _: None)
    assert train.main(["--config", str(endless)]) == exit_codes.MISTAKE
    error = capsys.readouterr().err
    assert f"it has some in {big}/test: move that directory" in error and f"or set checkpoint.dir={big}" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config YAML is required"),
        (["--resume", "schedule.steps=bad"], r"schedule\.steps=bad: must be a whole number"),
        (["--resume", "nowhere.step=5"], "unknown setting nowhere"),
        (["--no-such-flag"], "not of the form key=value"),
        (["run=5", "run.seed=1"], "run is already set to a value"),
    ],
)
def test_an_invalid_command_line_of_the_ranks_is_one_line(
    endless: Path,
    as_rank_zero: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ds_gpt2 import train

    del as_rank_zero
    config = ["--config", str(endless)] if arguments else []
    assert train.main([*config, *arguments]) == exit_codes.MISTAKE
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


def test_a_run_shorter_than_its_warmup_is_refused(
    endless: Path, as_rank_zero: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ds_gpt2 import train

    as_rank_zero.setattr("ds_gpt2.training.run.open_process_group", lambda _: None)
    arguments = ["schedule.epochs=0.1", "schedule.warmup_steps=9999"]
    assert train.main(["--config", str(endless), *arguments]) == exit_codes.MISTAKE
    assert "must be below the" in capsys.readouterr().err


def test_an_unknown_config_or_run_is_reported_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "gpt2_123m"]) == exit_codes.MISTAKE
    assert "gpt2_124m" in capsys.readouterr().err
    assert cli.main(["resume", "no-such-run"]) == exit_codes.MISTAKE
    assert "no run no-such-run" in capsys.readouterr().err


def test_all_gpus_are_used_by_default(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    auto = load_settings(endless, {"run.device": "auto"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(launcher, "version", lambda _: "2.13.0+cu130")
    assert launcher.choose_ranks(auto, None) == RankLayout("cuda", 3)
    assert launcher.choose_ranks(auto, 2) == RankLayout("cuda", 2)
    with pytest.raises(UserError, match=r"--num_gpus 4, but this machine has 3 GPUs: give --num_gpus 3$"):
        launcher.choose_ranks(auto, 4)
    assert launcher.choose_ranks(load_settings(endless), None) == RankLayout("cpu", 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert launcher.choose_ranks(auto, None) == RankLayout("cpu", 4)


def test_a_cpu_build_of_pytorch_is_not_imported_to_count_gpus(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("CUDA was queried"))
    monkeypatch.setattr(launcher, "version", lambda _: "2.13.0+cpu")
    assert launcher.choose_ranks(load_settings(endless, {"run.device": "auto"}), None) == RankLayout("cpu", 4)


@pytest.mark.parametrize(
    ("visible", "used"),
    [("", ["0", "1"]), ("2,3", ["2", "3"]), ("5, 1,0", ["5", "1"]), ("GPU-89,GPU-f3", ["GPU-89", "GPU-f3"])],
)
def test_visible_devices_are_used(visible: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launcher._devices(RankLayout("cuda", 2)) == used
    assert launcher._devices(RankLayout("cpu", 2)) == ["0", "1"]


@pytest.mark.ranks
def test_ranks_inherit_devices_that_are_named_by_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-89,GPU-f3")
    script = tmp_path / "devices.py"
    script.write_text("import os; print('devices ' + os.environ['CUDA_VISIBLE_DEVICES'])", encoding="utf-8")
    done = run(launcher.start_command(RankLayout("cuda", 2), script, []))
    assert done.output.count("devices GPU-89,GPU-f3") == 2, done.output  # line ends of the two ranks may be mixed


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA L40", None), ("NVIDIA RTX A4000", None), ("NVIDIA RTX A1000", None), ("NVIDIA A10G", None),
    ],
)  # fmt: skip
def test_the_peak_is_known_for_exact_names_of_gpus_only(
    name: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    peak = peak_flops(torch.device("cuda", 0))
    assert peak == (None if teraflops is None else teraflops * 1e12)


def test_the_ranks_report_if_there_are_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 ranks, but this machine has 1 GPU: start with --num_gpus 1"):
        device.choose("cuda")
