"""Start the ranks with DeepSpeed's launcher, ask them to stop, see what they are doing, and leave no process behind."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.host import free_port
from ds_gpt2.config.settings import Settings
from ds_gpt2.distributed.launch_environment import without_ranks
from ds_gpt2.run_dir.exit_report import CRASHED, ExitReports, Outcome
from ds_gpt2.run_dir.heartbeat import read_beat, stacks_file

TRAIN = Path(__file__).parents[1] / "train.py"
LAUNCHER = Path(__file__).with_name("launch_ranks.py")
CPU_RANKS = 4

_STACKS_SECONDS = 10.0  # how long ranks are given to write down what they are doing


@dataclass(frozen=True)
class RankLayout:
    """Where the ranks run."""

    accelerator: str  # cuda or cpu
    ranks: int


def choose_ranks(settings: Settings, wanted: int | None) -> RankLayout:
    """Every GPU there is, else four ranks on the CPU, unless told otherwise.

    Raises:
        UserError: CUDA is asked for and missing, or more ranks than GPUs are.
    """
    accelerator = settings.run.device
    if accelerator == "auto" and os.environ.get("DS_ACCELERATOR") == "cpu":
        accelerator = "cpu"
    gpus = 0 if accelerator == "cpu" else _gpus()
    if accelerator == "cpu" or (accelerator == "auto" and not gpus):
        return RankLayout("cpu", wanted or CPU_RANKS)
    if not gpus:
        raise UserError(f"run.device is cuda, but PyTorch {version('torch')} sees no GPU: set run.device=cpu")
    if wanted and wanted > gpus:
        raise UserError(f"--num_gpus {wanted}, but this machine shows {gpus} GPU(s)")
    return RankLayout("cuda", wanted or gpus)


def _gpus() -> int:
    """How many PyTorch sees; its builds for CPUs say what they are, which saves a second of importing them."""
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start_command(place: RankLayout, script: Path, arguments: Sequence[str]) -> list[str]:
    """What starts the ranks: DeepSpeed's launcher of one machine, which is what ``deepspeed --num_gpus`` starts, too.

    Started by itself it spares a second process of PyTorch, in the time of each start and in memory for all of a run.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": _devices(place)}).encode()).decode()
    launch = [sys.executable, "-u", str(LAUNCHER), "--log_level", "critical"]
    return [*launch, f"--world_info={world}", "--master_port", str(free_port()), str(script), *arguments]


class Ranks:
    """One start of ``train.py``: DeepSpeed's launcher and the ranks that it starts, in a session of their own.

    So Ctrl+C reaches the starter alone, and whatever belongs to this start is found again by its process group.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        place: RankLayout,
        outcome_file: Path,
        environment: Mapping[str, str],
        script: Path = TRAIN,
    ) -> None:
        """
        Args:
            arguments: of ``script``.
            outcome_file: where ranks leave their last words if they cannot use a pipe.
            environment: laid over this process's own.
        """
        command = start_command(place, script, arguments)
        self._last_words = ExitReports(outcome_file)
        inherited = {**without_ranks(os.environ), **environment, **self._last_words.request()}
        inherited["DS_ACCELERATOR"] = place.accelerator
        self._process = subprocess.Popen(command, env=inherited, start_new_session=True)
        self.count = place.ranks

    @property
    def group(self) -> int:
        return self._process.pid

    @property
    def launcher_lives(self) -> bool:
        return self._process.poll() is None

    @property
    def gone(self) -> bool:
        """Whether no process of this start is left."""
        return not self.launcher_lives and not members(self.group)

    def ask_to_stop(self) -> None:
        ask_to_stop(self.group)

    def kill(self) -> None:
        kill(self.group)

    @property
    def exit_status(self) -> str:
        """What the launcher's exit status tells; it passes a rank's signal on as 256 less its number."""
        code = self._process.wait()
        number = -code if code < 0 else 256 - code if code > 128 else 0
        if 0 < number < signal.NSIG:
            whom = "DeepSpeed's launcher" if code < 0 else "a rank"
            return f"{whom} was killed by {signal.Signals(number).name}"
        return f"exit status {code}"

    @property
    def launcher_died(self) -> bool:
        """Whether it was killed, and so has left the ranks alone; it ends them where one of them has failed."""
        code = self._process.poll()
        return code is not None and code < 0 and self._last_words.outcome() is None

    def outcome(self) -> Outcome:
        """What rank 0 has said; a crash if it has said nothing."""
        return self._last_words.outcome() or Outcome(CRASHED)

    def failures(self) -> dict[int, str]:
        """What ended each rank that could say so, the first to fail first."""
        return self._last_words.failures()


def ask_to_stop(group: int) -> None:
    """SIGTERM to the ranks themselves: DeepSpeed's launcher would give each 30 seconds and then kill it."""
    ranks = ranks_of(group)
    if not ranks:  # still starting: there is nothing to save
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(signal.SIGTERM)


