"""All checks of the doctor, in the order in which they are printed."""

from __future__ import annotations

import getpass
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ds_gpt2.checkpoint.backup.backup import Backup
from ds_gpt2.checkpoint.backup.storage import redacted_reason
from ds_gpt2.checkpoint.catalog import newest_tag
from ds_gpt2.checkpoint.space import reserved_bytes
from ds_gpt2.common.cgroup import read_cgroup
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.run_location import run_argument
from ds_gpt2.config.settings import PROJECT_DIR, Settings
from ds_gpt2.data.sources import Sources, open_sources
from ds_gpt2.monitoring import csv_monitor, tracker_checks
from ds_gpt2.monitoring.pace import recent_step_seconds
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.doctor import (
    clock,
    data,
    disk,
    disk_speed,
    file_system,
    gpus,
    limits,
    memory,
    network,
    processes,
    ranks,
    run_files,
    software,
)
from ds_gpt2.tools.doctor.finding import Check, Finding, failure, run_check
from ds_gpt2.tools.resources import requirements
from ds_gpt2.tools.resources.gpus import open_gpus
from ds_gpt2.tools.resources.machine import existing

_BACKUP_SECONDS = 60.0  # time limit for writing, reading and deleting a small file in the backup
_BACKUP_FIX = "check that the directory or bucket exists, the credentials, the network; or change checkpoint.backup.to"


def quick(settings: Settings, accelerator: str, count: int) -> list[Finding]:
    """Run the checks that take milliseconds; ``train`` runs them before it starts the ranks.

    They neither import torch nor start a program.

    Args:
        accelerator: ``cuda`` or ``cpu``.
        count: number of ranks.
    """
    return [row for check in checks(settings, accelerator, count) if check.quick for row in run_check(check)]


def checks(settings: Settings, accelerator: str, count: int, world_size: int | None = None) -> list[Check]:
    """Return all checks without running them; arguments as for ``quick``.

    Args:
        world_size: ranks on all hosts, if this machine is one of several; they share batch and optimizer state.
    """
    total = world_size or count
    sources = _opened(settings)
    steps, epochs = _schedule(sources, settings)
    storage = requirements.disk_requirement(settings, steps, epochs)
    directory, shards = settings.checkpoint_dir, _shards(sources)
    reserve = reserved_bytes(settings.checkpoint)
    return [
        Check("settings", "DeepSpeed's file", partial(_deepspeed_file, settings)),
        Check("settings", "batch", partial(_batch, settings, total)),
        Check("settings", "run's name", partial(_name, settings)),
        Check("settings", "metrics", partial(run_files.metrics, settings), quick=True),
        Check("settings", "versions", software.versions),
        Check("settings", "TensorBoard", software.tensorboard),
        Check("settings", "compiler", partial(software.compiler, settings.run.compile, accelerator)),
        Check("disk", "directories", partial(disk.directories, settings.output_dirs), quick=True),
        Check("disk", "free space", partial(disk.free_space, directory, storage, reserve), quick=True),
        Check("disk", "space for logs", partial(disk.space_for_logs, settings.run_dir, directory), quick=True),
        Check("disk", "inodes", partial(disk.inodes, directory), quick=True),
        Check("disk", "quota", partial(disk.quota, directory, storage), quick=True),
        Check("disk", "file system", partial(file_system.kind_of_file_system, directory), quick=True),
        Check("disk", "file operations", partial(file_system.operations, directory)),
        Check("disk", "write speed", partial(_speed, settings, count, total)),
        Check("disk", "backup", partial(_backup, settings)),
        Check("data", "data", partial(_data, sources)),
        Check("data", "windows", partial(_windows, sources, settings)),
        Check("data", "checksums", partial(_checksums, sources)),
        Check("data", "HellaSwag", partial(data.hellaswag, settings.hellaswag)),
        *[
            Check("data", name, partial(data.evaluation, name, each))
            for name, each in settings.evaluations.items()
            if each.every
        ],
        *_gpu_checks(settings, accelerator, count, total),
        Check("memory", "memory", partial(_memory, settings, accelerator, count, total), quick=True),
        Check("memory", "shared memory", partial(memory.shared_memory, accelerator), quick=True),
        Check("memory", "cores", lambda: memory.cores(accelerator, count, read_cgroup()), quick=True),
        Check("memory", "swap", memory.swap, quick=True),
        Check("limits", "open files", partial(limits.open_files, count, shards), quick=True),
        Check("limits", "processes", partial(limits.processes, count), quick=True),
        Check("limits", "cgroup tasks", lambda: memory.tasks(count, read_cgroup()), quick=True),
        Check("limits", "memory limits", partial(limits.sizes, requirements.largest_file(settings, total)), quick=True),
        Check("limits", "CPU time", limits.cpu_time, quick=True),
        *_session_checks(),
        Check("limits", "reboot", partial(limits.reboots, accelerator == "cuda")),
        Check("machine", "runs", partial(processes.runs, settings, world_size is not None), quick=True),
        Check("machine", "clock", clock.synchronized),
        Check("machine", "time", partial(_time, settings), quick=True),
        Check("machine", "kernel log", lambda: gpus.kernel_log(gpus.read_kernel_log(), _uptime())),
        Check("network", "loopback", network.loopback, quick=True),
        *_port_checks(),
        Check("ranks", "ranks", partial(ranks.check_ranks, RankLayout(accelerator, count))),
    ]


