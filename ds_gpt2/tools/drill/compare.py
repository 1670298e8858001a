"""Compare two runs bit for bit: curves, weights, moments, random states, ledger of windows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ds_gpt2.checkpoint.manifest import Manifest, read
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import open_sources
from ds_gpt2.engine.checkpoint_io import MODEL_FILE, unpickle
from ds_gpt2.engine.checkpoint_keys import BASE, EMA, MASTERS, MODULE, STATE
from ds_gpt2.run_dir.metrics import METRICS, read_metrics


def curve_differences(one: Path, other: Path) -> list[str]:
    """Return the differences between the metrics of two runs' directories, without times and speeds."""
    return differences(_metrics(one), _metrics(other), METRICS)


def checkpoint_differences(one: Path, other: Path) -> list[str]:
    """Return the differences between two checkpoint directories: weights, moments, random states, progress, ledger.

    Raises:
        DamagedError: a checkpoint does not exist, or is damaged.
    """
    manifest, other_manifest = read(one), read(other)
    names = sorted(manifest.files)
    if names != sorted(other_manifest.files):
        return [f"{other.name} has other files than {one.name}"]
    return differences(_progress(manifest), _progress(other_manifest), "progress") + [
        found
        for name in names
        for found in differences(_without_paths(one / name), _without_paths(other / name), _short(name))
    ]


def update_differences(before: Path, after: Path) -> list[str]:
    """Return the differences in weights, masters, moments and moving average between two checkpoints.

    Args:
        before, after: saved by the same number of ranks.
    """
    found = differences(unpickle(before / MODEL_FILE)[MODULE], unpickle(after / MODEL_FILE)[MODULE], "weights")
    for name in sorted(set(read(before).files) - {MODEL_FILE}):
        old, new = (unpickle(checkpoint / name) for checkpoint in (before, after))
        one, other = old[STATE], new[STATE]
        found += differences(old.get(EMA), new.get(EMA), f"moving average in {_short(name)}")
        found += differences(one[MASTERS], other[MASTERS], f"masters in {_short(name)}")
        found += differences(one[BASE]["state"], other[BASE]["state"], f"moments in {_short(name)}")
    return found


def expected_ledger(settings: Settings, ranks: int, batches: Iterable[int]) -> str:
    """Return the ledger (see TrainState) of a run that has trained on ``batches`` of its data, in this order."""
    batch = settings.batch
    plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, ranks)
    sources = open_sources(settings.data)
    windows = sources.windows("train", plan.sequence_length)
    mixture = sources.mixture(plan.sequence_length, plan.windows_per_step, settings.run.seed)
    data = TrainingData(windows, plan, 0, settings.run.seed, torch.device("cpu"), mixture)
    ledger = ""
    for number in batches:
        ledger = hashlib.sha256(ledger.encode() + data.windows_of(number).tobytes()).hexdigest()
    return ledger


def loss_by_step(run_dir: Path) -> dict[int, float]:
    """Return the training loss of every step, in nats per token; NaN where it was not finite."""
    return {
        record["step"]: math.nan if record["train/loss"] is None else record["train/loss"]
        for record in read_metrics(run_dir / METRICS)
        if "train/loss" in record
    }


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of the metrics without the values that depend on time and machine."""
    return {key: value for key, value in record.items() if key != "time" and not key.startswith("perf/")}


def differences(one: Any, other: Any, name: str) -> list[str]:
    """Return the differences between two nested states, bit for bit; ``name`` denotes the states in the texts."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [] if one.keys() == other.keys() else [f"{name} has other keys"]
        shared = [key for key in one if key in other]
        return found + [text for key in shared for text in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{name} has {len(other)} entries, not {len(one)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [text for number, pair in pairs for text in differences(*pair, f"{name}[{number}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if _same_bits(one, other) else [f"{name} differs"]
    if type(one) is type(other) and not isinstance(one, type) and hasattr(one, "__dict__"):
        return differences(vars(one), vars(other), name)
    return [] if one == other else [f"{name} is {other!r}, not {one!r}"]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit: NaN equals itself, and 0 differs from -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def _progress(manifest: Manifest) -> dict[str, Any]:
    """Return the run's progress; of an interrupted evaluation, without the values that depend on time and machine."""
    unevaluated = manifest.state.get("unevaluated")
    return {**manifest.state, "unevaluated": unevaluated and _without_times(unevaluated)}


def _without_paths(file: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file without DeepSpeed's settings, which contain the run's directory."""
    return {key: value for key, value in unpickle(file).items() if key != "ds_config"}


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [_without_times(record) for record in read_metrics(run_dir / METRICS)]


def _short(name: str) -> str:
    return name.removesuffix("_optim_states.pt").removesuffix("_states.pt")
