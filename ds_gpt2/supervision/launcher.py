"""Start the ranks on this machine with DeepSpeed's launcher, stop them, and report how they exited.

They may be a part of the ranks of a run on several machines: see ``Place``.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.common.host import free_port
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.config.settings import Settings
from ds_gpt2.distributed.launch_environment import LOOPBACK, without_ranks
from ds_gpt2.run_dir.exit_codes import CRASHED
from ds_gpt2.run_dir.exit_report import ExitReports, Outcome, signal_name
from ds_gpt2.supervision import rank_processes, stacks
from ds_gpt2.supervision.oom_kills import out_of_memory_kills
from ds_gpt2.supervision.rank_heartbeats import LocalHeartbeats

TRAIN = Path(__file__).parents[1] / "train.py"
LAUNCHER = Path(__file__).with_name("launch_ranks.py")
CPU_RANKS = 4


@dataclass(frozen=True)
class RankLayout:
    """The number of ranks and the device they use."""

    accelerator: str  # cuda or cpu
    ranks: int


@dataclass(frozen=True)
class Place:
    """The place of this machine among those of a run."""

    slots: tuple[int, ...]  # ranks on each machine
    node: int = 0  # number of this machine
    master_address: str = LOOPBACK[0]  # where rank 0 listens
    master_port: int | None = None  # None: a free one

    @property
    def ranks(self) -> range:
        """The numbers of the ranks on this machine."""
        first = sum(self.slots[: self.node])
        return range(first, first + self.slots[self.node])


def choose_ranks(settings: Settings, requested: int | None) -> RankLayout:
    """Return the layout for this machine: one rank per GPU, or ``CPU_RANKS`` ranks if there is no GPU.

    Args:
        requested: the number of ranks; None for the default.

    Raises:
        UserError: run.device is cuda and there is no GPU, or more ranks than GPUs are requested.
    """
    accelerator = requested_accelerator(settings)
    gpus = 0 if accelerator == "cpu" else gpus_of_machine()
    if accelerator == "cpu" or (accelerator == "auto" and not gpus):
        return RankLayout("cpu", requested or CPU_RANKS)
    if not gpus:
        raise UserError(f"run.device is cuda, but PyTorch {version('torch')} finds no GPU: set run.device=cpu")
    if requested and requested > gpus:
        raise UserError(f"--num_gpus {requested}, but this machine has {counted(gpus, 'GPU')}: give --num_gpus {gpus}")
    return RankLayout("cuda", requested or gpus)


def requested_accelerator(settings: Settings) -> str:
    """Return ``run.device``; DS_ACCELERATOR=cpu decides where it is ``auto``."""
    device = settings.run.device
    return "cpu" if device == "auto" and os.environ.get("DS_ACCELERATOR") == "cpu" else device


def gpus_of_machine() -> int:
    """Return the number of GPUs that PyTorch finds.

    A build for CPUs shows that in its version, which saves the second that importing PyTorch takes.
    """
    if version("torch").endswith("+cpu"):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start_command(layout: RankLayout, script: Path, arguments: Sequence[str], place: Place | None = None) -> list[str]:
    """Return the command that runs ``script`` on the ranks of this machine with DeepSpeed's launcher of one node.

    ``deepspeed --num_gpus`` starts the same launcher, but from a second process that imports PyTorch and stays in
    memory until the run ends.
    """
    place = place or Place((layout.ranks,))
    world = {f"node_{node}": list(map(str, range(slots))) for node, slots in enumerate(place.slots)}
    world[f"node_{place.node}"] = _devices(layout)
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    master = ["--master_addr", place.master_address, "--master_port", str(place.master_port or free_port())]
    launch = [sys.executable, "-u", str(LAUNCHER), "--log_level", "critical"]
    node = [f"--world_info={encoded}", "--node_rank", str(place.node)]
    return [*launch, *node, *master, str(script), *arguments]


def _devices(layout: RankLayout) -> list[str]:
    """Return one device for each rank, as CUDA_VISIBLE_DEVICES names them: by number or by UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if layout.accelerator == "cuda" else ""
    names = [name.strip() for name in visible.split(",")] if visible else list(map(str, range(layout.ranks)))
    return names[: layout.ranks]


