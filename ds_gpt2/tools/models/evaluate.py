"""Evaluate models on the same held-out windows and the same items of evaluations, and compare them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ds_gpt2.checkpoint.manifest import Weights
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config.run_location import current_settings
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.hellaswag import TextStyle, load_items
from ds_gpt2.data.items import Item
from ds_gpt2.evaluation.loss import (
    Array,
    Estimate,
    bits_per_byte,
    bytes_per_token,
    count_windows,
    difference,
    mean,
    perplexity,
    right_answers,
    share,
    window_losses,
)
from ds_gpt2.evaluation.row_batches import describe_truncation
from ds_gpt2.evaluation.scoring import MEASURES
from ds_gpt2.evaluation.tasks import differences, estimates, results
from ds_gpt2.pretrained import load
from ds_gpt2.tools.models.evaluate_tasks import Task, choose_tasks
from ds_gpt2.tools.models.open import OpenedModel, check_kind, damaged, find_outside, shape_of
from ds_gpt2.tools.resources.run_checkpoints import find_checkpoint

DEFAULT_TOKENS = 1_048_576  # to measure the loss on, if no settings have a number


class ProgressBar(Protocol):
    """The part of a tqdm bar that is used here."""

    def update(self, n: float | None = 1) -> object: ...


OpenBar = Callable[[str, int, str], AbstractContextManager[ProgressBar]]  # title, total, unit


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate that exists but is not loaded yet."""

    name: str  # for open_model
    sequence_length: int
    settings: dict[str, Any]  # of its run; empty for a model from outside of runs


@dataclass(frozen=True)
class EvalSources:
    """The command-line arguments that choose the data; None means: as in the settings of the run."""

    data: Path | None  # directory of shards with a validation split
    tokens: int | None
    hellaswag: Path | None  # file
    items: int | None  # of HellaSwag and of each of ``tasks``
    tasks: str | None = None  # see ``choose_tasks``


@dataclass(frozen=True)
class EvalData:
    """The data that every model is measured on; windows, items or both."""

    windows: Windows | None
    count: int  # number of windows, from the first
    items: list[Item] | None
    notes: list[str]  # descriptions of the data and its origin
    tasks: tuple[Task, ...] = ()
    bytes_per_token: float | None = None  # of the windows


@dataclass(frozen=True)
class Measurements:
    """The results of one model."""

    model: OpenedModel  # without its weights
    losses: Array | None  # (windows,) nats
    right: npt.NDArray[np.bool_] | None  # (measures, items)
    tasks: dict[str, Array]  # by name, see ``evaluation.tasks.results``


@dataclass(frozen=True)
class Difference:
    """The results of a model minus those of the first model, over the same windows and items."""

    loss: Estimate | None
    hellaswag: dict[str, Estimate] | None
    tasks: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class EvalRow:
    """The results of one model, as ``eval --json`` prints them."""

    title: str
    path: str
    step: int | None
    tokens: int | None  # trained on
    windows: int  # number of windows that the loss is averaged over
    window_tokens: int | None
    loss: Estimate | None  # nats per token
    perplexity: float | None
    bits_per_byte: Estimate | None
    items: int
    hellaswag: dict[str, Estimate] | None  # share of correct answers by each of ``MEASURES``
    tasks: dict[str, dict[str, Estimate]]  # by name of the evaluation and measure
    difference: Difference | None  # from the first model; None if only one model is evaluated


def find_models(names: Sequence[str], tags: Sequence[str] | None, kind: Weights = "raw") -> list[EvaluatedModel]:
    """Find all models before the first is evaluated, which may take an hour.

    Args:
        names: runs, checkpoints or models from outside of runs; none: the newest run.
        tags: checkpoints of a single run.
        kind: the weights that each model must have.

    Raises:
        UserError: a model does not exist, or has no such weights.
    """
    if len(names) > 1 and tags:
        raise UserError(f"--tag applies to one run, not to {len(names)}: give the paths of the checkpoints instead")
    if len(names) > 1:
        return [_find_model(name, None, kind) for name in names]
    name = names[0] if names else None
    requested: list[str | None] = [*tags] if tags else [None]
    return [_find_model(name, tag, kind) for tag in requested]


