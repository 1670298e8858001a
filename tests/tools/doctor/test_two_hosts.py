"""The doctor on two hosts, with a fast and with a slow link."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import PROJECT
from two_hosts import TwoHosts, two_hosts

from ds_gpt2.run_dir import exit_codes

pytestmark = [pytest.mark.ranks, pytest.mark.extended]


def _rows(hosts: TwoHosts, config: Path) -> list[dict[str, Any]]:
    hostfile = config.with_name("hosts")
    hostfile.write_text("".join(f"{host.address} slots=2\n" for host in hosts.all))
    words = [str(PROJECT / "ds_gpt2" / "__main__.py"), "doctor", str(config), "--hostfile", str(hostfile), "--json"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = hosts.a.command([sys.executable, *words])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == exit_codes.DONE, done.stdout + done.stderr
    assert [process.cmdline() for host in hosts.all for process in host.matching("ds_gpt2")] == []
    assert sorted(path.name for path in config.parent.iterdir()) == ["hosts", "run.yaml"]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_hosts_and_links_are_measured_and_a_slow_link_is_named(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(tmp_path / "folder")
    with two_hosts(tmp_path / "pair", number=70) as hosts:
        link = f"{hosts.a.address} - {hosts.b.address}"
        rows = _rows(hosts, config)
        for host in hosts.all:
            own = [row["name"] for row in rows if row["host"] == host.address]
            assert own[0] == "connection" and own[-3:] == ["ranks", "rank 0", "rank 1"]
        common = [row for row in rows if row["host"] is None]
        names = [row["name"] for row in common if row["group"] != "this machine"]
        assert names == ["versions", "directories", "rank 0", link, "ranks", *(f"rank {rank}" for rank in range(4))]
        (measured,) = (row for row in common if row["name"] == link)
        assert re.fullmatch(r"[\d.]+ [GM]B/s there, [\d.]+ [GM]B/s back, round trip [\d.]+ ms", measured["found"])
        (started,) = (row for row in common if row["name"] == "ranks")
        assert started["status"] == "ok" and started["found"].startswith("4 started, connected over gloo, summed")

        hosts.limit(10e6)
        (measured,) = (row for row in _rows(hosts, config) if row["name"] == link)
        assert measured["status"] == "warn" and measured["fix"]
        pattern = r"slow link: [\d.]+ [GM]B/s there, 1\.[0-3] MB/s back, .*; less than Gigabit Ethernet has"
        assert re.fullmatch(pattern, measured["found"])
