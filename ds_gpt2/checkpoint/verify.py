"""Verify checkpoints, by hash and by content, while a run may be replacing and deleting them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_gpt2.checkpoint import manifest
from ds_gpt2.checkpoint.catalog import Generation, open_generation, wrong_size
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.common.errors import one_line_reason
from ds_gpt2.common.terminal import one_line
from ds_gpt2.engine.checkpoint_keys import MODULE

Check = Callable[[Generation], str | None]  # returns the problem of a checkpoint with a valid manifest, or None


@dataclass(frozen=True)
class Verdict:
    """The result of the verification of a checkpoint."""

    generation: Generation
    problem: str | None  # one line; None: no problem was found


def examine(path: Path, checks: Iterable[Check]) -> Verdict | None:
    """Return the checkpoint in ``path`` and the first problem that ``checks`` find; None if it does not exist.

    If a run replaces the checkpoint (``best_model``) or deletes it meanwhile, the checks are repeated.
    """
    while (before := identity(path)) is not None:
        generation = open_generation(path)
        problem = generation.problem or next((found for check in checks if (found := check(generation))), None)
        if problem is None or identity(path) == before:
            return Verdict(generation, None if problem is None else one_line(problem))
    return None


def identity(path: Path) -> tuple[int, int] | None:
    """Return (inode, modification time in ns) of the manifest: it changes if the checkpoint is replaced.

    None if there is no checkpoint in ``path``.
    """
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


class Hashes:
    """Verifies the hashes of checkpoint files, each hard-linked file only once. Shows a progress bar on a terminal."""

    def __init__(self, generations: Iterable[Generation]) -> None:
        total = sum(entry.bytes for generation in generations for entry in _entries(generation).values())
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", leave=False, disable=None, delay=1)
        self._results: dict[tuple[int, int, FileEntry], str | None] = {}

    def problem_of(self, generation: Generation) -> str | None:
        """Return the first problem of the files of ``generation``; None if all are intact. Sizes are checked first."""
        problem = wrong_size(generation)
        for name, entry in _entries(generation).items():
            problem = problem or self._problem_of_file(generation.path, name, entry)
            self.bar.update(entry.bytes)
        return problem

    def _problem_of_file(self, checkpoint: Path, name: str, entry: FileEntry) -> str | None:
        try:
            status = (checkpoint / name).stat()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        key = (status.st_dev, status.st_ino, entry)
        if key not in self._results:
            self._results[key] = manifest.problem_of(checkpoint, name, entry)
        return self._results[key]


@contextlib.contextmanager
def hashing(generations: Iterable[Generation]) -> Iterator[Hashes]:
    """Provide ``Hashes`` for ``generations`` and close its progress bar at the end."""
    hashes = Hashes(generations)
    try:
        yield hashes
    finally:
        hashes.bar.close()


def _entries(generation: Generation) -> Mapping[str, FileEntry]:
    return generation.manifest.files if generation.manifest is not None else {}


def deep_problem(generation: Generation) -> str | None:
    """Return the first problem of the content of ``generation``, which must have a manifest; None if there is none.

    Finds what hashes cannot: files that cannot be loaded, numbers that are not finite, tensors of another model.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed's import must not use the GPUs of a running training
    from ds_gpt2.checkpoint import content_checks
    from ds_gpt2.checkpoint.weights import files_of_weights
    from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file, unpickle

    assert generation.manifest is not None
    files, ranks = generation.manifest.files, generation.manifest.world_size
    weights = [*files_of_weights(generation.manifest).values()]
    full = [MODEL_FILE, *map(partition_file, range(min(ranks, len(files))))]  # a forged number of ranks may be huge
    if missing := [name for name in (weights if generation.weights_only else full) if name not in files]:
        return f"{MANIFEST} does not list {missing[0]}"
    found = 0
    for name in sorted(files):
        if not name.endswith(".pt"):
            continue
        try:
            content = unpickle(generation.path / name)
        except Exception as error:  # unpickling a damaged file can raise any exception
            return f"{name} cannot be loaded safely: {one_line_reason(error, 300)}"
        if (where := _not_finite(content, name)) is not None:
            return f"{where} has numbers that are not finite"
        if name in (MODEL_FILE, *weights) and (problem := _wrong_shape(content, generation.manifest)) is not None:
            return f"{name}: {problem}"
        if name in full and not generation.weights_only:
            compare = content_checks.problem_of_model if name == MODEL_FILE else content_checks.problem_of_partition
            if (problem := compare(content, generation.manifest)) is not None:
                return f"{name} {problem}"
            if name == MODEL_FILE:
                model = content
            else:
                found += content_checks.elements(content)
    return None if generation.weights_only else content_checks.problem_of_sum(found, model)


def _not_finite(content: Any, name: str) -> str | None:
    """Return the location of the first tensor in ``content`` with a NaN or infinity; None if there is none."""
    import torch

    if isinstance(content, torch.Tensor):
        return None if not content.is_floating_point() or bool(content.isfinite().all()) else name
    if isinstance(content, Mapping):
        items: Iterable[tuple[Any, Any]] = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    else:
        return None
    return next((where for key, item in items if (where := _not_finite(item, f"{name}: {key}"))), None)


def _wrong_shape(content: Any, known: Manifest) -> str | None:
    """Return the first difference between the weights and the model that the manifest describes; None if equal."""
    import torch

    from ds_gpt2.model.gpt2 import GPT2
    from ds_gpt2.model.shape import ModelShape

    try:
        shape = ModelShape(
            **{name: known.identity[f"model.{name}"] for name in ("layers", "heads", "width")},
            sequence_length=known.identity["batch.sequence_length"],
        )
        found = {str(name): tuple(tensor.shape) for name, tensor in content.get(MODULE, content).items()}
        if shape.layers > len(found):
            return f"it has {len(found):,} tensors, {MANIFEST} says {shape.layers:,} layers"
        with torch.device("meta"):
            model = GPT2(shape, dropout=0.0)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        return f"it cannot be compared with {MANIFEST}: {error!r}"
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is not a tensor of this model"
        if found[name] != expected[name]:
            return f"{name} has shape {found[name]}, expected {expected[name]} according to {MANIFEST}"
    return None
