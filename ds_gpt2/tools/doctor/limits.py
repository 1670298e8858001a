"""Check what could stop a run from outside: process limits, time limits, logout, reboots."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Mapping
from pathlib import Path

import psutil

from ds_gpt2.common.formatting import DAY, HOUR, clock, counted, duration, size
from ds_gpt2.data.shard_reader import MAX_OPEN_FILES
from ds_gpt2.tools.doctor.finding import Finding
from ds_gpt2.tools.doctor.program_output import output_of

_INFINITY = resource.RLIM_INFINITY
_OWN_FILES = 128  # open files of a rank apart from shards and connections: libraries, logs, event files, checkpoints
_FILES_PER_RANK = 16  # connections to each other rank; NCCL opens several
_TASKS_PER_RANK = 128  # threads, including those of the launcher's processes
_SHORT = 600.0  # seconds
_SLURM_TIMEOUT = 1.0  # seconds


def open_files(ranks: int, shards: int) -> Finding:
    """Check the limit on open files. A rank has two readers of shards, for training and validation data."""
    need = min(shards, 2 * MAX_OPEN_FILES) + _OWN_FILES + _FILES_PER_RANK * ranks
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_word(soft)} allowed; a rank may open {need:,} ({shards:,} shards)"
    if soft == _INFINITY or soft >= need:
        return Finding("open files", "ok", found)
    how = f"ulimit -n {2 * need}" if hard == _INFINITY or hard >= 2 * need else f"raise the hard limit above {hard:,}"
    return Finding("open files", "fail", found, f"`{how}` in the shell that starts the run, or in limits.conf")


def processes(ranks: int) -> Finding:
    """Check the limit on processes and threads of this user."""
    need = _TASKS_PER_RANK * ranks
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() == 0 or soft == _INFINITY:
        return Finding("processes", "ok", "no limit" + (" for root" if os.geteuid() == 0 else ""))
    used = _threads_of(os.getuid())
    found = f"{soft:,} allowed, {used:,} in use; {counted(ranks, 'rank')} may have up to {need:,} threads"
    if soft - used < need:
        return Finding("processes", "fail", found, f"`ulimit -u {used + 2 * need}`, or stop other programs")
    return Finding("processes", "ok", found)


def cpu_time() -> Finding:
    """Check the limit on CPU time: it would stop a long run."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if soft == _INFINITY:
        return Finding("CPU time", "ok", "no limit")
    fix = "a rank is killed when it has used that time: `ulimit -t unlimited`, or contact the administrator"
    return Finding("CPU time", "fail" if soft < _SHORT else "warn", f"{duration(soft)} of CPU time per process", fix)


