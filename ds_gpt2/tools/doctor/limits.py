"""What may end a run from outside: limits on processes, time limits, the end of a login, a reboot."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from ds_gpt2.common.formatting import clock, counted, duration, size
from ds_gpt2.tools.doctor.row import Finding

_INFINITY = resource.RLIM_INFINITY
_OWN_FILES = 128  # that a rank has open beside shards and connections: libraries, logs, event files, checkpoints
_FILES_PER_RANK = 16  # connections to each other rank, of which NCCL opens several
_TASKS_PER_RANK = 128  # threads, the launcher's processes counted in
_SHORT = 600.0  # seconds
_PATIENCE = 1.0  # seconds that Slurm may take to answer


def open_files(ranks: int, shards: int) -> Finding:
    """A memory-mapped shard stays an open file."""
    need = shards + _OWN_FILES + _FILES_PER_RANK * ranks
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_word(soft)} allowed; a rank may have {need:,} open ({shards:,} shards)"
    if soft == _INFINITY or soft >= need:
        return Finding("open files", "ok", found)
    how = f"ulimit -n {2 * need}" if hard == _INFINITY or hard >= 2 * need else f"raise the hard limit above {hard:,}"
    return Finding("open files", "fail", found, f"`{how}` in the shell that starts the run, or in limits.conf")


def processes(ranks: int) -> Finding:
    """Processes and threads of this user, and of the container."""
    need = _TASKS_PER_RANK * ranks
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() == 0 or soft == _INFINITY:
        return Finding("processes", "ok", "no limit" + (" for root" if os.geteuid() == 0 else ""))
    used = _threads_of(os.getuid())
    found = f"{soft:,} allowed, {used:,} in use; {counted(ranks, 'rank')} may have up to {need:,} threads"
    if soft - used < need:
        return Finding("processes", "fail", found, f"`ulimit -u {used + 2 * need}`, or end what else runs")
    return Finding("processes", "ok", found)


def cpu_time() -> Finding:
    """A limit in CPU seconds ends a long run, however idle the machine."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if soft == _INFINITY:
        return Finding("CPU time", "ok", "no limit")
    fix = "every rank would be killed then: `ulimit -t unlimited`, or ask the administrator"
    return Finding("CPU time", "fail" if soft < _SHORT else "warn", f"{duration(soft)} of CPU time for a process", fix)