def supervisor_checks() -> list[Check]:
    """Return the checks that concern only the machine, and the session, in which the supervisor runs."""
    return [*_session_checks(), *_port_checks()]


def _session_checks() -> list[Check]:
    environment = os.environ
    return [
        Check(
            "limits",
            "time limit",
            lambda: limits.time_limit(environment, time.time()),
            quick=limits.has_time_limit(environment),
        ),
        Check("limits", "terminal", lambda: limits.terminal(environment, software.terminal_tools()), quick=True),
        Check("limits", "logout", lambda: limits.logout(environment, getpass.getuser()), quick=True),
    ]


def _port_checks() -> list[Check]:
    return [
        Check("network", "port", network.deepspeed_port),
        Check("network", "port", network.tensorboard_port, quick=True),
    ]


def _gpu_checks(settings: Settings, accelerator: str, count: int, total: int) -> list[Check]:
    if accelerator == "cpu":
        return [Check("GPUs", "GPUs", partial(gpus.unused, accelerator, count), quick=True)]
    try:
        import pynvml
    except ImportError as error:
        absent = Finding("GPU driver", "unknown", f"not queried: {error}", "install nvidia-ml-py")
        return [Check("GPUs", "GPU driver", lambda: absent, quick=True)]
    if (broken := gpus.driver(pynvml)) is not None:
        return [Check("GPUs", "GPU driver", lambda: broken, quick=True)]

    def of_gpus(function: Callable[..., Finding], *arguments: object) -> Callable[[], Finding]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return lambda: function(pynvml, open_gpus(pynvml, visible, count), *arguments)

    return [
        Check("GPUs", "GPUs", of_gpus(gpus.count, count), quick=True),
        Check("GPUs", "GPU memory", of_gpus(gpus.memory, requirements.gpu_memory(settings, total)), quick=True),
        Check("GPUs", "GPU programs", of_gpus(gpus.other_programs), quick=True),
        Check("GPUs", "CUDA", lambda: gpus.versions(pynvml, _torch_cuda())),
        Check("GPUs", "ECC", of_gpus(gpus.ecc_errors)),
        Check("GPUs", "remapped rows", of_gpus(gpus.remapped_rows)),
        Check("GPUs", "throttling", of_gpus(gpus.throttling)),
        Check("GPUs", "temperature", of_gpus(gpus.temperature)),
        Check("GPUs", "persistence", of_gpus(gpus.persistence)),
        Check("GPUs", "Xid", lambda: gpus.xids(gpus.read_kernel_log(), _uptime())),
    ]


def _opened(settings: Settings) -> Sources | UserError:
    try:
        return open_sources(settings.data)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"the data cannot be read: {reason_of(error)}")


def _schedule(sources: Sources | UserError, settings: Settings) -> tuple[int | None, float | None]:
    """Return the steps and epochs of the run; None for what is not known."""
    if isinstance(sources, UserError):
        return settings.schedule.steps, None
    try:
        return data.schedule(sources, settings)
    except UserError:
        return settings.schedule.steps, None


def _shards(sources: Sources | UserError) -> int:
    return 0 if isinstance(sources, UserError) else sum(len(dataset.shards) for dataset in sources.datasets)


