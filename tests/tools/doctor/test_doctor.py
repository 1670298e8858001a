"""``doctor``: what each look finds on a real disk, in real processes, under real limits."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from launched import PROJECT

from ds_gpt2.commands import doctor
from ds_gpt2.common.files import lock
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.shards import HEADER_BYTES
from ds_gpt2.model.gpt2 import GPT2, count_parameters
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.doctor import clock, data, disk, gpus, limits, memory, network, processes, ranks, software
from ds_gpt2.tools.doctor.checks import checks, quick
from ds_gpt2.tools.doctor.row import Check, Finding, examine, in_one_line
from ds_gpt2.tools.resources import requirements
from ds_gpt2.tools.resources.cgroup import Cgroup, read_cgroup
from ds_gpt2.tools.resources.gpus import open_gpus

NOBODY = 65_534


@pytest.fixture
def settings(tmp_path: Path, write_config: Callable[..., Path]) -> Settings:
    return load_settings(write_config(tmp_path))


def changed(settings: Settings, **sections: dict[str, Any]) -> Settings:
    """``settings`` with some values of some sections replaced, unchecked."""
    parts = {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    return settings.model_copy(update=parts)


def preset(name: str, **overrides: object) -> Settings:
    """The settings that come along, some of them changed."""
    texts = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return load_settings(PROJECT / "ds_configs" / f"{name}.yaml", texts)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere; nobody may not."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_look_that_breaks_is_a_row_and_hides_no_other() -> None:
    def broken() -> Finding:
        raise PermissionError(13, "Permission denied", "/dev/kmsg")

    looks = [Check("machine", "kernel log", broken), Check("machine", "time", lambda: Finding("time", "ok", "noon"))]
    rows = [row for check in looks for row in examine(check)]
    assert [(row.name, row.status) for row in rows] == [("kernel log", "unknown"), ("time", "ok")]
    assert rows[0].found == "could not be looked at: [Errno 13] Permission denied: '/dev/kmsg'"
    assert in_one_line(Finding("room", "fail", "1 GB free", "make room")) == "room: 1 GB free; make room"
    assert in_one_line(rows[1]) == "time: noon"


@pytest.mark.parametrize("name", ["quickstart", "gpt2_124m", "gpt2_1558m"])
def test_parameters_are_counted_without_building_the_model(name: str) -> None:
    chosen = preset(name)
    with torch.device("meta"):
        model = GPT2(ModelShape(*chosen.model.shape, chosen.batch.sequence_length))
    assert requirements.parameters(chosen) == count_parameters(model)


def test_room_that_the_settings_ask_for() -> None:
    chosen = preset("gpt2_124m", checkpoint__keep_last=3, checkpoint__min_free_gb=0)
    full = requirements.checkpoint_bytes(chosen)
    asked = requirements.storage(chosen, steps=95_365, epochs=5.0)
    assert (asked.checkpoint, asked.most, asked.least) == (full, (3 + 5 + 1 + 1) * full, 4 * full)
    assert requirements.storage(chosen, steps=500, epochs=0.02).most == (2 + 1 + 1) * full  # no more saves than two
    thrifty = {"checkpoint__keep_last": 3, "checkpoint__min_free_gb": 0, "checkpoint__keep_epochs": 2}
    weights = requirements.storage(preset("gpt2_124m", checkpoint__epochs_as="weights", **thrifty), 95_365, 5.0)
    assert weights.most == (3 + 1 + 1) * full + 2 * 4 * requirements.parameters(chosen)
    for_good = requirements.storage(preset("gpt2_124m", checkpoint__keep_every=10_000, **thrifty), 95_365, 0.0)
    assert for_good.most == (3 + 9 + 1 + 1) * full


def test_room_on_the_disk_against_what_is_needed(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    gigabyte = 10**9
    assert disk.room(tmp_path, requirements.Storage(gigabyte, 3, gigabyte, gigabyte)).status == "ok"
    early = disk.room(tmp_path, requirements.Storage(gigabyte, 9, free + 2 * gigabyte, gigabyte))
    assert (early.status, "set checkpoint.keep_last=" in early.fix) == ("warn", True)
    assert int(early.fix.split("keep_last=")[1]) in (5, 6, 7)  # others write to this disk meanwhile
    full = disk.room(tmp_path / "not" / "yet", requirements.Storage(gigabyte, 9, free + gigabyte, free + gigabyte))
    assert full.status == "fail"
    assert "make room" in full.fix


def test_what_the_run_has_saved_already_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    os.link(tmp_path / "file", tmp_path / "linked")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    row = disk.room(tmp_path, requirements.Storage(1_000_000, 3, 4_000_000, 4_000_000))
    assert (row.status, "1.0 MB free, 3.0 MB taken by the run already" in row.found) == ("ok", True)
    assert disk.room(tmp_path, requirements.Storage(1_000_000, 3, 4_000_001, 4_000_001)).status == "fail"


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        shut = Path(name)
        shut.chmod(0o555)
        with unprivileged():
            rows = disk.directories([shut / "run", shut / "run", shut / "other"])
        assert [(row.name, row.status) for row in rows] == [("directory run", "fail"), ("directory other", "fail")]
        assert rows[0].found == f"{shut}: Permission denied"
    (tmp_path / "a file").touch()
    assert [row.status for row in disk.directories([tmp_path / "a file"])] == ["fail"]
    assert [row.status for row in disk.directories([tmp_path / "new" / "run"])] == ["ok"]
    impossible = [tmp_path / ("x" * 300), tmp_path / "a file" / "x", tmp_path / ("x" * 300) / "y"]
    assert [row.status for row in disk.directories(impossible)] == ["fail"] * 3
    assert not (tmp_path / "new").exists()


def test_who_may_not_even_look_is_told_so(settings: Settings, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        shut = Path(name)
        shut.chmod(0)
        places = {"run": {"dir": shut / "runs"}, "checkpoint": {"dir": shut / "ckpt"}, "data": {"dir": shut / "data"}}
        hidden = changed(settings, **places)
        with unprivileged():  # a few looks only: what Python imports meanwhile, nobody might not read
            looks = [check for check in checks(hidden, "cpu", 2) if check.name in ("directories", "room", "data")]
            rows = [row for check in looks for row in examine(check)]
    assert {row.name: row.status for row in rows} == {
        "directory test": "fail",
        "directory tensorboard": "fail",
        "room": "ok",
        "data": "fail",
    }
    assert "Permission denied" in rows[0].found and "Permission denied" in rows[-1].found


@pytest.mark.parametrize(
    ("mount", "status", "word"),
    [
        ("/dev/sda1 PLACE ext4 rw,relatime 0 0", "ok", "ext4 on"),
        ("/dev/sda1 PLACE ext4 ro,relatime 0 0", "fail", "read-only"),
        ("nas:/home PLACE nfs4 rw,vers=4.2 0 0", "warn", "network"),
        ("me@far:/ PLACE fuse.sshfs rw 0 0", "warn", "network"),
        ("bucket PLACE fuse.s3fs rw 0 0", "fail", "object store"),
        ("tmpfs PLACE tmpfs rw 0 0", "warn", "in memory"),
        ("overlay PLACE overlay rw 0 0", "warn", "container"),
    ],
)
def test_kinds_of_file_systems(tmp_path: Path, mount: str, status: str, word: str) -> None:
    place = tmp_path / "my disk"
    place.mkdir()
    mounts = tmp_path / "mounts"
    escaped = str(place).replace(" ", "\\040")
    mounts.write_text(f"/dev/root / xfs rw 0 0\n{mount.replace('PLACE', escaped)}\n")
    row = disk.file_system(place / "checkpoints" / "run", mounts)
    assert (row.status, word in row.found) == (status, True)
    assert disk.file_system(tmp_path, mounts).found == "xfs on /, local"


def test_memory_is_no_home_for_checkpoints() -> None:
    assert disk.file_system(Path("/dev/shm")).status == "warn"


def test_what_a_commit_does_is_tried_for_real(tmp_path: Path) -> None:
    assert [row.status for row in disk.operations(tmp_path / "run")] == ["ok"]
    assert disk.quota(tmp_path, requirements.Storage(1, 1, 1, 1)).status == "ok"
    assert disk.inodes(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_the_disk_is_timed_and_nothing_stays(tmp_path: Path) -> None:
    seen = disk.measure(tmp_path, most_bytes=32 << 20, seconds=1.0)
    assert 16 << 20 <= seen.written <= 32 << 20
    assert 0 < seen.sync_seconds <= seen.worst_sync_seconds < 10
    assert list(tmp_path.iterdir()) == []


def backup_row(settings: Settings, to: str) -> Finding:
    backup = settings.checkpoint.backup.model_copy(update={"to": to})
    wanted = changed(settings, checkpoint={"backup": backup})
    (check,) = [check for check in checks(wanted, "cpu", 1) if check.name == "backup"]
    (row,) = examine(check)
    return row


def test_the_backup_is_written_to_read_and_cleaned_up(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    row = backup_row(settings, "memory://nas")
    assert (row.status, row.found) == ("ok", "memory://nas/test: a file was written, read back and deleted")
    assert MemoryFileSystem.store == {}

    def refuse(self: object, data: bytes) -> int:
        raise PermissionError("403 for sesame-sesame")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-sesame")
    with monkeypatch.context() as patched:
        patched.setattr(MemoryFile, "write", refuse)
        row = backup_row(settings, "memory://nas")
    assert (row.status, row.found) == ("fail", "memory://nas/test: 403 for ***")
    assert "check that the directory or bucket exists" in row.fix
    assert MemoryFileSystem.store == {}


def test_a_backup_that_does_not_answer_does_not_hold_up_the_doctor(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ds_gpt2.tools.doctor.checks._BACKUP_SECONDS", 0.2)
    monkeypatch.setattr(MemoryFile, "write", lambda self, data: time.sleep(3))
    begun = time.monotonic()
    row = backup_row(settings, "memory://nas")
    assert (row.status, row.found) == ("fail", "memory://nas/test: no answer within 0.2 s")
    assert time.monotonic() - begun < 2


def test_speed_is_told_as_the_time_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "measure", lambda _: disk.Speed(200_000_000, 2.0, 0.001, 0.002))  # 100 MB/s
    write, sync = disk.speed(tmp_path, 1_000_000_000, 0.0, between_saves=60.0)
    assert write.found == "200.0 MB at 100 MB/s; a checkpoint takes 10.0 s, one is due every 60.0 s"
    assert (write.status, sync.status) == ("ok", "ok")
    assert disk.speed(tmp_path, 1_000_000_000, 0.0, between_saves=15.0)[0].status == "warn"
    limited = disk.speed(tmp_path, 1_000_000_000, 2_000_000.0, between_saves=None)[0]
    assert (limited.status, "takes 500.0 s at 2 MB/s" in limited.found) == ("warn", True)


def under_limits(code: str, *limit: str) -> list[dict[str, str]]:
    """Rows of ``code`` in a process of its own, as nobody, with ``limit`` lowered: ``RLIMIT_NOFILE=100``."""
    lowered = "".join(
        f"resource.setrlimit(resource.{name}, ({value}, {value}))\n"
        for name, value in (word.split("=") for word in limit)
    )
    program = (
        "import json, os, resource\nfrom dataclasses import asdict\nfrom ds_gpt2.tools.doctor import limits\n"
        f"{lowered}if os.geteuid() == 0:\n    os.setuid({NOBODY})\n"
        f"rows = {code}\nprint(json.dumps([asdict(row) for row in (rows if isinstance(rows, list) else [rows])]))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("code", "limit", "expected"),
    [
        ("limits.open_files(4, 100)", "RLIMIT_NOFILE=200", {"open files": "fail"}),
        ("limits.open_files(4, 100)", "RLIMIT_NOFILE=300", {"open files": "ok"}),
        ("limits.cpu_time()", "RLIMIT_CPU=3600", {"CPU time": "warn"}),
        ("limits.cpu_time()", "RLIMIT_CPU=300", {"CPU time": "fail"}),
        ("limits.processes(4)", "RLIMIT_NPROC=400", {"processes": "fail"}),
        ("limits.sizes(10**9)", "RLIMIT_FSIZE=1500000000", {"file size": "fail"}),
        ("limits.sizes(10**6)", "RLIMIT_FSIZE=1500000000", {"file size": "ok"}),
        ("limits.sizes(10**6)", "RLIMIT_AS=30000000000", {"address space": "warn"}),
    ],
)
def test_limits_on_processes(code: str, limit: str, expected: dict[str, str]) -> None:
    rows = under_limits(code, limit)
    assert {row["name"]: row["status"] for row in rows} == expected
    assert all(bool(row["fix"]) == (row["status"] != "ok") for row in rows)


def test_the_end_of_a_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    job = {"SLURM_JOB_ID": "7"}
    assert limits.time_limit({}, now).status == "ok"
    told = limits.time_limit({**job, "SLURM_JOB_END_TIME": "1800086400"}, now)
    assert (told.status, "in 1d" in told.found) == ("warn", True)
    assert limits.time_limit({**job, "SLURM_JOB_END_TIME": "1800000300"}, now).status == "fail"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert limits.time_limit(job, now).status == "unknown"
    (tmp_path / "squeue").write_text("#!/bin/sh\n[ \"$*\" = '-h -j 7 -o %L' ] && echo 1-02:03:04\n")
    (tmp_path / "squeue").chmod(0o755)
    assert "in 1d 2h" in limits.time_limit(job, now).found
    assert [limits.parse_time_left(text) for text in ("12:34", "1:00:00", "UNLIMITED")] == [754.0, 3600.0, None]


def test_a_terminal_that_takes_the_run_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.signal, "getsignal", lambda _: signal.SIG_DFL)  # the tests' own may be under nohup
    over_ssh = {"SSH_CONNECTION": "10.0.0.2 50000 10.0.0.1 22"}
    alone = limits.terminal(over_ssh, ["tmux", "systemd-run"])
    assert (alone.status, "`tmux new -s gpt2 ./launch.sh train ...`" in alone.fix) == ("warn", True)
    assert "nohup" in limits.terminal(over_ssh, []).fix
    assert limits.terminal({**over_ssh, "TMUX": "/tmp/tmux-0/default,1,0"}, ["tmux"]).status == "ok"
    assert limits.terminal({}, []).status == "ok"
    monkeypatch.setattr(limits.signal, "getsignal", lambda _: signal.SIG_IGN)
    assert "nohup" in limits.terminal(over_ssh, []).found


def test_systemd_that_kills_at_logout(tmp_path: Path) -> None:
    session = {"XDG_SESSION_ID": "3"}
    (tmp_path / "etc/systemd/logind.conf.d").mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf").write_text("[Login]\n#KillUserProcesses=yes\n")
    assert limits.logout(session, "me", tmp_path).status == "ok"
    (tmp_path / "etc/systemd/logind.conf.d/50-site.conf").write_text("[Login]\nKillUserProcesses = yes\n")
    assert limits.logout(session, "me", tmp_path).status == "warn"
    assert limits.logout({}, "me", tmp_path).status == "ok"
    (tmp_path / "var/lib/systemd/linger").mkdir(parents=True)
    (tmp_path / "var/lib/systemd/linger/me").touch()
    assert limits.logout(session, "me", tmp_path).status == "ok"


def test_reboots_that_wait_or_come_by_themselves(tmp_path: Path) -> None:
    assert [row.status for row in limits.reboots(True, tmp_path)] == ["ok"]
    apt = tmp_path / "etc/apt/apt.conf.d"
    apt.mkdir(parents=True)
    (apt / "20auto-upgrades").write_text('APT::Periodic::Unattended-Upgrade "1";\n')
    (apt / "50unattended-upgrades").write_text('//Unattended-Upgrade::Automatic-Reboot "true";\n')
    assert [row.status for row in limits.reboots(False, tmp_path)] == ["ok"]
    assert "GPU driver" in limits.reboots(True, tmp_path)[0].found
    (apt / "60mine").write_text('Unattended-Upgrade::Automatic-Reboot "true";\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/reboot-required").touch()
    assert [row.name for row in limits.reboots(False, tmp_path)] == ["reboot", "updates"]


def test_limits_of_a_container(tmp_path: Path) -> None:
    """Version 2: the tightest on the way up counts, and a file's pages in memory are no use of it."""
    inner = tmp_path / "system.slice" / "docker-1.scope"
    inner.mkdir(parents=True)
    (tmp_path / "system.slice" / "memory.max").write_text("8000000000\n")
    (tmp_path / "system.slice" / "memory.current").write_text("6000000000\n")
    (tmp_path / "system.slice" / "memory.stat").write_text("anon 1\nactive_file 500000000\ninactive_file 1500000000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("6000000000\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    (inner / "pids.max").write_text("100\n")
    (inner / "pids.current").write_text("40\n")
    found = read_cgroup(tmp_path, "0::/system.slice/docker-1.scope\n")
    assert found == Cgroup(memory=4_000_000_000, cores=1.5, tasks=60)
    assert memory.host(3_900_000_000, found).status == "warn"
    assert memory.host(4_100_000_000, found).status == "fail"
    assert memory.tasks(4, found).status == "fail"
    few = Cgroup(None, 0.5, None)
    assert (memory.cores("cpu", 4, few).status, "grants 0.5" in memory.cores("cpu", 4, few).found) == ("warn", True)


def test_limits_of_an_older_container(tmp_path: Path) -> None:
    """Version 1, seen from within: the path of the group does not exist there."""
    for folder in ("memory", "cpu,cpuacct"):
        (tmp_path / folder).mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("2000000000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("500000000\n")
    (tmp_path / "cpu,cpuacct/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu,cpuacct/cpu.cfs_period_us").write_text("100000\n")
    found = read_cgroup(tmp_path, "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    assert found == Cgroup(memory=1_500_000_000, cores=None, tasks=None)
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_cgroup(tmp_path, "4:memory:/docker/abc\n").memory is None


def test_shared_memory(tmp_path: Path) -> None:
    assert memory.shared_memory("cuda", tmp_path / "gone").status == "fail"
    assert memory.shared_memory("cpu").status == "ok"
    assert "--shm-size" in memory.shared_memory("cuda", Path("/proc")).fix  # a file system of no size


def test_how_memory_runs_out(tmp_path: Path) -> None:
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "sys/vm/overcommit_memory").write_text("0\n")
    (tmp_path / "self/oom_score_adj").write_text("200\n")
    assert "oom_score_adj 200" in memory.swap(tmp_path).found
    (tmp_path / "sys/vm/overcommit_memory").write_text("2\n")
    assert "vm.overcommit_memory=0" in memory.swap(tmp_path).fix
    assert memory.swap().status in ("ok", "warn")


def test_a_port_that_somebody_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for row in (network.tensorboard_port(port), network.deepspeed_port(port)):
            assert (row.name, row.status) == (f"port {port}", "warn")
            assert f"by process {os.getpid()}" in row.found
    assert network.tensorboard_port(port).status == "ok"
    assert network.loopback().status == "ok"


def test_a_clock_that_is_behind(tmp_path: Path) -> None:
    now = time.time()
    for name, age in (("old", 86_400), ("new", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    files = [tmp_path / "old", tmp_path / "new", tmp_path / "gone"]
    assert clock.not_behind(files, now).status == "ok"
    behind = clock.not_behind(files, now - 7200)
    assert behind.status == "warn"
    assert f"{tmp_path / 'new'} is from 1h 59m later" in behind.found
    assert clock.synchronised().status in ("ok", "warn")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """What looks like a rank: a train.py of its own, which only waits."""
    file = tmp_path / "train.py"
    file.write_text("import sys, time\nprint('up', flush=True)\ntime.sleep(600)\n")
    return file


@contextlib.contextmanager
def waiting(*command: str | Path, cwd: Path | None = None) -> Iterator[int]:
    """A process that has said something and waits; its id."""
    words = [sys.executable, "-u", *map(str, command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=cwd) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def test_ranks_of_this_and_other_runs_are_found(script: Path, settings: Settings) -> None:
    with (
        waiting(script, "--local_rank=0", "--config", "x/mine.yaml", "run.name=test") as mine,
        waiting("train.py", "--local_rank=0", "--config", "runs/other/config.yaml", cwd=script.parent) as other,
        waiting("-c", "import time; print('up', flush=True); time.sleep(600)", script),
    ):
        found = processes.find_ranks(script)
        assert {rank.pid: rank.run for rank in found} == {mine: "test", other: "other"}
        this, others = processes.this_run(settings, found), processes.other_runs(settings, found)
        assert (this.status, f"kill -TERM {mine}`" in this.fix) == ("fail", True)
        assert (others.status, f"processes {other} train other" in others.found) == ("warn", True)
        settings.run_dir.mkdir(parents=True)
        SupervisorRecord(1, 0.0, socket.gethostname(), "running", 1, group=mine).write(settings.run_dir)
        assert "outlived their supervisor" in processes.this_run(settings, found).found
        assert processes.this_run(settings, found).status == "warn"
    assert processes.find_ranks(script) == []
    assert processes.run_of(["python", "train.py", "--run_name", "n", "--config", "a.yaml"]) == "n"


def test_a_run_that_is_locked_or_supervised_is_not_free(settings: Settings) -> None:
    settings.checkpoint_dir.mkdir(parents=True)
    settings.run_dir.mkdir(parents=True)
    assert processes.this_run(settings, []).status == "ok"
    with lock(settings.checkpoint_dir / "lock", "it"):
        row = processes.this_run(settings, [])
        assert (row.status, f"process {os.getpid()} on" in row.found) == ("fail", True)
    assert processes.this_run(settings, []).status == "ok"
    me = psutil.Process()
    SupervisorRecord(me.pid, me.create_time(), socket.gethostname(), "running", 4).write(settings.run_dir)
    assert processes.this_run(settings, []).status == "fail"
    SupervisorRecord(me.pid, me.create_time(), "another host", "running", 4).write(settings.run_dir)
    assert processes.this_run(settings, []).status == "warn"


@pytest.fixture
def copied(dataset_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_dir, tmp_path / "data"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[HEADER_BYTES + 1000] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_the_data_is_found(copied: Path) -> None:
    dataset = open_dataset(copied)
    assert data.checksums(dataset).status == "ok"
    flip(copied / dataset.shards[0].file)
    row = data.checksums(open_dataset(copied))
    assert (row.status, dataset.shards[0].file in row.found) == ("fail", True)
    (copied / "dataset.json").unlink()
    assert data.checksums(open_dataset(copied)).status == "unknown"


def test_data_for_the_whole_run(dataset_dir: Path, settings: Settings) -> None:
    dataset = open_dataset(dataset_dir)
    steps, epochs = data.schedule(dataset, settings)
    windows = sum((shard.tokens - 1) // 64 for shard in dataset.split("train"))
    assert (steps, epochs) == (12, pytest.approx(12 * 16 / windows))
    whole = changed(settings, schedule={"steps": None, "epochs": 1.5})
    plan = plan_batch(1024, 2, 64, 2)
    trained = TrainingData(Windows(dataset, "train", 64), plan, 0, 1, torch.device("cpu"))
    assert data.schedule(dataset, whole)[0] == trained.steps_for(1.5)
    assert [(row.name, row.status) for row in data.windows(dataset, settings)] == [
        ("validation", "ok"),
        ("epochs", "ok"),
    ]

    def status(**sections: dict[str, Any]) -> list[str]:
        return [row.status for row in data.windows(dataset, changed(settings, **sections))]

    assert status(batch={"sequence_length": 1_000_000}) == ["fail", "fail"]
    assert status(schedule={"steps": 100_000}) == ["ok", "warn"]
    assert status(schedule={"steps": None, "epochs": 0.01}) == ["ok", "fail"]  # all of it warm-up
    assert status(batch={"tokens_per_step": 1_024_000}) == ["ok", "warn"]


def test_no_data_is_one_row(settings: Settings, tmp_path: Path) -> None:
    gone = changed(settings, data={"dir": tmp_path / "gone"})
    rows = [row for check in checks(gone, "cpu", 2) if check.group == "data" for row in examine(check)]
    assert [(row.name, row.status) for row in rows] == [("data", "fail"), ("HellaSwag", "ok")]
    assert f"prepare text FILE... --out {tmp_path}" in rows[0].found


def test_hellaswag(tmp_path: Path) -> None:
    wanted = preset("gpt2_124m", hellaswag__path=tmp_path / "items.jsonl").hellaswag
    assert "prepare hellaswag" in data.hellaswag(wanted).fix
    wanted.path.write_text("no item\n")
    assert (data.hellaswag(wanted).status, "not JSON" in data.hellaswag(wanted).found) == ("warn", True)
    assert data.hellaswag(preset("quickstart").hellaswag).status == "ok"


def test_what_compiling_needs_is_asked_for_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert [software.compiler(wanted, "cpu").status for wanted in ("auto", False, True)] == ["ok", "ok", "fail"]
    assert "no C++ compiler (no-such-compiler)" in software.compiler(True, "cpu").found
    monkeypatch.setenv("CXX", sys.executable)
    assert software.compiler(True, "cpu").status == "ok"


def test_packages_against_their_ranges(tmp_path: Path) -> None:
    assert [row.status for row in software.versions()] == ["ok"]
    assert software.tensorboard().status == "ok"
    ranges = 'requires-python = ">=3.99"\ndependencies = [\n  "torch>=99",\n  "no-such-package>=1",\n  "numpy",\n]\n'
    (tmp_path / "pyproject.toml").write_text(ranges)
    rows = software.versions(tmp_path / "pyproject.toml")
    assert [(row.name, row.status) for row in rows] == [
        ("Python", "fail"),
        ("torch", "warn"),
        ("no-such-package", "fail"),
    ]


class NVMLError(Exception):
    """As the library's own."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


def nvml(**answers: Any) -> Any:
    """A machine without a GPU has no answers to give: these are of two that are well, but for ``answers``."""

    def not_supported(*_: object) -> None:
        raise NVMLError(3)

    well = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-one": 1}[uuid],
        "nvmlDeviceGetName": lambda gpu: "RTX 4090",
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=24e9, free=23.5e9, used=0.5e9),
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [],
        "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, since: 0,
        "nvmlDeviceGetRemappedRows": not_supported,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x4,  # the power cap: no trouble
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 41,
        "nvmlDeviceGetTemperatureThreshold": lambda gpu, kind: 90,
        "nvmlDeviceGetPersistenceMode": lambda gpu: 1,
        "nvmlSystemGetCudaDriverVersion": lambda: 12_040,
        "nvmlSystemGetDriverVersion": lambda: "550.54",
    }
    constants = {
        "NVMLError": NVMLError,
        "NVML_ERROR_NOT_SUPPORTED": 3,
        "NVML_ERROR_LIB_RM_VERSION_MISMATCH": 18,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_VOLATILE_ECC": 0,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN": 1,
    }
    return SimpleNamespace(**{**well, **constants, **answers})


LOOKS: dict[str, Callable[[Any, list[Any]], Finding]] = {
    "count": lambda library, two: gpus.count(library, two, 2),
    "memory": lambda library, two: gpus.memory(library, two, 2 * 10**9),
    "others": gpus.others,
    "errors": gpus.errors,
    "remapped": gpus.remapped,
    "slowed": gpus.slowed,
    "temperature": gpus.temperature,
    "persistence": gpus.persistence,
}


@pytest.mark.parametrize("look", LOOKS)
def test_two_gpus_that_are_well(look: str) -> None:
    row = LOOKS[look](nvml(), [0, 1])
    assert (row.status, row.fix) == ("ok", "")


@pytest.mark.parametrize(
    ("look", "question", "answer", "status", "word"),
    [
        ("count", "nvmlDeviceGetName", ["RTX 4090", b"RTX 3090"].__getitem__, "warn", "1 x RTX 3090"),
        ("memory", "nvmlDeviceGetMemoryInfo", 1.5e9, "fail", "1.50 GB free of 24.00 GB"),
        ("memory", "nvmlDeviceGetMemoryInfo", 20e9, "warn", "GPU 0 1 already in use"),
        ("others", "nvmlDeviceGetComputeRunningProcesses", os.getpid(), "warn", f"{os.getpid()} ("),
        ("errors", "nvmlDeviceGetTotalEccErrors", lambda gpu, kind, since: 2 * gpu, "warn", "GPU 1: 2"),
        ("remapped", "nvmlDeviceGetRemappedRows", lambda gpu: (0, 1, 0, gpu), "fail", "GPU 1 has no spare"),
        ("remapped", "nvmlDeviceGetRemappedRows", lambda gpu: (0, 1, gpu, 0), "warn", "GPU 1 waits"),
        ("slowed", "nvmlDeviceGetCurrentClocksThrottleReasons", lambda gpu: 0x44 * gpu, "warn", "GPU 1: heat"),
        ("temperature", "nvmlDeviceGetTemperature", lambda gpu, sensor: 80, "warn", "80 C of 90"),
        ("persistence", "nvmlDeviceGetPersistenceMode", lambda gpu: 0, "warn", "loads the driver anew"),
    ],
)
def test_gpus_that_are_not_well(look: str, question: str, answer: Any, status: str, word: str) -> None:
    answers = {
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=24e9, free=answer, used=24e9 - answer),
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [SimpleNamespace(pid=answer)],
    }
    row = LOOKS[look](nvml(**{question: answers.get(question, answer)}), [0, 1])
    assert (row.status, word in row.found, bool(row.fix)) == (status, True, True), row


def test_which_gpus_and_whether_there_are_enough() -> None:
    assert open_gpus(nvml(), "", 4) == [0, 1]
    assert open_gpus(nvml(), "1,0", 1) == [1]
    assert open_gpus(nvml(), "GPU-one", 1) == [1]
    assert gpus.count(nvml(), [0, 1], 4).status == "fail"


def test_a_driver_that_does_not_answer() -> None:
    def fails(code: int) -> Callable[[], None]:
        def init() -> None:
            raise NVMLError(code)

        return init

    assert gpus.driver(nvml()) is None
    updated, absent = gpus.driver(nvml(nvmlInit=fails(18))), gpus.driver(nvml(nvmlInit=fails(12)))
    assert updated is not None and (updated.status, "reboot" in updated.fix) == ("fail", True)
    assert absent is not None and absent.status == "unknown"


@pytest.mark.parametrize(
    ("driver", "built_for", "status"),
    [
        (12_040, "12.4", "ok"),
        (13_000, "12.8", "ok"),
        (12_040, "12.8", "warn"),
        (12_080, "13.0", "fail"),
        (1, None, "fail"),
    ],
)
def test_the_drivers_cuda_against_torchs(driver: int, built_for: str | None, status: str) -> None:
    assert gpus.versions(nvml(nvmlSystemGetCudaDriverVersion=lambda: driver), built_for).status == status


def test_a_gpu_that_lies_idle(tmp_path: Path) -> None:
    assert gpus.unused("cpu", 4, tmp_path).status == "ok"
    (tmp_path / "nvidia0").touch()
    assert gpus.unused("cpu", 4, tmp_path).status == "warn"


def test_the_kernels_log() -> None:
    lines = [
        (10.0, "NVRM: Xid (PCI:0000:65:00): 31, pid=1234, name=python, Ch 00000008"),
        (20.0, "Out of memory: Killed process 77 (python)"),
        (4000.0, "NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', GPU has fallen off the bus."),
        (4100.0, "I/O error, dev nvme0n1, sector 2048 op 0x0:(READ)"),
        (4200.0, "usb 1-1: new high-speed USB device"),
    ]
    xid = gpus.xids(lines, uptime=7600.0)
    assert xid.status == "warn"
    assert "1 x 79 (fell off the bus: power, heat or the slot); the last 1h ago" in xid.found
    trouble = gpus.kernel_log(lines, uptime=7600.0)
    assert trouble.found == "out of memory: 1, 2h 6m ago, disk errors: 1, 58m 20s ago"
    assert gpus.xids(lines[-1:], 7600.0).status == gpus.kernel_log(lines[-1:], 7600.0).status == "ok"
    row = examine(Check("machine", "kernel log", lambda: gpus.kernel_log(gpus.read_kernel_log(), 1.0)))[0]
    assert row.status in ("ok", "warn", "unknown")  # not every user may read it


def test_ranks_that_hang_are_ended(script: Path) -> None:
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[-1]) / f'rank_{os.environ[\"RANK\"]}.json'\n"
        "file.write_text(json.dumps({'phase': 'joining'}))\ntime.sleep(600)\n"
    )
    rows = ranks.round_trip(RankLayout("cpu", 2), seconds=6.0, script=script)
    assert [(row.name, row.status) for row in rows] == [("ranks", "fail")]
    state = "(does not meet the others|was not started)"  # the latter where the machine is busy
    assert re.fullmatch(f"not done after 6 s, ended: rank 0 {state}, rank 1 {state}", rows[0].found)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(script) in command for command in commands)


def test_ranks_that_cannot_meet_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    rows = ranks.round_trip(RankLayout("cpu", 1))
    assert [(row.name, row.status) for row in rows] == [("ranks", "fail")]
    assert "nosuch0" in rows[0].found
    assert "GLOO_SOCKET_IFNAME" in rows[0].fix


def run(*words: str | Path) -> int:
    """The verb, as the command line starts it."""
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    options, rest = parser.parse_known_args([str(word) for word in words])
    options.settings += rest
    return doctor.run(options)


def test_all_of_it_and_a_fail_is_exit_2(
    tmp_path: Path, copied: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "folder", data={"dir": str(copied)})
    flip(copied / open_dataset(copied).shards[0].file)
    assert run(config, "--num_gpus", "2", "--json") == exit_report.MISTAKE
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows if row["status"] == "fail"] == ["checksums"]
    assert {row["group"] for row in rows} >= {"settings", "disk", "data", "memory", "limits", "machine", "network"}
    of_ranks = [row for row in rows if row["group"] == "ranks"]
    assert [row["name"] for row in of_ranks] == ["ranks", "rank 0", "rank 1"]
    told = r"4 bytes in [\d.]+ ms, 1 MiB at [\d.]+ GB/s, 16 MiB at [\d.]+ GB/s on the bus"
    assert all(re.fullmatch(told, row["found"]) for row in of_ranks[1:])
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["run.yaml"]


def test_what_a_person_sees(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert run(config, "--quick") == exit_report.DONE
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= doctor.WIDTH
    assert re.fullmatch(r"\d+ ok.*: ready, as far as can be told.*", lines[-1])
    assert "memory" in lines and not any(line.startswith("  FAIL") for line in lines)
    assert run(config, "--quick", "checkpoint.min_free_gb=1e9") == exit_report.MISTAKE
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("  FAIL room "))
    assert any(line.strip().startswith("-> at least") for line in lines[at : at + 3])
    assert "1 FAIL: not ready; fix what says FAIL" in lines[-1]


def test_a_run_that_cannot_choose_its_ranks_is_a_row_too(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    code = run(config, "--quick", "--json", "run.device=cuda", "--num_gpus", "4096")
    rows = json.loads(capsys.readouterr().out)
    assert (code, rows[0]["name"], rows[0]["status"]) == (exit_report.MISTAKE, "device", "fail")
    assert len(rows) > 10


def test_a_wide_row_is_wrapped_under_itself() -> None:
    row = Finding("a name that is rather long", "warn", "found " * 40, "fix " * 40)
    lines = doctor.lines_of(row)
    assert max(map(len, lines)) <= doctor.WIDTH
    assert lines[0].startswith("  warn a name that is rather long found")
    assert next(line for line in lines if "->" in line).strip().startswith("-> fix")


def test_what_train_looks_at_takes_no_time_and_no_torch(settings: Settings, tmp_path: Path) -> None:
    names = {row.name for row in quick(settings, "cpu", 4)}
    assert names >= {
        "room",
        "directories",
        "open files",
        "shared memory",
        "memory",
        "time limit",
        "this run",
        "loopback",
    }
    assert not names & {"checksums", "ranks", "write speed", "versions"}
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom ds_gpt2.config.settings import load_settings\n"
        "from ds_gpt2.tools.doctor.checks import quick\n"
        f"settings = load_settings(Path({str(tmp_path / 'run.yaml')!r}))\nbegun = time.process_time()\n"
        "quick(settings, 'cpu', 4), quick(settings, 'cuda', 4)\n"
        "print(time.process_time() - begun, {'torch', 'deepspeed'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    seconds, modules = result.stdout.split(maxsplit=1)
    assert float(seconds) < 1.0
    assert modules == "set()\n"


def test_rows_are_plain_values() -> None:
    assert asdict(Finding("room", "ok", "1 GB free")) == {
        "name": "room",
        "status": "ok",
        "found": "1 GB free",
        "fix": "",
    }