def kill(group: int) -> None:
    """SIGKILL to all of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def write_stacks(run_dir: Path, ranks: int, group: int, into: Path) -> None:
    """Leave in ``into`` what every rank of ``group`` is doing: its state, and the Python stacks of all its threads.

    Ranks that were stopped are set going for it: they are about to be killed.
    """
    into.mkdir(parents=True, exist_ok=True)
    processes = {process.pid: process for process in members(group)}
    beats = {rank: read_beat(run_dir, rank) for rank in range(ranks)}
    found = {rank: processes[beat.pid] for rank, beat in beats.items() if beat is not None and beat.pid in processes}
    states = {rank: _state(process) for rank, process in found.items()}
    for process in found.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            _ask_for_stacks(process)
            process.send_signal(signal.SIGCONT)
    deadline, sizes = time.monotonic() + _STACKS_SECONDS, dict.fromkeys(found, 0)
    while time.monotonic() < deadline:
        before, sizes = sizes, {rank: _size(stacks_file(run_dir, rank)) for rank in found}
        if sizes == before and all(sizes.values()):  # each has begun, and none is still writing
            break
        time.sleep(0.2)
    for rank in found:
        target = into / f"rank_{rank:05d}.txt"
        with contextlib.suppress(OSError):
            shutil.copyfile(stacks_file(run_dir, rank), target)
            with target.open("a", encoding="utf-8") as file:
                file.write(f"\n{beats[rank]}\n{states[rank]}\n")


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed because memory ran out: in this control group, or on the
    machine if the group has no counter; 0 if neither has.
    """
    for file in (*_memory_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")), Path("/proc/vmstat")):
        if (kills := _kills_in(file)) is not None:
            return kills
    return 0


def _kills_in(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
    return None


def _memory_groups(mounted: Path, own: Path) -> list[Path]:
    """The files in which control groups of both versions count kills, see cgroups(7) and the kernel's documentation.

    Outside a namespace of its own, a process finds its group below the mounted root; within one, at the root.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found += [mounted / path.lstrip("/") / "memory.events", mounted / "memory.events"]
            elif "memory" in controllers.split(","):
                found += [mounted / "memory" / path.lstrip("/") / "memory.oom_control"]
                found += [mounted / "memory" / "memory.oom_control"]
    return found


def _ask_for_stacks(process: psutil.Process) -> None:
    """Of its main thread if possible: while another thread answers, that one would run on from where it was stopped."""
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)  # since glibc 2.30
    if tgkill is None or tgkill(process.pid, process.pid, signal.SIGUSR2):
        process.send_signal(signal.SIGUSR2)


def _state(process: psutil.Process) -> str:
    """What the kernel says of it."""
    wanted = ("State:", "VmRSS:", "Threads:")
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        where = Path(f"/proc/{process.pid}/wchan").read_text(encoding="utf-8")
        return "\n".join([*(line for line in lines if line.startswith(wanted)), f"waits in: {where}"])
    return "gone"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _devices(place: RankLayout) -> list[str]:
    """One for each rank, as CUDA_VISIBLE_DEVICES names them: by number or by UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if place.accelerator == "cuda" else ""
    names = [name.strip() for name in visible.split(",")] if visible else list(map(str, range(place.ranks)))
    return names[: place.ranks]


def ranks_of(group: int) -> list[psutil.Process]:
    """The ranks among the processes of a group."""
    found = []
    for process in members(group):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()
            if any(word.startswith("--local_rank=") for word in command):  # DeepSpeed's launcher gives it to each
                found.append(process)
    return found