def sizes(largest_file: int) -> list[Finding]:
    """Limits on the size of files, of address space and of locked memory."""
    rows = []
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != _INFINITY:
        found = f"{size(soft)} for a file; a checkpoint's largest has {size(largest_file)}"
        bad = soft < 2 * largest_file
        rows.append(Finding("file size", "fail" if bad else "ok", found, "`ulimit -f unlimited`" if bad else ""))
    for name, letter, number in (
        ("address space", "v", resource.RLIMIT_AS),
        ("data segment", "d", resource.RLIMIT_DATA),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != _INFINITY:
            fix = f"PyTorch reserves more than it uses, CUDA far more: `ulimit -{letter} unlimited`"
            rows.append(Finding(name, "warn", f"{size(soft)} for a process", fix))
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "no limit" if soft == _INFINITY else f"{size(soft)}, enough without InfiniBand"
    return rows or [Finding("memory limits", "ok", f"none on files and addresses; locked memory: {locked}")]


def time_limit(environment: Mapping[str, str], now: float) -> Finding:
    """The end of a Slurm job; where the environment does not tell it, Slurm itself is asked.

    Args:
        now: seconds since 1970.
    """
    name, job = "time limit", environment.get("SLURM_JOB_ID")
    if job is None:
        return Finding(name, "ok", "not in a Slurm job")
    end = environment.get("SLURM_JOB_END_TIME", "")
    seconds = float(end) - now if end.isdigit() else _ask_slurm(job)
    if seconds is None:
        return Finding(
            name, "unknown", f"Slurm job {job} does not say when it ends", f"look at `scontrol show job {job}`"
        )
    found = f"Slurm ends job {job} in {duration(seconds)}, {clock(now + seconds)}"
    fix = "`#SBATCH --signal=USR1@300` lets the run save in time; afterwards `./launch.sh resume`"
    return Finding(name, "fail" if seconds < _SHORT else "warn", found, fix)


def parse_time_left(text: str) -> float | None:
    """What ``squeue -o %L`` prints (``1-02:03:04``, ``12:34``) in seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(days * 86_400 + hours * 3600 + minutes * 60 + seconds)


def terminal(environment: Mapping[str, str], tools: list[str]) -> Finding:
    """Whether the run outlives the terminal it is started from.

    Args:
        tools: of tmux, screen and systemd-run, those that are installed.
    """
    inside = next((word for word, name in (("tmux", "TMUX"), ("screen", "STY")) if environment.get(name)), None)
    if inside:
        return Finding("terminal", "ok", f"inside {inside}: the run outlives a lost connection")
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return Finding("terminal", "ok", "started with nohup: the run outlives the terminal")
    if not environment.get("SSH_CONNECTION"):
        return Finding("terminal", "ok", f"not over ssh; installed: {', '.join(tools) or 'neither tmux nor screen'}")
    start = "./launch.sh train ..."
    fixes = {
        "tmux": f"`tmux new -s gpt2 {start}` (away: Ctrl+B D; back: `tmux attach -t gpt2`)",
        "screen": f"`screen -S gpt2 {start}` (away: Ctrl+A D; back: `screen -r gpt2`)",
        "systemd-run": f"`systemd-run --user --scope nohup {start} &`",
    }
    fix = next((fixes[tool] for tool in fixes if tool in tools), f"`nohup {start} &`")
    return Finding("terminal", "warn", "over ssh, outside tmux: a lost connection stops the run (it saves first)", fix)


def logout(environment: Mapping[str, str], user: str, root: Path = Path("/")) -> Finding:
    """Whether systemd-logind kills what a user leaves running, tmux included."""
    if not environment.get("XDG_SESSION_ID"):
        return Finding("logout", "ok", "not in a login session of systemd")
    if not kills_at_logout(root):
        return Finding("logout", "ok", "systemd-logind leaves processes alone (KillUserProcesses=no)")
    if (root / "var/lib/systemd/linger" / user).exists():
        return Finding("logout", "ok", "KillUserProcesses=yes, but this user lingers")
    fix = "`loginctl enable-linger`, then start with `systemd-run --user --scope tmux new -s gpt2`"
    return Finding("logout", "warn", "KillUserProcesses=yes: logging out kills the run, inside tmux too", fix)


def kills_at_logout(root: Path) -> bool:
    """``KillUserProcesses`` of systemd-logind; what no file sets is no, as Debian, Ubuntu and Fedora build it."""
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
    """A reboot that waits, and updates that come by themselves."""
    rows = []
    if any((root / place).exists() for place in ("var/run/reboot-required", "run/reboot-required")):
        fix = "reboot now, before the run: `sudo reboot`"
        rows.append(Finding("reboot", "warn", "an update waits for a reboot (/var/run/reboot-required)", fix))
    settings = _apt_settings(root)
    if settings.get("APT::Periodic::Unattended-Upgrade", "0") not in ("0", ""):
        if settings.get("Unattended-Upgrade::Automatic-Reboot", "false").lower() in ("true", "1", "yes"):
            at = settings.get("Unattended-Upgrade::Automatic-Reboot-Time", "now")
            fix = 'set Unattended-Upgrade::Automatic-Reboot "false" in /etc/apt/apt.conf.d, or resume afterwards'
            rows.append(Finding("updates", "warn", f"unattended upgrades may reboot this machine ({at})", fix))
        elif gpus:
            fix = "for the time of the run: `sudo systemctl stop unattended-upgrades apt-daily-upgrade.timer`"
            rows.append(Finding("updates", "warn", "unattended upgrades may replace the GPU driver in the night", fix))
    return rows or [Finding("reboot", "ok", "none waits, and no update reboots by itself")]


def _apt_settings(root: Path) -> dict[str, str]:
    settings: dict[str, str] = {}
    for file in sorted((root / "etc/apt/apt.conf.d").glob("*")):
        if file.is_file():
            text = re.sub(r"(?m)^\s*(//|#).*", "", file.read_text(encoding="utf-8", errors="replace"))
            settings |= dict(re.findall(r'([\w:-]+)\s+"([^"]*)"\s*;', text))
    return settings


def _ask_slurm(job: str) -> float | None:
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%L"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_time_left(answer.stdout)


def _threads_of(user: int) -> int:
    count = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        if process.info["uids"] is not None and process.info["uids"].real == user:
            count += process.info["num_threads"] or 0
    return count


def _word(limit: int) -> str:
    return "any number" if limit == _INFINITY else f"{limit:,}"
