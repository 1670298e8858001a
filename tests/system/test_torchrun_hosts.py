"""Ranks on two hosts that no supervisor started: by torchrun, and as tasks of srun."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from launched import PROJECT
from two_hosts import HostCommand, TwoHosts, small_run, two_hosts

from ds_gpt2.checkpoint.catalog import newest_step, problem_of, scan
from ds_gpt2.common.host import free_port
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.run_dir.starts import read_starts, started_from
from ds_gpt2.supervision.launcher import TRAIN

pytestmark = [pytest.mark.ranks, pytest.mark.extended]

STEPS = 4
DEBIAN = {name: f"127.0.1.1 {name}" for name in ("host-a", "host-b")}  # as Debian's installer writes them
UNKNOWN = dict.fromkeys(("host-a", "host-b"), "# its own name is unknown")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Hosts whose own names resolve to 127.0.1.1."""
    with two_hosts(tmp_path_factory.mktemp("hosts") / "pair", number=70, names=DEBIAN) as pair:
        yield pair


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    return write_config(tmp_path, **small_run(tmp_path, STEPS, 2))


def on_both(
    hosts: TwoHosts, command: Callable[[int], list[str]], variables: Callable[[int], dict[str, str]] = lambda _: {}
) -> tuple[list[int], str]:
    """Run a command on both hosts; return the exit codes and the output of both."""
    started = [HostCommand(host, command(number), variables(number)) for number, host in enumerate(hosts.all)]
    try:
        outputs = [each.end(240) for each in started]
    finally:
        for each in started:
            each.process.kill()
    assert [process for host in hosts.all for process in host.matching(str(TRAIN))] == []
    return [each.process.returncode for each in started], "".join(outputs)


def torchrun(hosts: TwoHosts, config: Path, *words: str, master: str | None = None) -> tuple[list[int], str]:
    """Train with ``torchrun --nnodes 2``."""
    address, port = master or hosts.a.address, str(free_port())
    program = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    rendezvous = ["--master_addr", address, "--master_port", port]
    training = [str(TRAIN), "--config", str(config), *words]
    return on_both(hosts, lambda number: [*program, "--node_rank", str(number), *rendezvous, *training])


def starts(folder: Path) -> list[int]:
    """Return the steps at which the run has started."""
    return started_from(read_starts(folder / "runs" / "test"))


def steps(folder: Path) -> int:
    return len((folder / "runs" / "test" / METRICS).read_text().splitlines())


@pytest.mark.parametrize("master", [None, "host-a"])
def test_torchrun_trains_on_hosts_whose_names_resolve_to_the_loopback_interface(
    hosts: TwoHosts, config: Path, master: str | None, tmp_path: Path
) -> None:
    codes, output = torchrun(hosts, config, master=master)
    assert codes == [0, 0], output
    assert steps(tmp_path) == STEPS and (tmp_path / "checkpoints/test/rolling_step_000004").is_dir()


def test_torchrun_trains_on_hosts_whose_names_are_unknown(config: Path, tmp_path: Path) -> None:
    with two_hosts(tmp_path / "pair", number=71, names=UNKNOWN) as hosts:
        codes, output = torchrun(hosts, config)
    assert codes == [0, 0], output
    assert steps(tmp_path) == STEPS


def test_tasks_of_srun_train_on_two_hosts(hosts: TwoHosts, config: Path, tmp_path: Path) -> None:
    def variables(number: int) -> dict[str, str]:
        return {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(number),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NODELIST": "host-[a,b]",
        }

    codes, output = on_both(hosts, lambda _: [sys.executable, str(TRAIN), "--config", str(config)], variables)
    assert codes == [0, 0], output
    assert steps(tmp_path) == STEPS


@pytest.fixture
def refused(hosts: TwoHosts, config: Path) -> Callable[..., str]:
    """Return a function that starts a run and returns its error line, the same on both hosts."""

    def start(*words: str) -> str:
        codes, output = torchrun(hosts, config, *words)
        assert codes == [1, 1], output  # of torchrun
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(set(errors)) == 1, output
        assert "exitcode  : 2" in output and 'Traceback (most recent call last):\n  File "' + str(PROJECT) not in output
        return errors[0]

    return start


