"""The variables of launchers, batch systems and MPI, and variables left over from other jobs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import PROJECT, Launched, Run, run
from small_run import SEQUENCE

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.host import check_port_free, free_port
from ds_gpt2.distributed import launch_environment
from ds_gpt2.distributed.launch_environment import adopt, without_ranks
from ds_gpt2.supervision.launcher import TRAIN, RankLayout, start_command

STEPS = 4
SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-1@1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "CROSS_SIZE": "1",
    "CROSS_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def ranks(environment: dict[str, str]) -> tuple[str, ...]:
    return tuple(environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))


@pytest.mark.parametrize(
    ("variables", "launcher", "expected"),
    [
        ({}, "none", ("0", "1", "0", "1", "127.0.0.1")),
        (SLURM, "slurm", ("5", "6", "1", "2", "gpu07")),
        (SLURM | {"SLURM_NODEID": "0", "SLURM_PROCID": "1"}, "slurm", ("1", "6", "1", "4", "gpu07")),
        (SLURM | {"SLURM_STEP_NODELIST": "a1,b[2-9]"}, "slurm", ("5", "6", "1", "2", "a1")),
        (SLURM | {"MASTER_ADDR": "mine"}, "slurm", ("5", "6", "1", "2", "mine")),
        (OPEN_MPI, "mpi", ("3", "4", "3", "4", "127.0.0.1")),
        (SLURM | {"PMI_RANK": "5", "PMI_SIZE": "6"}, "slurm", ("5", "6", "1", "2", "gpu07")),
        (SLURM | {"SLURM_STEP_NODELIST": "rack[1-2]node[03-4],x"}, "slurm", ("5", "6", "1", "2", "rack1node03")),
        (OPEN_MPI | SLURM, "mpi", ("3", "4", "3", "4", "127.0.0.1")),
        (MPICH, "mpi", ("1", "2", "1", "2", "127.0.0.1")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpi", ("1", "2", "1", "2", "127.0.0.1")),
        (TORCHRUN, "torchrun", ("1", "4", "1", "2", "node1")),
        (TORCHRUN | SLURM, "torchrun", ("1", "4", "1", "2", "node1")),
        (DEEPSPEED, "deepspeed", ("1", "2", "1", "2", "127.0.0.1")),
        (DEEPSPEED | {"LOCAL_WORLD_SIZE": "8"}, "deepspeed", ("1", "2", "1", "2", "127.0.0.1")),
        # the batch script of a job; only the tasks of its steps are ranks
        ({"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "none", ("0", "1", "0", "1", "127.0.0.1")),
        ({"WORLD_SIZE": "1"}, "none", ("0", "1", "0", "1", "127.0.0.1")),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"},
            "environment",
            ("1", "2", "1", "2", "localhost"),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "1234"},
            "environment",
            ("1", "2", "0", "1", "pod-0"),
        ),
    ],
)
def test_adopt_handles_every_launcher(variables: dict[str, str], launcher: str, expected: tuple[str, ...]) -> None:
    environment = dict(variables)
    assert adopt(environment) == launcher
    assert ranks(environment) == expected
    assert adopt(environment) == launcher  # its own variables are not mistaken for another launcher's
    assert ranks(environment) == expected


def test_the_port_is_equal_on_all_ranks_of_a_job_and_differs_between_jobs() -> None:
    ports = []
    for variables in (SLURM, SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, SLURM | {"SLURM_JOB_ID": "72"}):
        environment = dict(variables)
        adopt(environment)
        ports.append(environment["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]
    assert all(1024 < int(port) < 32768 for port in ports)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set but RANK is not"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 but WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a whole number of at least 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is not"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT=http is not"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"}, "MASTER_PORT=http is not"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999, but the highest port is 65535"),
        (SLURM | {"WORLD_SIZE": "3"}, "the batch system started 6 tasks"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "several machines: set MASTER_ADDR"),
        ({"PMI_RANK": "1"}, "PMI_SIZE is not set"),
    ],
)
def test_invalid_variables_raise_an_error_of_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        adopt(dict(variables))
    assert "\n" not in str(raised.value)


def test_an_empty_variable_counts_as_not_set() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": ""}
    adopt(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and "MASTER_PORT" not in environment


def test_without_ranks_removes_the_variables_of_every_launcher() -> None:
    environment = TORCHRUN | DEEPSPEED | {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
    assert without_ranks(environment) == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "left_over",
    [{"WORLD_SIZE": "8"}, {"RANK": "3", "WORLD_SIZE": "8"}, {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "n1"}],
    ids=lambda names: " ".join(names),
)
def test_training_refuses_variables_left_over_from_another_job(
    left_over: dict[str, str], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    result = subprocess.run(
        [sys.executable, str(TRAIN), "--config", str(config)],
        env={**os.environ, **left_over},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "left over from a batch system" in result.stderr
    assert not (tmp_path / "runs").exists()


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.fixture(scope="module")
def by_deepspeed(write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run DeepSpeed's launcher in a directory whose files have the names of modules, and return that directory."""
    folder = tmp_path_factory.mktemp("launchers")
    schedule = {"steps": STEPS, "warmup_steps": 1, "max_lr": 3e-3, "min_lr": 3e-4}
    write_config(folder, schedule=schedule, validation={"every": 2, "tokens": 8 * SEQUENCE}, samples={"every": 0})
    for name in ("random", "json", "torch", "logging", "numpy", "ds_gpt2", "argparse", "typing"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was imported')\n")
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "__init__.py").write_text("raise SystemExit('the wrong deepspeed')\n")
    done = started(start_command(RankLayout("cpu", 2), TRAIN, arguments(folder, "deepspeed")), folder)
    assert done.code == 0, done.output
    return folder


