"""The drill on two hosts: the loss of a host, and of everything at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import PROJECT
from small_run import MODEL
from two_hosts import two_hosts

from ds_gpt2.run_dir import exit_codes

pytestmark = [pytest.mark.ranks, pytest.mark.extended]

PLAYED = "exception,kill_rank,kill_all,node"


def test_a_drill_on_two_hosts_passes(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    config = write_config(tmp_path / "folder", model=MODEL)
    with two_hosts(tmp_path / "pair", number=80) as hosts:
        hostfile = tmp_path / "hosts"
        hostfile.write_text("".join(f"{host.address} slots=2\n" for host in hosts.all))
        words = [str(PROJECT / "ds_gpt2" / "__main__.py"), "drill", str(config), "--hostfile", str(hostfile)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = hosts.a.command([sys.executable, *words, "--only", PLAYED, "--seed", "4", "--json"])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        output = done.stdout + done.stderr
        rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
        names = ["undisturbed", "exception", "kill_rank", "kill_all", "bit_for_bit", "node", "no_process_left"]
        assert [(name, row["verdict"]) for name, row in rows.items()] == [(name, "pass") for name in names], output
        assert done.returncode == exit_codes.DONE
        assert rows["node"]["text"].startswith(f"all processes of {hosts.b.address} killed after step ")
        assert 1 < rows["node"]["lost_seconds"] < 90
        assert [process.cmdline() for host in hosts.all for process in host.matching("ds_gpt2")] == []
    assert list((tmp_path / "folder" / "checkpoints").iterdir()) == []
