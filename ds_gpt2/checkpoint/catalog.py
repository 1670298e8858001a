"""The committed checkpoints of a run: found, ordered by age, looked up by what a person calls them, verified."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import manifest, naming
from ds_gpt2.checkpoint.commit import read_pointer
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest
from ds_gpt2.checkpoint.naming import BEST_TAG, LATEST_BACKUP, MANIFEST, Role
from ds_gpt2.common.errors import UserError

_ORDER: tuple[Role, ...] = ("rolling", "epoch", "best", "superseded")  # of checkpoints of one step


@dataclass(frozen=True)
class Generation:
    """A committed checkpoint: a directory with a manifest. The manifest may turn out to be damaged."""

    path: Path
    role: Role | None  # None: a directory that a person has renamed or copied elsewhere
    manifest: Manifest | None
    problem: str | None  # why the manifest cannot be trusted

    @property
    def tag(self) -> str:
        return self.path.name

    @property
    def step(self) -> int:
        """From the manifest; from the name where that is damaged; -1 where neither tells."""
        if self.manifest is not None:
            return self.manifest.step
        last = self.tag.rsplit("_", 1)[-1]
        return int(last) if self.role in ("rolling", "superseded") and last.isdigit() else -1

    @property
    def is_superseded(self) -> bool:
        """Whether the run has continued from an earlier step since."""
        return self.role == "superseded"

    @property
    def is_resumable(self) -> bool:
        """Whether a resume considers it, as far as its name and kind tell."""
        return not (self.is_superseded or self.weights_only)

    @property
    def weights_only(self) -> bool:
        """Whether it was reduced to fp32 weights, from which nothing can be resumed."""
        return self.manifest is not None and self.manifest.kind == "weights"


def open_generation(path: Path) -> Generation:
    """The checkpoint in directory ``path``, whatever state it is in."""
    role = naming.role_of(path.name)
    try:
        return Generation(path, role, manifest.read(path), None)
    except DamagedError as error:
        return Generation(path, role, None, str(error))


def scan(directory: Path) -> list[Generation]:
    """All committed checkpoints in ``checkpoints/<run>/``, newest first; reads their manifests only."""
    if not directory.is_dir():
        return []
    found = [open_generation(path) for path in directory.iterdir() if _is_committed(path)]
    return sorted(found, key=_newest_first)


def newest_tag(directory: Path) -> str | None:
    """The newest checkpoint of the run's history, unverified; None if there is none."""
    return next((found.tag for found in scan(directory) if not found.is_superseded), None)


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint of the run's history, unverified; -1 if there is none."""
    return next((found.step for found in scan(directory) if not found.is_superseded), -1)


def problem_of(generation: Generation, part: int = 0, parts: int = 1) -> str | None:
    """Why ``generation`` must not be loaded, None if all is as it was written.

    Args:
        part: with ``parts``, look at this share of the files only; sizes are looked at in all.
    """
    if generation.manifest is None:
        return generation.problem
    files = sorted(generation.manifest.files.items())
    for name, entry in files:
        if (problem := manifest.size_problem_of(generation.path, name, entry)) is not None:
            return problem
    shares = (manifest.problem_of(generation.path, name, entry) for name, entry in files[part::parts])
    return next((problem for problem in shares if problem is not None), None)


def check_identity(generation: Generation, manifest: Manifest, identity: dict[str, Any]) -> None:
    """
    Raises:
        UserError: the checkpoint was made by another experiment.
    """
    differing = [
        f"{name} {manifest.identity.get(name)} (this run has {value})"
        for name, value in identity.items()
        if manifest.identity.get(name) != value
    ]
    if differing:
        raise UserError(
            f"checkpoint {generation.path} was made with {', '.join(differing)}: set it back, or start a new run with"
            " run.name=NAME"
        )


