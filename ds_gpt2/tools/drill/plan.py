"""What is to be rehearsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_gpt2.config.settings import Settings
from ds_gpt2.supervision.launcher import RankLayout

# The scenes in their order: first those after which the run must be what it would have been ...
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
# ... then those that change the numbers, each with a check of its own.
CHANGING = ("nan", "other_ranks", "divergence", "long_divergence")
NAMES = (*EXACT, *CHANGING)


@dataclass(frozen=True)
class DrillPlan:
    """One drill."""

    settings: Settings  # the user's
    place: RankLayout
    names: Sequence[str] = NAMES
    whole: bool = False  # the real model and batch
    seed: int = 0  # of moments and victims
    keep: bool = False  # the checkpoints that the drill makes