def sizes(largest_file: int) -> list[Finding]:
    """Check the limits on file size, address space, data segment and locked memory.

    Args:
        largest_file: bytes of the largest file of a checkpoint.
    """
    rows = []
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != _INFINITY:
        found = f"{size(soft)} per file; the largest file of a checkpoint has {size(largest_file)}"
        bad = soft < 2 * largest_file
        rows.append(Finding("file size", "fail" if bad else "ok", found, "`ulimit -f unlimited`" if bad else ""))
    for name, letter, number in (
        ("address space", "v", resource.RLIMIT_AS),
        ("data segment", "d", resource.RLIMIT_DATA),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != _INFINITY:
            fix = f"PyTorch reserves more memory than it uses, CUDA far more: `ulimit -{letter} unlimited`"
            rows.append(Finding(name, "warn", f"{size(soft)} per process", fix))
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "no limit" if soft == _INFINITY else f"{size(soft)}, enough without InfiniBand"
    return rows or [Finding("memory limits", "ok", f"none on file size and address space; locked memory: {locked}")]


def time_limit(environment: Mapping[str, str], now: float) -> Finding:
    """Check when the Slurm job ends: from the environment, otherwise from ``squeue``, which may take a second.

    Args:
        now: seconds since 1970.
    """
    name, job = "time limit", environment.get("SLURM_JOB_ID")
    if job is None:
        return Finding(name, "ok", "not in a Slurm job")
    end = environment.get("SLURM_JOB_END_TIME", "")
    seconds = float(end) - now if end.isdigit() else _slurm_time_left(job)
    if seconds is None:
        return Finding(name, "unknown", f"the end of Slurm job {job} is not known", f"see `scontrol show job {job}`")
    found = f"Slurm ends job {job} in {duration(seconds)}, {clock(now + seconds)}"
    fix = "with `#SBATCH --signal=USR1@300` the run saves before the job ends; then `./launch.sh resume`"
    return Finding(name, "fail" if seconds < _SHORT else "warn", found, fix)


def has_time_limit(environment: Mapping[str, str]) -> bool:
    """Return whether the environment contains the end of the Slurm job, or this is not in a Slurm job."""
    return "SLURM_JOB_ID" not in environment or environment.get("SLURM_JOB_END_TIME", "").isdigit()


def parse_time_left(text: str) -> float | None:
    """Return the output of ``squeue -o %L`` (``1-02:03:04``, ``12:34``) in seconds; None if it has no number."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(days * DAY + hours * HOUR + minutes * 60 + seconds)


def terminal(environment: Mapping[str, str], tools: list[str]) -> Finding:
    """Check whether the run continues when its terminal is closed.

    Args:
        tools: which of tmux, screen and systemd-run are installed.
    """
    inside = next((word for word, name in (("tmux", "TMUX"), ("screen", "STY")) if environment.get(name)), None)
    if inside:
        return Finding("terminal", "ok", f"inside {inside}: the run continues after a lost connection")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return Finding("terminal", "ok", "started with nohup: the run continues after the terminal is closed")
    if not environment.get("SSH_CONNECTION"):
        return Finding("terminal", "ok", f"not over ssh; installed: {', '.join(tools) or 'neither tmux nor screen'}")
    start = "./launch.sh train ..."
    fixes = {
        "tmux": f"`tmux new -s gpt2 {start}` (detach: Ctrl+B D; attach: `tmux attach -t gpt2`)",
        "screen": f"`screen -S gpt2 {start}` (detach: Ctrl+A D; attach: `screen -r gpt2`)",
        "systemd-run": f"`systemd-run --user --scope nohup {start} &`",
    }
    fix = next((fixes[tool] for tool in fixes if tool in tools), f"`nohup {start} &`")
    found = "over ssh, outside tmux and screen: a lost connection stops the run (it saves first)"
    return Finding("terminal", "warn", found, fix)


def logout(environment: Mapping[str, str], user: str, root: Path = Path("/")) -> Finding:
    """Check whether systemd-logind kills the processes of a user at logout, including tmux."""
    if not environment.get("XDG_SESSION_ID"):
        return Finding("logout", "ok", "not in a login session of systemd")
    if not kills_at_logout(root):
        return Finding("logout", "ok", "systemd-logind does not kill processes (KillUserProcesses=no)")
    if (root / "var/lib/systemd/linger" / user).exists():
        return Finding("logout", "ok", "KillUserProcesses=yes, but lingering is enabled for this user")
    fix = "`loginctl enable-linger`, then start with `systemd-run --user --scope tmux new -s gpt2`"
    return Finding("logout", "warn", "KillUserProcesses=yes: a logout kills the run, even inside tmux", fix)


def kills_at_logout(root: Path) -> bool:
    """Return ``KillUserProcesses`` of systemd-logind; the default is no on Debian, Ubuntu and Fedora."""
    folders = [root / folder / "systemd" for folder in ("usr/lib", "etc", "run")]
    files = [folder / "logind.conf" for folder in folders]
    drop_ins = [file for folder in folders for file in (folder / "logind.conf.d").glob("*.conf")]
    value = "no"
    for file in [*files, *sorted(drop_ins, key=lambda path: path.name)]:
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            value = (re.findall(r"^\s*KillUserProcesses\s*=\s*(\w+)", text, re.MULTILINE) or [value])[-1]
    return value.lower() in ("yes", "true", "on", "1")


def reboots(gpus: bool, root: Path = Path("/")) -> list[Finding]:
    """Check for a pending reboot, and for updates that could reboot the machine or replace the GPU driver.

    Args:
        gpus: whether the run uses GPUs.
    """
    rows = []
    if any((root / file).exists() for file in ("var/run/reboot-required", "run/reboot-required")):
        fix = "reboot now, before the run: `sudo reboot`"
        rows.append(Finding("reboot", "warn", "an update requires a reboot (/var/run/reboot-required)", fix))
    settings = _apt_settings(root)
    if settings.get("APT::Periodic::Unattended-Upgrade", "0") not in ("0", ""):
        if settings.get("Unattended-Upgrade::Automatic-Reboot", "false").lower() in ("true", "1", "yes"):
            at = settings.get("Unattended-Upgrade::Automatic-Reboot-Time", "now")
            fix = 'set Unattended-Upgrade::Automatic-Reboot "false" in /etc/apt/apt.conf.d, or resume afterwards'
            rows.append(Finding("updates", "warn", f"unattended upgrades may reboot this machine ({at})", fix))
        elif gpus:
            fix = "during the run: `sudo systemctl stop unattended-upgrades apt-daily-upgrade.timer`"
            rows.append(Finding("updates", "warn", "unattended upgrades may replace the GPU driver", fix))
    return rows or [Finding("reboot", "ok", "none pending, and no update reboots automatically")]


def _apt_settings(root: Path) -> dict[str, str]:
    settings: dict[str, str] = {}
    for file in sorted((root / "etc/apt/apt.conf.d").glob("*")):
        if file.is_file():
            text = re.sub(r"(?m)^\s*(//|#).*", "", file.read_text(encoding="utf-8", errors="replace"))
            settings |= dict(re.findall(r'([\w:-]+)\s+"([^"]*)"\s*;', text))
    return settings


def _slurm_time_left(job: str) -> float | None:
    answer = output_of("squeue", "-h", "-j", job, "-o", "%L", timeout=_SLURM_TIMEOUT)
    return None if answer is None else parse_time_left(answer)


def _threads_of(user: int) -> int:
    count = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        if process.info["uids"] is not None and process.info["uids"].real == user:
            count += process.info["num_threads"] or 0
    return count


def _word(limit: int) -> str:
    return "any number" if limit == _INFINITY else f"{limit:,}"
