"""The plan of a drill: which scenes, on which run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_gpt2.config.settings import Settings
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.launcher import RankLayout

# The scenes in their order: first those after which the run must equal the undisturbed run ...
EXACT = (
    "read_error",
    "exception",
    "kill_rank",
    "freeze_rank",
    "kill_launcher",
    "ctrl_c",
    "kill_supervisor",
    "kill_all",
    "truncate",
    "flip_byte",
    "no_checkpoints",
    "disk_full",
    "run_dir_full",
    "unreadable_data",
)
# ... then those that change the result of the run; each has its own verification.
CHANGING = ("node", "nan", "other_ranks", "divergence", "long_divergence")
NAMES = (*EXACT, *CHANGING)

_SMALL_DISK = "a disk that is filled is seen on one machine only"
# Scenes that are left out on several hosts, and on one machine, with the reason.
NOT_ON_HOSTS = {
    "disk_full": _SMALL_DISK,
    "run_dir_full": _SMALL_DISK,
    "other_ranks": "a run uses all slots of its hosts; node changes the number of ranks",
}
ONLY_ON_HOSTS = {"node": "needs --hostfile"}


def left_out(has_hosts: bool) -> dict[str, str]:
    """Return the scenes that are not played, with the reason."""
    return NOT_ON_HOSTS if has_hosts else ONLY_ON_HOSTS


@dataclass(frozen=True)
class DrillPlan:
    """One drill."""

    settings: Settings  # the user's
    layout: RankLayout
    hosts: Sequence[Host] = ()  # none: this machine
    names: Sequence[str] = NAMES
    whole: bool = False  # with the real model and batch
    seed: int = 0  # of the random moments and ranks
    keep: bool = False  # keep the checkpoints of the drill