def candidates(directory: Path, wanted: str) -> list[Generation]:
    """The checkpoints to try for a resume from ``wanted``, the best first; none where there are none to choose from.

    Args:
        wanted: ``latest`` or ``auto`` (the newest that is good), ``before:STEP`` (the newest good one of an earlier
            step, or the oldest there is), ``latest_backup`` or ``backup``, ``best``, a step, an epoch
            (``epoch_00003``, ``epoch 3``), a tag, or the path of a checkpoint or of a directory of them.

    Raises:
        UserError: there is no such checkpoint; the message lists near ones.
    """
    history = [found for found in scan(directory) if found.is_resumable]
    if wanted in ("latest", "auto"):
        return history
    if (step := before(wanted)) is not None:
        return [found for found in history if found.step < step] or history[-1:]
    if wanted in (LATEST_BACKUP, "backup"):
        return _from_backup(directory, history)
    if (found := _by_name(directory, wanted)) is not None:
        return [found]
    if naming.role_of(wanted) is None and (path := _directory(wanted)) is not None:
        return _at_path(path)
    raise UserError(f"no checkpoint {wanted!r} in {directory}: {_known(directory, wanted)}")


def before(wanted: str) -> int | None:
    """The step that ``before:STEP`` names; None if ``wanted`` is something else."""
    step = wanted.removeprefix("before:")
    return int(step) if step != wanted and _is_number(step) else None


def _from_backup(directory: Path, history: list[Generation]) -> list[Generation]:
    """From ``latest_backup`` on; the newest is what the person did not want."""
    tag = read_pointer(directory, LATEST_BACKUP)
    tags = [generation.tag for generation in history]
    older = next((place for place, found in enumerate(history) if found.step < history[0].step), len(history))
    start = tags.index(tag) if tag in tags else older
    if not history[start:]:
        raise UserError(f"no second checkpoint in {directory}: use --resume latest")
    return history[start:]


def _by_name(directory: Path, wanted: str) -> Generation | None:
    tags = [wanted]
    if wanted == "best":
        tags = [BEST_TAG]
    elif _is_number(wanted):
        tags = [naming.rolling_tag(int(wanted)), naming.superseded_tag(int(wanted))]
    elif _is_number(number := wanted.removeprefix("epoch").strip(" _=")) and wanted.startswith("epoch"):
        tags = [naming.epoch_tag(int(number))]
    for tag in tags:
        if naming.is_plain_name(tag) and _is_committed(directory / tag, any_name=True):
            return open_generation(directory / tag)
    if _is_number(wanted):  # a step that is kept under another role only
        return next((found for found in scan(directory) if found.step == int(wanted)), None)
    return None


def _at_path(path: Path) -> list[Generation]:
    if (path / MANIFEST).exists():
        return [open_generation(path)]
    if found := [generation for generation in scan(path) if not generation.is_superseded]:
        return sorted(found, key=_made_at, reverse=True)
    if any(path.glob("*_optim_states.pt")) or any(path.glob("*/*_optim_states.pt")):
        raise UserError(f"{path} has DeepSpeed files of another program: a checkpoint of ds_gpt2 has a {MANIFEST}")
    raise UserError(f"{path} is not a checkpoint of ds_gpt2, nor a directory of some: it has no {MANIFEST}")


def _made_at(generation: Generation) -> float:
    """Where a run has gone back, its copies elsewhere still include steps of the history that it left."""
    return generation.manifest.made_at if generation.manifest is not None else math.inf


def _known(directory: Path, wanted: str) -> str:
    tags = [generation.tag for generation in scan(directory)]
    if not tags:
        return "there is none at all"
    steps = {str(generation.step): generation.tag for generation in scan(directory)}
    near = difflib.get_close_matches(wanted, [*tags, *steps], n=3, cutoff=0.6) or tags[:3]
    return "near are " + ", ".join(dict.fromkeys(steps.get(name, name) for name in near))


def _is_committed(path: Path, any_name: bool = False) -> bool:
    try:
        return (any_name or naming.role_of(path.name) is not None) and (path / MANIFEST).exists()
    except OSError:
        return False  # a name too long, or a directory that may not be entered: nothing that could be resumed from


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,12}", text, re.ASCII) is not None


def _directory(wanted: str) -> Path | None:
    """``wanted`` as the path of a directory, None if it is none."""
    try:
        path = Path(wanted).expanduser()
        return path if wanted and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, ~somebody unknown, a zero byte
        return None


def _newest_first(generation: Generation) -> tuple[int, int]:
    order = _ORDER.index(generation.role) if generation.role in _ORDER else len(_ORDER)
    return -generation.step, order
