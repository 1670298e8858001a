"""The batch script for several nodes, on two hosts, with stand-ins for srun and scontrol."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import PROJECT
from two_hosts import HostCommand, TwoHosts, assert_nothing_is_left, small_run, two_hosts

from ds_gpt2.checkpoint.catalog import newest_step, problem_of, scan
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.journal import read_journal

pytestmark = [pytest.mark.ranks, pytest.mark.extended]

BATCH = PROJECT / "deploy" / "ds_gpt2_multinode.sbatch"
# Starts its task on the node of --nodelist, in the same directory, with the variables that Slurm sets for a task.
SRUN = """#!/usr/bin/env bash
echo "$*" >> "{log}"
task=(SLURM_JOB_ID="$SLURM_JOB_ID" SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=1)
while [[ $1 == --* ]]; do
  case $1 in
    --nodelist=*) node=${{1#*=}} ;;
    --nodes=1 | --ntasks=1 | --overlap | --cpu-bind=none | --unbuffered) ;;
    *) echo "srun: unrecognized option '$1'" >&2; exit 1 ;;
  esac
  shift
done
exec ssh "$node" "cd $(printf %q "$PWD") && exec env $(printf '%q ' "${{task[@]}}" "$@")"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  'show hostnames host-[a,b]') printf 'host-a\\nhost-b\\n' ;;
  *) echo "$*" >> "{log}" ;;
esac
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("slurm") / "pair", number=80) as pair:
        for name, script in {"srun": SRUN, "scontrol": SCONTROL}.items():
            program = pair.folder / "bin" / name
            program.write_text(script.format(log=pair.folder / f"{name}.log"))
            program.chmod(0o755)
        yield pair


class Job(HostCommand):
    """The batch script on the first node, as Slurm starts it."""

    def __init__(self, hosts: TwoHosts, *words: str) -> None:
        slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "host-[a,b]",
            "SLURM_SUBMIT_DIR": str(PROJECT),
            "SLURM_CPUS_PER_TASK": "1",
            "DS_GPT2_PYTHON": sys.executable,
        }
        super().__init__(hosts.a, ["bash", str(BATCH), *words], slurm)


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    return write_config(tmp_path, **small_run(tmp_path, 1_000_000, 6))


def starts(settings: Settings) -> int:
    with contextlib.suppress(OSError):
        return sum(event.kind == "start" for event in read_journal(settings.run_dir))
    return 0


def test_a_job_on_two_nodes_saves_before_its_time_limit_and_continues_after_it(hosts: TwoHosts, config: Path) -> None:
    settings = load_settings(config)
    job = Job(hosts, str(config), "--num_gpus", "2")
    job.wait_for(lambda: newest_step(settings.checkpoint_dir) >= 6)
    assert [len(host.matching("--local_rank=", str(config))) for host in hosts.all] == [2, 2]
    job.program.send_signal(signal.SIGUSR1)  # the script alone, as --signal=B:USR1 does
    output = job.end()
    assert job.process.returncode == exit_codes.STOPPED, output
    assert "starting 4 ranks on host-a (2), host-b (2)" in output
    assert (hosts.folder / "scontrol.log").read_text() == "requeue 4711\n"
    (step,) = (hosts.folder / "srun.log").read_text().splitlines()  # the agent of the first node needs none
    assert "--nodelist=host-b" in step and step.endswith("cluster/agent.py")
    assert_nothing_is_left(hosts)
    newest = scan(settings.checkpoint_dir)[0]
    assert problem_of(newest) is None

    again = Job(hosts, str(config), "--num_gpus", "2", f"schedule.steps={newest.step + 4}")
    output = again.end()
    assert again.process.returncode == exit_codes.DONE, output
    assert starts(settings) == 2 and newest_step(settings.checkpoint_dir) == newest.step + 4
    assert (hosts.folder / "scontrol.log").read_text() == "requeue 4711\n"
    assert_nothing_is_left(hosts)
