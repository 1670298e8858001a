"""A launch of a supervised run: the arguments of the ranks, their layout, and what they resume from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ds_gpt2.config.batch_plan import format_batches
from ds_gpt2.supervision.launcher import TRAIN, RankLayout
from ds_gpt2.supervision.restart_policy import Restart


@dataclass(frozen=True)
class SupervisedRun:
    """A launch of a run; ``after`` returns the next launch."""

    arguments: tuple[str, ...]  # of train.py, without --resume and --leave_out
    layout: RankLayout
    resume: str | None = None  # see ``catalog.candidates``; None: a new run
    leave_out: tuple[int, ...] = ()  # batches of the data to exclude
    script: Path = TRAIN
    environment: Mapping[str, str] = field(default_factory=dict)  # added to this process's own

    def on_ranks(self, ranks: int, micro_batch: int) -> SupervisedRun:
        """Return the run on another number of ranks.

        Args:
            micro_batch: that divides the token budget of a step on them.
        """
        key = "batch.micro_batch="
        others = tuple(word for word in self.arguments if not word.startswith(key))
        return replace(self, arguments=(*others, f"{key}{micro_batch}"), layout=replace(self.layout, ranks=ranks))

    def command(self) -> list[str]:
        """Return the arguments of ``train.py``."""
        resume = ["--resume", self.resume] if self.resume else []
        return [*self.arguments, *resume, *self._leave_out_arguments()]

    def resume_arguments(self, run_dir: Path, num_gpus: int | None) -> list[str]:
        """Return the arguments with which ``launch.sh`` resumes the run from its directory and its stored settings.

        Args:
            num_gpus: ranks on this machine, or on each node of a Slurm job; None: the hostfile lists them.
        """
        source = "latest" if self.resume in (None, "auto") else str(self.resume)
        ranks = [] if num_gpus is None else ["--num_gpus", str(num_gpus)]
        return ["resume", str(run_dir), *ranks, "--from", source, *self._leave_out_arguments()]

    def after(self, restart: Restart) -> SupervisedRun:
        """Return the next launch. It excludes all batches excluded so far: an older checkpoint does not list them."""
        leave_out = tuple(sorted({*self.leave_out, *restart.leave_out}))
        return replace(self, resume=restart.resume, leave_out=leave_out)

    def origin(self) -> str:
        """Return what the ranks start from, as text."""
        text = _ORIGINS.get(self.resume, f"resuming from {self.resume}")
        if self.resume and self.resume.startswith("before:"):
            text = f"resuming from the newest checkpoint before step {self.resume.removeprefix('before:')}"
        return f"{text}, excluding batches {format_batches(self.leave_out)}" if self.leave_out else text

    def _leave_out_arguments(self) -> list[str]:
        return ["--leave_out", format_batches(self.leave_out)] if self.leave_out else []


_ORIGINS = {
    None: "from the beginning",
    "auto": "resuming from the newest checkpoint, if there is one",
    "latest": "resuming from the newest checkpoint",
}
