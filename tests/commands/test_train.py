"""``train`` and ``resume``: from the command line to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from small_run import SEQUENCE

from ds_gpt2 import cli
from ds_gpt2.commands import train
from ds_gpt2.config.settings import dump_settings, load_settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.supervised_run import SupervisedRun


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_a_run_that_another_machine_supervises_is_refused_before_anything_else(
    verb: str, write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is said about its checkpoints, which it may not have saved yet."""
    settings = load_settings(config := write_config(tmp_path))
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "config.yaml").write_text(dump_settings(settings))
    SupervisorRecord(1740, 1.0, "host-a", "running", 4, renewed=1.0).write(settings.run_dir)
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=2\nnode2 slots=2\n")
    words = [str(config) if verb == "train" else str(settings.run_dir), "--hostfile", str(hosts)]
    assert cli.main([verb, *words]) == exit_codes.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "error: run test is supervised by process 1740 on host-a, last seen 0s ago: wait until" in err
    assert f"`touch {settings.run_dir}/STOP`" in err


def test_num_gpus_is_the_number_of_ranks_on_each_node_of_a_slurm_job(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    started = []

    def start(run: SupervisedRun, settings: object, hosts: Sequence[Host], *_: object) -> int:
        started.append((run.layout.ranks, len(hosts)))
        return 0

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(train, "hosts_of", lambda settings, num_gpus: [Host("a", num_gpus), Host("b", num_gpus)])
    monkeypatch.setattr(train, "_start_on_hosts", start)
    config = write_config(
        tmp_path, batch={"tokens_per_step": 8 * SEQUENCE, "micro_batch": 2, "sequence_length": SEQUENCE}
    )
    assert cli.main(["train", str(config), "--num_gpus", "2"]) == 0
    assert started == [(4, 2)]