class Ranks:
    """One launch of ``train.py``: DeepSpeed's launcher and the ranks, in a separate session.

    Ctrl+C in the terminal does not reach the ranks in that session, and its process group identifies all processes of
    the launch.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        layout: RankLayout,
        outcome_file: Path,
        environment: Mapping[str, str],
        script: Path = TRAIN,
        place: Place | None = None,
        output: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            arguments: of ``script``.
            outcome_file: where ranks report how they ended if they cannot use a pipe.
            environment: added to this process's own.
            place: of this machine among those of the run; None: it is the only one.
            output: descriptors for standard output and standard error; None: those of this process.

        Raises:
            OSError: the launcher cannot be started.
        """
        place = place or Place((layout.ranks,))
        command = start_command(layout, script, arguments, place)
        self._exit_reports = ExitReports(outcome_file)
        inherited = {**without_ranks(os.environ), **environment, **self._exit_reports.request()}
        inherited["DS_ACCELERATOR"] = layout.accelerator
        self._oom_kills_before = out_of_memory_kills()
        stdout, stderr = output or (None, None)
        self._process = subprocess.Popen(
            command, env=inherited, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        self._numbers = place.ranks
        self.count = layout.ranks

    @property
    def group(self) -> int:
        """The process group of the launcher and the ranks."""
        return self._process.pid

    @property
    def is_launcher_running(self) -> bool:
        return self._process.poll() is None

    @property
    def have_exited(self) -> bool:
        """Whether no process of this launch is left."""
        return not self.is_launcher_running and not rank_processes.members(self.group)

    @property
    def launcher_was_killed(self) -> bool:
        """Whether the launcher was killed and left the ranks running; it ends them itself if one of them fails."""
        code = self._process.poll()
        return code is not None and code < 0 and self._exit_reports.outcome() is None

    @property
    def are_stuck(self) -> bool:
        """Whether ranks wait for others that are gone: on one machine the launcher ends them."""
        return False

    @property
    def lost_hosts(self) -> dict[str, str]:
        """The hosts that have stopped responding: none, all ranks are on this machine."""
        return {}

    @property
    def exit_code(self) -> int:
        """The launcher's exit code, negative if a signal has killed it; waits until it exits."""
        return self._process.wait()

    @property
    def exit_status(self) -> str:
        """The launcher's exit status as text. It reports a rank that signal N killed as status 256 - N."""
        code = self.exit_code
        number = -code if code < 0 else 256 - code if code > 128 else 0
        if 0 < number < signal.NSIG:
            killed = "DeepSpeed's launcher" if code < 0 else "a rank"
            return f"{killed} was killed by {signal_name(number)}"
        return f"exit status {code}"

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed a process for lack of memory since the launch."""
        return out_of_memory_kills() > self._oom_kills_before

    @property
    def reported_outcome(self) -> Outcome | None:
        """What rank 0 reported about the end of the run; None if it has reported nothing."""
        return self._exit_reports.outcome()

    def outcome(self) -> Outcome:
        """Return what rank 0 reported about the end of the run; a crash if it reported nothing."""
        return self.reported_outcome or Outcome(CRASHED)

    def failures(self) -> dict[int, str]:
        """Return the error of each rank that reported one, the first to fail first."""
        return self._exit_reports.failures()

    def kills(self) -> dict[int, str]:
        """Return the name of the signal that killed each rank that was killed before the launcher ended the others."""
        return self._exit_reports.kills()

    def request_stop(self) -> None:
        rank_processes.request_stop(self.group)

    def kill(self) -> None:
        rank_processes.kill(self.group)

    def heartbeats(self, run_dir: OpenDirectory) -> LocalHeartbeats:
        """Return the heartbeats of the ranks; call this once, right after the launch."""
        return LocalHeartbeats(run_dir, self._numbers)

    def write_stacks(self, run_dir: Path, directory: Path) -> None:
        """Write what each rank is executing to ``directory``, see ``stacks.write_stacks``."""
        stacks.write_stacks(run_dir, self._numbers, self.group, directory)
