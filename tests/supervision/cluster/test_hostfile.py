"""Hostfiles, and the nodes of Slurm jobs."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.sections import ClusterSettings
from ds_gpt2.supervision.cluster.hostfile import Host, read_hostfile, slurm_hosts
from ds_gpt2.supervision.cluster.setup import hosts_of


def _file(folder: Path, content: str | bytes) -> Path:
    path = folder / "hosts"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_names_addresses_comments_and_empty_lines_are_read(tmp_path: Path) -> None:
    content = (
        "# my hosts\n\nnode1 slots=4\n  user@node-2.lab slots = 8  # new\r\n10.0.0.3\tslots=1\nfe80::1%eth0 slots=2"
    )
    expected = [Host("node1", 4), Host("user@node-2.lab", 8), Host("10.0.0.3", 1), Host("fe80::1%eth0", 2)]
    assert read_hostfile(_file(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("node1", r"line 1: 'node1' is not of the form `HOST slots=N`, such as `node1 slots=4`"),
        ("a slots=1\nnode1 slots=0", "line 2: 'slots=0': the slots must be a whole number from 1 to 9999"),
        ("node1 slots=-1", "'slots=-1': the slots must be"),
        ("node1 slots=100000", "'slots=100000': the slots must be"),
        ("node1 slots=two", "'slots=two': the slots must be"),
        ("node1 slots=4 slots=4", "is not of the form"),
        ("node1 SLOTS=2", "is not of the form"),
        ("-oProxyCommand=touch slots=1", "is not a name or an address"),  # ssh would take it as an option
        ("user@-oProxyCommand=touch slots=1", "is not a name or an address"),
        ("node1;reboot slots=1", "'node1;reboot' is not a name or an address that ssh can use"),
        ("höst slots=1", "'höst' is not a name or an address that ssh can use"),
        ("user@ slots=1", "'user@' is not a name or an address"),
        ("@node1 slots=1", "'@node1' is not a name or an address"),
        ("[fe80::1] slots=1", "'[fe80::1]' is not a name or an address"),
        (f"node1.{64 * 'h'} slots=1", "line 1: 'node1.hhh"),
        ("node1..lab slots=1", "'node1..lab' is not a name or an address"),
        (f"{127 * 'h.'} slots=1", "is not a name or an address"),
        ("node1 slots=1\nnode1 slots=2", "line 2: node1 is listed twice: add its slots to its first line"),
        ("# nothing\n", "lists no host: add lines of the form `HOST slots=N`"),
        (b"\xff\xfe slots=1", "cannot be read: "),
        (" " * (1 << 20) + "node1 slots=1", "is larger than 1 MiB"),
    ],
)
def test_an_invalid_file_is_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_hostfile(_file(tmp_path, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_long_line_is_cut(tmp_path: Path) -> None:
    for content in (bytes(5000), f"{'h' * 5000} slots=1", f"node1 slots={'1' * 5000}"):
        with pytest.raises(UserError, match=r"hosts, line 1: '.{70,90}\.\.\.") as error:
            read_hostfile(_file(tmp_path, content))
        assert len(str(error.value)) < 400


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    assert read_hostfile(_file(tmp_path, "\ufeffnode1 slots=4\r\n")) == [Host("node1", 4)]


def test_what_is_no_readable_file_is_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path / "missing", tmp_path, pipe, Path("/dev/zero")):
        with pytest.raises(UserError) as error:
            read_hostfile(path)
        assert str(error.value).startswith(f"the hostfile {path} cannot be read: ")
        assert str(error.value).endswith("give another with --hostfile, or cluster.hostfile=null for this machine only")


def test_the_nodes_of_a_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[01-02]" ] && printf "gpu01\\ngpu02\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environment = {"SLURM_JOB_NODELIST": "gpu[01-02]"}
    assert slurm_hosts(4, environment) == [Host("gpu01", 4), Host("gpu02", 4)]
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST is not set: start it in a job, with sbatch or salloc"):
        slurm_hosts(4, {})
    with pytest.raises(UserError, match="`scontrol show hostnames other` failed"):
        slurm_hosts(4, {"SLURM_JOB_NODELIST": "other"})


def _hosts(cluster: ClusterSettings, num_gpus: int | None = None, **environment: str) -> list[Host]:
    settings: Any = SimpleNamespace(cluster=cluster)
    return hosts_of(settings, num_gpus, environment)


def test_a_run_without_a_hostfile_uses_this_machine() -> None:
    assert _hosts(ClusterSettings()) == [] and _hosts(ClusterSettings(), 2) == []


def test_contradictions_are_refused(tmp_path: Path) -> None:
    hostfile = _file(tmp_path, "a slots=1\nb slots=1\n")
    assert len(_hosts(ClusterSettings(hostfile=hostfile, min_nodes=2))) == 2
    with pytest.raises(UserError, match="--num_gpus is for one machine: set the slots in "):
        _hosts(ClusterSettings(hostfile=hostfile), 2)
    with pytest.raises(UserError, match=r"cluster\.min_nodes=3, but the run has 2 hosts"):
        _hosts(ClusterSettings(hostfile=hostfile, min_nodes=3))
    for cluster in (ClusterSettings(hostfile=hostfile, launch="srun"), ClusterSettings(launch="srun")):
        with pytest.raises(UserError, match="SLURM_JOB_NODELIST is not set: start it in a job"):
            _hosts(cluster)
    assert len(_hosts(ClusterSettings(hostfile=hostfile, launch="srun"), SLURM_JOB_NODELIST="a,b,c")) == 2
    with pytest.raises(UserError, match="the number of ranks on each node is not known: give --num_gpus N"):
        _hosts(ClusterSettings(launch="srun"), SLURM_JOB_NODELIST="a,b")