@pytest.mark.parametrize("which", ["runs", "checkpoints"])
def test_a_directory_that_is_not_shared_is_refused(
    hosts: TwoHosts, refused: Callable[..., str], tmp_path: Path, which: str
) -> None:
    directory = tmp_path / which
    directory.mkdir()
    with hosts.b.without(directory):
        error = refused()
        assert hosts.b.run("ls", "-A", str(directory)) == ""
    assert error.startswith(
        f"error: {directory / 'test'} is not the same directory on host-a and host-b: mount a shared"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run.yaml", which])
    assert list(directory.iterdir()) == []


def test_checkpoints_that_only_one_host_has_are_refused(
    hosts: TwoHosts, config: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    codes, output = torchrun(hosts, config)
    assert codes == [0, 0], output
    with hosts.b.without(tmp_path / "checkpoints"):
        error = refused("--resume", "latest", "schedule.steps=8")
    assert error.startswith(f"error: {tmp_path}/checkpoints/test is not the same directory on host-a and host-b")


def test_other_code_on_a_host_is_refused(hosts: TwoHosts, refused: Callable[..., str], tmp_path: Path) -> None:
    module, other = PROJECT / "ds_gpt2" / "common" / "formatting.py", tmp_path / "other.py"
    other.write_text(module.read_text() + "\n")
    hosts.b.run("mount", "--bind", str(other), str(module))
    try:
        error = refused()
    finally:
        hosts.b.run("umount", str(module))
    assert error.startswith("error: the code of ds_gpt2: ") and error.endswith(" on host-b: make them equal")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("how", ["missing", "other"])
def test_other_data_on_a_host_are_refused(
    hosts: TwoHosts, refused: Callable[..., str], dataset_dir: Path, tmp_path: Path, how: str
) -> None:
    data = tmp_path / "data"
    if how == "missing":
        data.mkdir()
    else:
        shutil.copytree(dataset_dir, data)
        (data / "train_000000.bin").rename(data / "train_000001.bin")
        index = data / "dataset.json"
        index.write_text(index.read_text().replace("train_000000", "train_000001"))
    hosts.b.run("mount", "--bind", str(data), str(dataset_dir))
    try:
        error = refused()
    finally:
        hosts.b.run("umount", str(dataset_dir))
    if how == "missing":
        assert error.startswith(f"error: host host-b: no data: {dataset_dir} has neither")
    else:
        assert error.startswith("error: the data: ") and error.endswith(" on host-b: make them equal")
    assert not (tmp_path / "runs").exists()


def test_the_command_of_the_kubernetes_job_starts_all_ranks_again_after_one_was_killed(
    config: Path, tmp_path: Path
) -> None:
    _, job = yaml.safe_load_all((PROJECT / "deploy" / "kubernetes_multinode.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    changed = {"--nproc_per_node": "2", "--config": str(config), "--rdzv_endpoint": f"ADDRESS:{free_port()}"}
    parts = [word.partition("=") for word in container["command"][1:]]
    flags = [f"{flag}={changed.get(flag, value)}" if equals else flag for flag, equals, value in parts]
    variables = {each["name"]: each["value"] for each in container["env"]}
    endless = [
        *(str(TRAIN) if flag == "ds_gpt2/train.py" else flag for flag in flags),
        "schedule.steps=1000000",
    ]
    checkpoints = tmp_path / "checkpoints" / "test"
    with two_hosts(tmp_path / "pair", number=72) as hosts:  # the names of pods resolve to their own addresses
        program = [sys.executable, "-m", "torch.distributed.run"]
        command = [word.replace("ADDRESS", hosts.a.address) for word in (*program, *endless)]
        started = [HostCommand(host, command, variables) for host in hosts.all]
        try:
            wait_for = started[0].wait_for
            wait_for(lambda: newest_step(checkpoints) >= 4)
            hosts.b.matching(str(TRAIN), "-u")[-1].kill()
            wait_for(lambda: len(starts(tmp_path)) == 2)
            saved = newest_step(checkpoints)
            wait_for(lambda: newest_step(checkpoints) > saved)
            for each in started:  # `kubectl delete`
                each.program.terminate()
            outputs = [each.end(120) for each in started]
        finally:
            for each in started:
                each.process.kill()
        assert [process for host in hosts.all for process in host.matching(str(TRAIN))] == []
    assert "stopped on request at step" in "".join(outputs) and starts(tmp_path)[1] >= 4
    assert problem_of(scan(checkpoints)[0]) is None