def _data(sources: Sources | UserError) -> list[Finding]:
    return [failure("data", sources)] if isinstance(sources, UserError) else data.shards(sources)


def _windows(sources: Sources | UserError, settings: Settings) -> list[Finding]:
    return [] if isinstance(sources, UserError) else data.windows(sources, settings)


def _checksums(sources: Sources | UserError) -> list[Finding]:
    return [] if isinstance(sources, UserError) else [data.checksums(each) for each in sources.datasets]


def _deepspeed_file(settings: Settings) -> Finding:
    try:
        content = load_deepspeed_file(settings.deepspeed)
        csv_monitor.check(content)
        tracker_checks.check(content)
    except UserError as error:
        return failure("DeepSpeed's file", error)
    return Finding("DeepSpeed's file", "ok", f"{settings.deepspeed.name}: ZeRO-2")


def _batch(settings: Settings, count: int) -> Finding:
    batch = settings.batch
    try:
        plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, count)
    except UserError as error:
        return failure("batch", error)
    return Finding("batch", "ok", str(plan))


def _name(settings: Settings) -> Finding:
    name = settings.run.name
    if (tag := newest_tag(settings.checkpoint_dir)) is not None:
        fix = f"`./launch.sh resume {run_argument(settings.run_dir)}` continues it; for a new run set run.name=NAME"
        return Finding("run's name", "warn", f"{name} already has checkpoints, the newest is {tag}", fix)
    return Finding("run's name", "ok", f"{name} has no checkpoints yet: a new run")


def _backup(settings: Settings) -> Finding:
    location = settings.checkpoint.backup.to
    if location is None:
        found = "none configured: if the disk fails, all checkpoints are lost (checkpoint.backup.to)"
        return Finding("backup", "ok", found)
    try:
        backup = Backup(location, settings.run.name, settings.checkpoint.backup, run_dir=settings.run_dir)
        backup.check_exists()
        backup.check_named(settings.checkpoint_dir)
    except UserError as error:
        return failure("backup", error)
    if (problem := _problem_of(backup)) is not None:
        return Finding("backup", "fail", f"{backup.where()}: {problem}", _BACKUP_FIX)
    if backup.shares_disk_with(existing(settings.checkpoint_dir)):
        fix = "if that disk fails, both are lost: use another disk"
        return Finding("backup", "warn", f"{backup.where()} is on the same disk", fix)
    return Finding("backup", "ok", f"{backup.where()}: a file was written, read back and deleted")


def _problem_of(backup: Backup) -> str | None:
    """Return why a file cannot be written, read and deleted in the backup; None if it can."""
    found: list[str] = []

    def probe() -> None:
        try:
            backup.probe()
            found.append("")
        except Exception as error:  # each storage library has its own exceptions
            found.append(redacted_reason(error))

    thread = threading.Thread(target=probe, daemon=True)  # a server or a mounted disk may never answer
    thread.start()
    thread.join(_BACKUP_SECONDS)
    return (found[0] or None) if found else f"no answer within {_BACKUP_SECONDS:g} s"


def _speed(settings: Settings, count: int, total: int) -> list[Finding]:
    limit = count * settings.checkpoint.write_mb_per_s * 1e6
    between = _step_seconds(settings)
    if between is not None:
        between *= settings.checkpoint.every
    part = requirements.checkpoint_bytes(settings) * count // total  # that this machine writes
    return disk_speed.speed(settings.checkpoint_dir, part, limit, between or None)


def _step_seconds(settings: Settings) -> float | None:
    """Return the usual step time that this run has recorded; None if it has recorded none."""
    return recent_step_seconds([record.get("perf/step_ms") for record in read_metrics(settings.run_dir / METRICS)])


def _memory(settings: Settings, accelerator: str, count: int, total: int) -> Finding:
    return memory.host(requirements.host_memory(settings, accelerator, count, total), read_cgroup())


def _time(settings: Settings) -> Finding:
    files = [*PROJECT_DIR.glob("*"), *PROJECT_DIR.glob("ds_gpt2/**/*.py"), settings.run_dir / METRICS]
    return clock.not_behind(files, time.time())


def _uptime() -> float:
    """Return the seconds since boot without suspended time, as in the kernel log."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def _torch_cuda() -> Any:
    import torch

    return torch.version.cuda
