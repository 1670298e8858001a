"""``train`` and ``resume``: from the command line to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from small_run import SEQUENCE

from ds_gpt2 import cli
from ds_gpt2.commands import train
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.supervised_run import SupervisedRun


def test_num_gpus_is_the_number_of_ranks_on_each_node_of_a_slurm_job(
    monkeypatch: pytest.MonkeyPatch, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    started = []

    def start(run: SupervisedRun, settings: object, hosts: Sequence[Host], words: object) -> int:
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