def choose_data(sources: EvalSources, models: Sequence[EvaluatedModel], warn: Callable[[str], None]) -> EvalData:
    """Return the data to measure on: as requested, otherwise that of the first model's run.

    Args:
        warn: called with warnings about the dataset.

    Raises:
        UserError: there is no data, or it cannot be read.
    """
    settings = next((model.settings for model in models if model.settings), {})
    data, data_origin = _requested_or_set(sources.data, settings, "data", "dir")
    file, file_origin = _requested_or_set(sources.hellaswag, settings, "hellaswag", "path")
    _check_sources(sources, settings, data, file)
    windows, count, items, notes, mean_bytes = None, 0, None, [], None
    if data is not None:
        shortest = min(model.sequence_length for model in models)
        windows = Windows(open_dataset(data), "val", shortest, warn)
        count = count_windows(windows, sources.tokens or _setting(settings, "validation", "tokens") or DEFAULT_TOKENS)
        mean_bytes = bytes_per_token(windows, count)
        notes.append(f"loss: {counted(count, 'validation window')} of {shortest:,} tokens, {data}{data_origin}")
    if file is not None:
        style: TextStyle = "cleaned" if _setting(settings, "hellaswag", "text") == "cleaned" else "original"
        with tempfile.TemporaryDirectory() as cache:  # not kept: it would save one second
            items = load_items(file, style, Path(cache))[: sources.items]
        notes.append(f"HellaSwag: {counted(len(items), 'item')}, text {style}, {file}{file_origin}")
    tasks = choose_tasks(sources.tasks, settings.get("evaluations", {}), sources.items)
    notes += [f"{task.name}: {counted(len(task.items), 'item')}, {task.path}" for task in tasks]
    notes += _notes_on_truncation({"HellaSwag": items or [], **{task.name: task.items for task in tasks}}, models)
    return EvalData(windows, count, items, [*notes, *_notes_on_lengths(models)], tuple(tasks), mean_bytes)


def measure(model: OpenedModel, data: EvalData, device: torch.device, open_bar: OpenBar) -> Measurements:
    """Evaluate one model.

    Raises:
        UserError: the memory of the GPU is too small, or the data cannot be read.
    """
    losses = right = None
    of_tasks: dict[str, Array] = {}
    try:
        network = load.as_model(model.shape, model.weights).to(device)
        if data.windows is not None:
            with open_bar(f"{model.title}: loss", data.count, "window") as bar:
                losses = window_losses(network, data.windows, data.count, bar.update)
        if data.items is not None:
            with open_bar(f"{model.title}: HellaSwag", len(data.items), "item") as bar:
                right = right_answers(network, data.items, bar.update)
        for task in data.tasks:
            with open_bar(f"{model.title}: {task.name}", len(task.items), "item") as bar:
                of_tasks[task.name] = results(network, task.items, task.measures, bar.update)
    except torch.OutOfMemoryError:
        raise UserError(f"{model.title}: out of GPU memory, try --device cpu") from None
    return Measurements(dataclasses.replace(model, weights={}), losses, right, of_tasks)


def rows_of(measured: Sequence[Measurements], data: EvalData) -> list[EvalRow]:
    """Return one row per model; each but the first model is compared with the first."""
    first = measured[0] if len(measured) > 1 else None
    return [_row(each, first, data) for each in measured]


def _find_model(name: str | None, tag: str | None, kind: Weights) -> EvaluatedModel:
    if (outside := find_outside(name, tag)) is not None:
        check_kind(str(name), None, kind)
        return EvaluatedModel(str(name), load.shape_at(outside).sequence_length, {})
    found = find_checkpoint(name, tag)
    if found.manifest is None:
        raise damaged(found.path, found.problem)
    check_kind(str(found.path), found.manifest, kind)
    settings = current_settings(found.path, found.manifest.settings)
    return EvaluatedModel(str(found.path), shape_of(found.manifest).sequence_length, settings)