def arguments(folder: Path, name: str) -> list[str]:
    flags = ["--use_tensorboard", "--checkpoint_freq", "2", "--eval_freq", "2"]
    return ["--config", str(folder / "run.yaml"), "--run_name", name, *flags]


def started(command: list[str], folder: Path) -> Launched:
    """Run ``command`` in ``folder``."""
    return run(["bash", "-c", 'cd "$1" && shift && exec "$@"', "bash", str(folder), *command])


def torchrun(*flags: str) -> list[str]:
    return [str(Path(sys.executable).with_name("torchrun")), *flags, "--nproc_per_node", "2", str(TRAIN)]


@pytest.mark.ranks
def test_torchrun_and_deepspeed_give_equal_losses(by_deepspeed: Path) -> None:
    done = started([*torchrun("--standalone"), *arguments(by_deepspeed, "standalone")], by_deepspeed)
    assert done.code == 0, done.output
    assert done.left_over == []
    assert losses(by_deepspeed, "standalone") == losses(by_deepspeed, "deepspeed")


@pytest.fixture(scope="module")
def resumed(by_deepspeed: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Resume a copy of the run from its first checkpoint, by torchrun with a port."""
    folder = Path(shutil.copytree(by_deepspeed, tmp_path_factory.mktemp("resumed") / "copy"))
    directories = [f"run.dir={folder / 'runs'}", f"checkpoint.dir={folder / 'checkpoints'}"]
    words = [*arguments(folder, "deepspeed"), "--resume", "2", *directories]
    return started([*torchrun("--master_port", str(free_port())), *words], folder), folder


@pytest.mark.ranks
def test_torchrun_resumes_a_run_of_deepspeed(resumed: Run) -> None:
    done, folder = resumed
    assert done.code == 0, done.output
    assert f"resumed from {folder}/checkpoints/deepspeed/rolling_step_000002, step 2 of {STEPS}" in done.output
    assert len(losses(folder, "deepspeed")) == STEPS


@pytest.mark.ranks
def test_torchrun_with_a_port_and_deepspeed_give_equal_losses(by_deepspeed: Path, resumed: Run) -> None:
    done, folder = resumed
    assert done.left_over == []
    assert losses(folder, "deepspeed") == losses(by_deepspeed, "deepspeed")


TASKS = """
import os, subprocess, sys
def environment(rank):
    return os.environ | {name: value.replace("N", str(rank)) for name, value in eval(sys.argv[1]).items()}
tasks = [subprocess.Popen(sys.argv[2:], env=environment(rank)) for rank in range(2)]
sys.exit(max(task.wait() for task in tasks))
"""
SRUN = {
    "SLURM_PROCID": "N",
    "SLURM_LOCALID": "N",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_ID": "JOB",
    "SLURM_STEP_ID": "0",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "N",
    "OMPI_COMM_WORLD_LOCAL_RANK": "N",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def with_free_port(variables: dict[str, str]) -> dict[str, str]:
    """Return ``variables`` with a job number whose port is free: the port of a fixed number may be in use."""
    if "SLURM_JOB_ID" not in variables:
        return variables  # the port depends on the process id of mpirun
    for job in itertools.count(os.getpid()):
        numbered = {name: value.replace("JOB", str(job)) for name, value in variables.items()}
        environment = {name: value.replace("N", "0") for name, value in numbered.items()}
        adopt(environment)
        with contextlib.suppress(UserError):
            check_port_free(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
            return numbered
    raise AssertionError


@pytest.mark.ranks
@pytest.mark.parametrize("variables", [SRUN, MPIRUN], ids=["srun", "mpirun"])
def test_slurm_and_mpi_tasks_give_the_losses_of_deepspeed(by_deepspeed: Path, variables: dict[str, str]) -> None:
    name = next(iter(variables)).partition("_")[0].lower()
    command = [sys.executable, str(TRAIN), *arguments(by_deepspeed, name)]
    done = started([sys.executable, "-I", "-c", TASKS, repr(with_free_port(variables)), *command], by_deepspeed)
    assert done.code == 0, done.output
    assert losses(by_deepspeed, name) == losses(by_deepspeed, "deepspeed")


def test_modules_of_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("random", "ds_gpt2", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    result = subprocess.run(
        [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert launch_environment.__file__.startswith(str(PROJECT))
