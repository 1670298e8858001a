"""``eval``: how good models on disk are, on the same held-out text and the same HellaSwag items, in one table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ds_gpt2.commands.arguments import path, positive
from ds_gpt2.commands.models import Opened, find_checkpoint, find_outside, open_model, shape_of
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import MISSING, fixed, table, tokens
from ds_gpt2.config.run_location import settings_now
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.hellaswag import Item, TextStyle, load_items
from ds_gpt2.distributed import device
from ds_gpt2.evaluation.hellaswag_scoring import MEASURES
from ds_gpt2.evaluation.loss import (
    Array,
    Estimate,
    count_windows,
    difference,
    mean,
    perplexity,
    right_answers,
    share,
    window_losses,
)
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.pretrained import load
from ds_gpt2.run_dir import exit_report

_TOKENS = 1_048_576  # to measure the loss on, where no settings say how many
_SHOWN = ("acc", "acc_norm")  # of ``MEASURES``; the others are in the JSON


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="runs, checkpoints, exported files, Hugging Face directories or names on the hub (default: newest run)",
    )
    parser.add_argument(
        "--tag", action="append", metavar="TAG", help="which checkpoint of the run; give several for a row each"
    )
    parser.add_argument(
        "--data",
        type=path("--data"),
        metavar="DIR",
        help="shards with a validation split (default: the run's data.dir)",
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help=f"of the split (default: the run's, or {_TOKENS:,})"
    )
    parser.add_argument(
        "--hellaswag",
        type=path("--hellaswag"),
        metavar="FILE",
        help="its items (default: the run's hellaswag.path, if it is there)",
    )
    parser.add_argument("--items", type=positive, metavar="N", help="the first N of HellaSwag's (default: all)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(options: argparse.Namespace) -> int:
    where = _choose(options.device)  # before DeepSpeed is imported, which reading checkpoints does
    subjects = _find(options.what, options.tag)
    exam = _set_exam(options, subjects)
    for note in exam.notes:
        print(note, file=sys.stderr if options.json else sys.stdout, flush=True)
    results = [_examine(subject, exam, where) for subject in subjects]
    rows = [_row(result, results[0] if len(results) > 1 else None, exam) for result in results]
    print(json.dumps({"rows": [_plain(dataclasses.asdict(row)) for row in rows]}) if options.json else _report(rows))
    if broken := [row.title for row in rows if row.loss is not None and not math.isfinite(row.loss.value)]:
        print(f"the loss of {', '.join(broken)} is not finite: the weights are broken", file=sys.stderr)
        return exit_report.CRASHED
    return exit_report.DONE


def _choose(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: PyTorch {torch.__version__} sees no GPU; leave it out, or give --device cpu")
    return device.choose(wanted)


@dataclass(frozen=True)
class _Subject:
    """A model that is there, not read yet: what ``open_model`` is to be given, and what is known before."""

    name: str
    sequence_length: int
    settings: dict[str, Any]  # of its run; empty if it comes from outside of one


def _find(names: Sequence[str], tags: Sequence[str] | None) -> list[_Subject]:
    """All of them are looked up first: a mistyped last one is not to be told after an hour.

    Raises:
        UserError: one is not there.
    """
    if len(names) > 1 and tags:
        raise UserError(f"--tag goes with one run, not with {len(names)}: give the checkpoints' paths instead")
    if len(names) > 1:
        return [_look(name, None) for name in names]
    name = names[0] if names else None
    wanted: list[str | None] = [*tags] if tags else [None]
    return [_look(name, tag) for tag in wanted]


def _look(name: str | None, tag: str | None) -> _Subject:
    if (outside := find_outside(name, tag)) is not None:
        return _Subject(str(name), load.shape_at(outside).sequence_length, {})
    found = find_checkpoint(name, tag)
    if found.manifest is None:
        raise UserError(f"{found.path} is damaged ({found.problem}): choose another with --tag, see `list`")
    settings = settings_now(found.path, found.manifest.settings)
    return _Subject(str(found.path), shape_of(found.manifest).sequence_length, settings)


@dataclass(frozen=True)
class _Exam:
    """What every model is measured on; at least one of the two."""

    windows: Windows | None
    count: int  # of windows, the first ones
    items: list[Item] | None
    notes: list[str]  # what that is and where it comes from, for people


def _set_exam(options: argparse.Namespace, subjects: Sequence[_Subject]) -> _Exam:
    """
    Raises:
        UserError: there is nothing to measure on, or what was given cannot be read.
    """
    settings = next((subject.settings for subject in subjects if subject.settings), {})
    data, of_data = _given_or_set(options.data, settings, "data", "dir")
    file, of_file = _given_or_set(options.hellaswag, settings, "hellaswag", "path")
    _check_something_to_measure_on(options, settings, data, file)
    windows, count, items, notes = None, 0, None, []
    if data is not None:
        shortest = min(subject.sequence_length for subject in subjects)
        windows = Windows(open_dataset(data), "val", shortest, warn=_tell)
        count = count_windows(windows, options.tokens or _setting(settings, "validation", "tokens") or _TOKENS)
        notes.append(f"loss: {count:,} validation windows of {shortest:,} tokens, {data}{of_data}")
    if file is not None:
        style: TextStyle = "cleaned" if _setting(settings, "hellaswag", "text") == "cleaned" else "original"
        with tempfile.TemporaryDirectory() as nowhere:  # a cache would save one second
            items = load_items(file, style, Path(nowhere))[: options.items]
        notes.append(f"HellaSwag: {len(items):,} items, text {style}, {file}{of_file}")
    return _Exam(windows, count, items, [*notes, *_note_lengths(subjects)])


def _given_or_set(given: Path | None, settings: dict[str, Any], section: str, name: str) -> tuple[Path | None, str]:
    """A path, and where it comes from: the command line, or the settings where there is something at it."""
    if given is not None:
        return given, ""
    path = _setting(settings, section, name)
    return (Path(path), f" ({section}.{name} of the run)") if path and Path(path).exists() else (None, "")


def _check_something_to_measure_on(
    options: argparse.Namespace, settings: dict[str, Any], data: Path | None, file: Path | None
) -> None:
    gone = _setting(settings, "data", "dir")
    no_data = f"; the run's data.dir, {gone}, is not there" if gone else ""
    if data is None and file is None:
        fix = "give --data DIR (shards with a validation split) or --hellaswag FILE"
        raise UserError(f"nothing to measure on: {fix}{no_data}")
    if data is None and options.tokens:
        raise UserError(f"--tokens {options.tokens}: of which data? give --data DIR{no_data}")
    if file is None and options.items:
        raise UserError(f"--items {options.items}: of which file? give --hellaswag FILE")


def _setting(settings: dict[str, Any], section: str, name: str) -> Any:
    return settings.get(section, {}).get(name)


def _note_lengths(subjects: Sequence[_Subject]) -> list[str]:
    lengths = sorted({subject.sequence_length for subject in subjects})
    if len(lengths) == 1:
        return []
    known = " and ".join(f"{length:,}" for length in lengths)
    return [
        f"sequence lengths differ ({known} tokens): losses at a model's own length do not compare, all are of"
        f" windows of {lengths[0]:,}"
    ]


@dataclass(frozen=True)
class _Result:
    """What one model made of the exam."""

    opened: Opened  # without its weights
    losses: Array | None  # (windows,) nats
    right: npt.NDArray[np.bool_] | None  # (measures, items)


def _examine(subject: _Subject, exam: _Exam, where: torch.device) -> _Result:
    opened = open_model(subject.name, None)
    if opened.note is not None:
        print(f"{opened.title}: {opened.note}", file=sys.stderr, flush=True)
    try:
        model = load.as_model(opened.shape, opened.weights).to(where)
        losses, right = _losses(model, exam, opened.title), _right(model, exam, opened.title)
    except torch.OutOfMemoryError:
        raise UserError(f"{opened.title}: the GPU's memory does not suffice, try --device cpu") from None
    return _Result(dataclasses.replace(opened, weights={}), losses, right)


def _losses(model: GPT2, exam: _Exam, title: str) -> Array | None:
    if exam.windows is None:
        return None
    with _bar(f"{title}: loss", exam.count, "window") as bar:
        return window_losses(model, exam.windows, exam.count, bar.update)


def _right(model: GPT2, exam: _Exam, title: str) -> npt.NDArray[np.bool_] | None:
    if exam.items is None:
        return None
    with _bar(f"{title}: HellaSwag", len(exam.items), "item") as bar:
        return right_answers(model, exam.items, bar.update)


def _bar(what: str, total: int, unit: str) -> tqdm[NoReturn]:
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=None)


def _tell(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


@dataclass(frozen=True)
class Difference:
    """A model less the first one of the table, over the same windows and items."""

    loss: Estimate | None
    hellaswag: dict[str, Estimate] | None


@dataclass(frozen=True)
class EvalRow:
    """One model, as ``eval --json`` prints it."""

    title: str
    path: str
    step: int | None
    tokens: int | None  # trained on
    windows: int  # that the loss is a mean over, of so many tokens:
    window_tokens: int | None
    loss: Estimate | None  # nats a token
    perplexity: float | None
    items: int
    hellaswag: dict[str, Estimate] | None  # share of right answers by each of ``MEASURES``
    less_first: Difference | None  # None where there is one row only


def _row(result: _Result, first: _Result | None, exam: _Exam) -> EvalRow:
    known = result.opened.manifest
    loss = None if result.losses is None else mean(result.losses)
    return EvalRow(
        title=result.opened.title,
        path=str(result.opened.path),
        step=known.step if known else None,
        tokens=known.state.get("tokens") if known else None,
        windows=exam.count,
        window_tokens=exam.windows.sequence_length if exam.windows else None,
        loss=loss,
        perplexity=perplexity(loss.value) if loss else None,
        items=len(exam.items or ()),
        hellaswag=None if result.right is None else dict(zip(MEASURES, map(share, result.right), strict=True)),
        less_first=_less(result, first) if first else None,
    )


def _less(result: _Result, first: _Result) -> Difference:
    loss = hellaswag = None
    if result.losses is not None and first.losses is not None:
        loss = difference(result.losses, first.losses)
    if result.right is not None and first.right is not None:
        hellaswag = dict(zip(MEASURES, map(difference, result.right, first.right), strict=True))
    return Difference(loss, hellaswag)


def _plain(value: Any) -> Any:
    """For JSON, which has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(rows: Sequence[EvalRow]) -> str:
    head = ["model", "step", "tokens", "loss", "perplexity", *_SHOWN, "items"]
    parts = ["", table([head, *map(_cells, rows)])]
    if len(rows) > 1:
        differing = [["less the first", "loss", *_SHOWN], *map(_cells_of_difference, rows[1:])]
        parts += ["", table(differing), "a difference of less than two of its errors may well be chance"]
    return "\n".join(parts)


def _cells(row: EvalRow) -> list[str]:
    return [
        row.title,
        MISSING if row.step is None else f"{row.step:,}",
        MISSING if row.tokens is None else tokens(row.tokens),
        _with_error(row.loss),
        fixed(row.perplexity, 2),
        *(_with_error(row.hellaswag[measure] if row.hellaswag else None) for measure in _SHOWN),
        f"{row.items:,}" if row.items else MISSING,
    ]


def _cells_of_difference(row: EvalRow) -> list[str]:
    less = row.less_first
    assert less is not None
    accuracies = (less.hellaswag[measure] if less.hellaswag else None for measure in _SHOWN)
    return [row.title, *(_with_error(estimate, "+") for estimate in (less.loss, *accuracies))]


def _with_error(estimate: Estimate | None, sign: str = "") -> str:
    """``3.2874 ± 0.0031``: the value and its standard error."""
    if estimate is None:
        return MISSING
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:.4f}"
    return f"{estimate.value:{sign}.4f}{error}"
