"""The committed checkpoints of a run: list them by age, find one by a user's selector, verify their files."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gpt2.checkpoint import manifest, naming
from ds_gpt2.checkpoint.commit import read_pointer
from ds_gpt2.checkpoint.manifest import DamagedError, Manifest
from ds_gpt2.checkpoint.naming import BEST_TAG, LATEST_BACKUP, MANIFEST, Role
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import run_argument, run_of
from ds_gpt2.engine.checkpoint_keys import PARTITION_SUFFIX

STAGES = "data.stages"  # in the identity of a run that trains on a mixture: its stages

_ORDER: tuple[Role, ...] = ("rolling", "epoch", "best", "superseded")  # of checkpoints of one step


@dataclass(frozen=True)
class Generation:
    """A committed checkpoint: a directory with a manifest, which may be damaged."""

    path: Path
    role: Role | None  # None: the user has renamed or copied the directory
    manifest: Manifest | None  # None: damaged
    problem: str | None  # why the manifest is invalid; None if it is valid

    @property
    def tag(self) -> str:
        """The name of the directory."""
        return self.path.name

    @property
    def step(self) -> int:
        """The step in the manifest; if that is damaged, the step in the tag; -1 if unknown."""
        if self.manifest is not None:
            return self.manifest.step
        last = self.tag.rsplit("_", 1)[-1]
        return int(last) if self.role in ("rolling", "superseded") and last.isdigit() else -1

    @property
    def is_superseded(self) -> bool:
        """Whether the run has since resumed from an earlier step: it is not part of the run's history."""
        return self.role == "superseded"

    @property
    def is_resumable(self) -> bool:
        """Whether a resume may use it: not superseded, and not reduced to weights. Its files are not verified."""
        return not (self.is_superseded or self.weights_only)

    @property
    def is_primary(self) -> bool:
        """Whether it is a full rolling or epoch checkpoint: not ``best_model``, superseded, or reduced to weights."""
        return self.role in ("rolling", "epoch") and not self.weights_only

    @property
    def weights_only(self) -> bool:
        """Whether it was reduced to fp32 weights: training cannot resume from it."""
        return self.manifest is not None and self.manifest.kind == "weights"


def open_generation(path: Path) -> Generation:
    """Return the checkpoint in directory ``path``. A missing or damaged manifest is reported in ``problem``."""
    role = naming.role_of(path.name)
    try:
        return Generation(path, role, manifest.read(path), None)
    except DamagedError as error:
        return Generation(path, role, None, str(error))


def scan(directory: Path) -> list[Generation]:
    """Return all committed checkpoints in ``checkpoints/<run>/``, newest first. Reads only the manifests."""
    if not directory.is_dir():
        return []
    found = [open_generation(path) for path in directory.iterdir() if _is_committed(path)]
    return sorted(found, key=_newest_first)


def history(directory: Path) -> list[Generation]:
    """Return the checkpoints of the run's history, newest first: ``scan`` without superseded ones."""
    return [generation for generation in scan(directory) if not generation.is_superseded]


def newest_tag(directory: Path) -> str | None:
    """Return the tag of the newest checkpoint of the run's history, unverified; None if there is none."""
    return next((generation.tag for generation in history(directory)), None)


def newest_step(directory: Path) -> int:
    """Return the step of the newest checkpoint of the run's history, unverified; -1 if there is none."""
    return next((generation.step for generation in history(directory)), -1)


def name_in_commands(directory: Path) -> str:
    """Return how a command names the run with the checkpoints in ``directory``, quoted for the shell.

    Without the run, the checkpoints are named by ``directory``.
    """
    run_dir = run_of(directory)
    return shlex.quote(str(directory)) if run_dir is None else run_argument(run_dir)