def _requested_or_set(
    requested: Path | None, settings: dict[str, Any], section: str, name: str
) -> tuple[Path | None, str]:
    """Return a path and its origin: the requested path, or that of a setting if it exists."""
    if requested is not None:
        return requested, ""
    path = _setting(settings, section, name)
    return (Path(path), f" ({section}.{name} of the run)") if path and Path(path).exists() else (None, "")


def _check_sources(sources: EvalSources, settings: dict[str, Any], data: Path | None, file: Path | None) -> None:
    configured = _setting(settings, "data", "dir")
    no_data = f"; the run's data.dir, {configured}, does not exist" if configured else ""
    if mixture := [str(source["dir"]) for source in _setting(settings, "data", "mixture") or ()]:
        no_data = f"; the run trains on a mixture of {', '.join(mixture)}: give one of them"
    if data is None and file is None and sources.tasks is None:
        fix = "give --data DIR (shards with a validation split) or --hellaswag FILE or --tasks NAMES"
        raise UserError(f"nothing to measure on: {fix}{no_data}")
    if data is None and sources.tokens:
        raise UserError(f"--tokens {sources.tokens}: no data: give --data DIR{no_data}")
    if file is None and sources.tasks is None and sources.items:
        raise UserError(f"--items {sources.items}: no HellaSwag file: give --hellaswag FILE")


def _setting(settings: dict[str, Any], section: str, name: str) -> Any:
    return settings.get(section, {}).get(name)


def _notes_on_lengths(models: Sequence[EvaluatedModel]) -> list[str]:
    lengths = sorted({model.sequence_length for model in models})
    if len(lengths) == 1:
        return []
    known = " and ".join(f"{length:,}" for length in lengths)
    return [
        f"sequence lengths differ ({known} tokens): losses at different lengths are not comparable; all models are"
        f" measured on windows of {lengths[0]:,}"
    ]


def _notes_on_truncation(evaluations: Mapping[str, Sequence[Item]], models: Sequence[EvaluatedModel]) -> Iterator[str]:
    """Yield how many items are too long for the models, by evaluation and sequence length."""
    for name, items in evaluations.items():
        for length in sorted({model.sequence_length for model in models}):
            if (text := describe_truncation(items, length)) is not None:
                yield f"{name}: {text}"


def _row(measured: Measurements, first: Measurements | None, data: EvalData) -> EvalRow:
    manifest = measured.model.manifest
    loss = None if measured.losses is None else mean(measured.losses)
    return EvalRow(
        title=measured.model.title,
        path=str(measured.model.path),
        step=manifest.step if manifest else None,
        tokens=manifest.state.get("tokens") if manifest else None,
        windows=data.count,
        window_tokens=data.windows.sequence_length if data.windows else None,
        loss=loss,
        perplexity=perplexity(loss.value) if loss else None,
        bits_per_byte=_bits_per_byte(loss, data.bytes_per_token),
        items=len(data.items or ()),
        hellaswag=None if measured.right is None else dict(zip(MEASURES, map(share, measured.right), strict=True)),
        tasks={task.name: estimates(measured.tasks[task.name], task.measures) for task in data.tasks},
        difference=_difference(measured, first, data) if first else None,
    )


def _bits_per_byte(loss: Estimate | None, mean_bytes: float | None) -> Estimate | None:
    """Return a loss in bits per byte, without a standard error: the bytes of a window vary too, with its loss."""
    return Estimate(bits_per_byte(loss.value, mean_bytes), None) if loss is not None and mean_bytes else None


def _difference(measured: Measurements, first: Measurements, data: EvalData) -> Difference:
    loss = hellaswag = None
    if measured.losses is not None and first.losses is not None:
        loss = difference(measured.losses, first.losses)
    if measured.right is not None and first.right is not None:
        hellaswag = dict(zip(MEASURES, map(difference, measured.right, first.right), strict=True))
    tasks = {
        task.name: differences(measured.tasks[task.name], first.tasks[task.name], task.measures) for task in data.tasks
    }
    return Difference(loss, hellaswag, tasks)