def file_problem(path: Path) -> str | None:
    """Return why ``path``, which has the name of a checkpoint, is not one: it is a file; None if it is not a file."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return "is a file, not the directory of a checkpoint: delete it, or restore the directory from a copy"
    return None


def files_instead_of_checkpoints(directory: Path) -> dict[Path, str]:
    """Return the files in ``directory`` that have the name of a checkpoint, each with its problem."""
    named = sorted(path for path in directory.iterdir() if naming.role_of(path.name)) if directory.is_dir() else []
    return {path: problem for path in named if (problem := file_problem(path)) is not None}


def describe_files(directory: Path) -> str | None:
    """Return one line about the first of ``files_instead_of_checkpoints`` and how many follow; None if there are none.

    Raises:
        OSError: the directory cannot be read.
    """
    found = files_instead_of_checkpoints(directory)
    if not found:
        return None
    path, problem = next(iter(found.items()))
    return f"{path} {problem}" + (f" ({len(found) - 1} more like it)" if len(found) > 1 else "")


def nothing_to_resume(directory: Path) -> UserError:
    """Return the error that ``directory`` has no checkpoint; it names a file in the place of one.

    Raises:
        OSError: the directory cannot be read.
    """
    if (text := describe_files(directory)) is not None:
        return UserError(f"nothing to resume: {text}")
    return UserError(f"nothing to resume: {directory} has no checkpoint; start a new run")


def problem_of(generation: Generation, part: int = 0, parts: int = 1) -> str | None:
    """Return why ``generation`` must not be loaded; None if all its files are intact.

    Args:
        part: with ``parts``, verify the hashes of only this share of the files; the sizes of all files are checked.
    """
    if generation.manifest is None:
        return generation.problem
    if (problem := wrong_size(generation)) is not None:
        return problem
    files = sorted(generation.manifest.files.items())
    shares = (manifest.problem_of(generation.path, name, entry) for name, entry in files[part::parts])
    return next((problem for problem in shares if problem is not None), None)


def wrong_size(generation: Generation) -> str | None:
    """Return the first file that is missing or has a wrong size, as a message; None if there is none."""
    files = sorted(generation.manifest.files.items()) if generation.manifest is not None else []
    problems = (manifest.size_problem_of(generation.path, name, entry) for name, entry in files)
    return next((problem for problem in problems if problem is not None), None)


def check_identity(generation: Generation, manifest: Manifest, identity: dict[str, Any]) -> None:
    """Check that the checkpoint belongs to a run with the settings ``identity``.

    A setting that the manifest does not contain, because its version did not record it, is not compared.

    Raises:
        UserError: a setting differs.
    """
    if differing := identity_differences(manifest, identity):
        raise UserError(
            f"checkpoint {generation.path} was made with {', '.join(differing)}: restore these settings, or start a"
            " new run with run.name=NAME"
        )


def identity_differences(manifest: Manifest, identity: dict[str, Any]) -> list[str]:
    """Return how the settings of a checkpoint differ from ``identity``, each as text; see ``check_identity``."""
    differing = [
        f"{name} {manifest.identity[name]} (this run has {value})"
        for name, value in identity.items()
        if name in manifest.identity and name != STAGES and manifest.identity[name] != value
    ]
    batch = manifest.state.get("batch", manifest.step)
    if STAGES in identity and _begun(identity[STAGES], batch) != _begun(manifest.identity.get(STAGES, []), batch):
        differing.append(
            f"another data.mixture or data.stages until step {batch:,} (a new stage begins at step {batch + 1:,} at the"
            " earliest)"
        )
    return differing


def _begun(stages: Any, batch: int) -> list[Any] | None:
    """Return the stages of a mixture that have begun with ``batch``: only later ones may be changed.

    None if ``stages``, from a manifest, are not stages.
    """
    try:
        return [stage for stage in stages if stage["from_step"] <= batch]
    except (TypeError, LookupError):
        return None


def candidates(directory: Path, selector: str) -> list[Generation]:
    """Return the checkpoints to try for a resume, in order of preference; empty if ``directory`` has none to try.

    Args:
        selector: ``latest`` or ``auto`` (the newest), ``before:STEP`` (the newest of an earlier step; if there is
            none, the oldest), ``latest_backup`` or ``backup``, ``best``, a step, an epoch (``epoch_00003``,
            ``epoch 3``), a tag, or the path of a checkpoint or of a directory of checkpoints.

    Raises:
        UserError: there is no such checkpoint; the message suggests similar ones.
    """
    resumable = [generation for generation in scan(directory) if generation.is_resumable]
    if selector in ("latest", "auto"):
        return resumable
    if (step := step_limit(selector)) is not None:
        return [generation for generation in resumable if generation.step < step] or resumable[-1:]
    if selector in (LATEST_BACKUP, "backup"):
        return _from_backup_pointer(directory, resumable)
    if (found := _by_name(directory, selector)) is not None:
        return [found]
    if naming.role_of(selector) is None and (path := _directory(selector)) is not None:
        return _at_path(path)
    for tag in tags_of(selector):
        if naming.role_of(tag) is not None and (problem := file_problem(directory / tag)) is not None:
            raise UserError(f"{directory / tag} {problem}")
    raise UserError(f"no checkpoint {selector!r} in {directory}: {_suggestions(directory, selector)}")


def step_limit(selector: str) -> int | None:
    """Return STEP of the selector ``before:STEP``; None for another selector."""
    step = selector.removeprefix("before:")
    return int(step) if step != selector and _is_number(step) else None


def _from_backup_pointer(directory: Path, resumable: list[Generation]) -> list[Generation]:
    """Return the checkpoints from ``latest_backup`` on, newest first, without the newest step."""
    tag = read_pointer(directory, LATEST_BACKUP)
    tags = [generation.tag for generation in resumable]
    older = next((index for index, found in enumerate(resumable) if found.step < resumable[0].step), len(resumable))
    start = tags.index(tag) if tag in tags else older
    if not resumable[start:]:
        raise UserError(f"no second checkpoint in {directory}: use --resume latest")
    return resumable[start:]


def tags_of(selector: str) -> list[str]:
    """Return the tags that ``selector`` may denote, in order of preference: ``best``, a step, an epoch, or a tag."""
    if selector == "best":
        return [BEST_TAG]
    if _is_number(selector):
        return [naming.rolling_tag(int(selector)), naming.superseded_tag(int(selector))]
    if _is_number(number := selector.removeprefix("epoch").strip(" _=")) and selector.startswith("epoch"):
        return [naming.epoch_tag(int(number))]
    return [selector]


def _by_name(directory: Path, selector: str) -> Generation | None:
    for tag in tags_of(selector):
        if naming.is_plain_name(tag) and _is_committed(directory / tag, any_name=True):
            return open_generation(directory / tag)
    if _is_number(selector):  # a step that exists only under another role
        return next((found for found in scan(directory) if found.step == int(selector)), None)
    return None


def _at_path(path: Path) -> list[Generation]:
    if (path / MANIFEST).exists():
        return [open_generation(path)]
    if found := history(path):
        return sorted(found, key=_made_at, reverse=True)
    if any(path.glob(f"*{PARTITION_SUFFIX}")) or any(path.glob(f"*/*{PARTITION_SUFFIX}")):
        raise UserError(f"{path} has DeepSpeed files of another program: a checkpoint of ds_gpt2 has a {MANIFEST}")
    raise UserError(f"{path} is not a checkpoint of ds_gpt2 or a directory of checkpoints: it has no {MANIFEST}")


def _made_at(generation: Generation) -> float:
    """Return the sort key of backups: after a rollback, the highest step among them is not always the newest."""
    return generation.manifest.made_at if generation.manifest is not None else math.inf


def _suggestions(directory: Path, selector: str) -> str:
    tags = [generation.tag for generation in scan(directory)]
    if not tags:
        return "there are no checkpoints"
    steps = {str(generation.step): generation.tag for generation in scan(directory)}
    similar = difflib.get_close_matches(selector, [*tags, *steps], n=3, cutoff=0.6) or tags[:3]
    return "did you mean " + " or ".join(dict.fromkeys(steps.get(name, name) for name in similar)) + "?"


def _is_committed(path: Path, any_name: bool = False) -> bool:
    try:
        return (any_name or naming.role_of(path.name) is not None) and (path / MANIFEST).exists()
    except OSError:
        return False  # the name is too long, or the directory is not accessible: not usable for a resume


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,12}", text, re.ASCII) is not None


def _directory(selector: str) -> Path | None:
    """Return ``selector`` as the path of a directory; None if it is not one."""
    try:
        path = Path(selector).expanduser()
        return path if selector and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, the home directory of an unknown user, a null character
        return None


def _newest_first(generation: Generation) -> tuple[int, int]:
    order = _ORDER.index(generation.role) if generation.role in _ORDER else len(_ORDER)
    return -generation.step, order
