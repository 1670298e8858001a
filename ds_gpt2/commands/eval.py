"""``eval``: evaluate models on the same held-out text and the same items of evaluations."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from ds_gpt2.checkpoint.manifest import Weights
from ds_gpt2.commands.arguments import add_weights_argument, path, positive
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import MISSING, fixed, signed, table, tokens
from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES
from ds_gpt2.distributed import device
from ds_gpt2.evaluation.loss import Estimate
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.models import evaluate
from ds_gpt2.tools.models.evaluate import DEFAULT_TOKENS, EvalData, EvalRow, EvalSources, EvaluatedModel, Measurements
from ds_gpt2.tools.models.open import open_model

_SHOWN = ("acc", "acc_norm")  # of ``MEASURES``; the JSON has all of them
_OF_TASKS = ("acc", "acc_norm", "perplexity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="MODEL",
        help="runs, checkpoints, exported files, Hugging Face directories or names on the hub (default: newest run)",
    )
    parser.add_argument(
        "--tag", action="append", metavar="TAG", help="which checkpoint of the run; repeat it for several rows"
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--data",
        type=path("--data"),
        metavar="DIR",
        help="shards with a validation split (default: the run's data.dir)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help=f"number of validation tokens (default: as in the run, or {DEFAULT_TOKENS:,})",
    )
    parser.add_argument(
        "--hellaswag",
        type=path("--hellaswag"),
        metavar="FILE",
        help="HellaSwag file (default: the run's hellaswag.path, if it exists)",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help=f"evaluations, separated by commas: {', '.join(EVALUATION_NAMES)}, those of the run's settings, NAME=FILE"
        " for items of your own, or all that are prepared (default: none)",
    )
    parser.add_argument(
        "--items", type=positive, metavar="N", help="only the first N items of HellaSwag and each task (default: all)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(options: argparse.Namespace) -> int:
    chosen = _choose_device(options.device)  # before reading a checkpoint imports DeepSpeed
    models = evaluate.find_models(options.what, options.tag, options.weights)
    sources = EvalSources(options.data, options.tokens, options.hellaswag, options.items, options.tasks)
    data = evaluate.choose_data(sources, models, _warn)
    for note in data.notes:
        print(note, file=sys.stderr if options.json else sys.stdout, flush=True)
    rows = evaluate.rows_of([_measure(model, options.weights, data, chosen) for model in models], data)
    print(json.dumps({"rows": [_row_of_json(row) for row in rows]}) if options.json else _report(rows))
    if broken := [row.title for row in rows if row.loss is not None and not math.isfinite(row.loss.value)]:
        print(f"the loss of {', '.join(broken)} is not finite: the weights are broken", file=sys.stderr)
        return exit_codes.CRASHED
    return exit_codes.DONE


def _choose_device(requested: str) -> torch.device:
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: PyTorch {torch.__version__} finds no GPU; omit it, or give --device cpu")
    return device.choose(requested)


def _measure(model: EvaluatedModel, kind: Weights, data: EvalData, chosen: torch.device) -> Measurements:
    opened = open_model(model.name, None, kind)
    if opened.note is not None:
        print(f"{opened.title}: {opened.note}", file=sys.stderr, flush=True)
    return evaluate.measure(opened, data, chosen, _bar)


def _bar(title: str, total: int, unit: str) -> tqdm[NoReturn]:
    return tqdm(total=total, desc=title, unit=unit, leave=False, disable=None)


def _warn(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def _row_of_json(row: EvalRow) -> dict[str, Any]:
    content = _plain(dataclasses.asdict(row))
    return {**content, "less_first": content["difference"]}  # "less_first": the key of earlier versions


def _plain(value: Any) -> Any:
    """Return a value for JSON, which has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(rows: Sequence[EvalRow]) -> str:
    head = ["model", "step", "tokens", "loss", "perplexity", "bits/byte", *_SHOWN, "items"]
    parts = ["", table([head, *map(_cells, rows)])]
    if len(rows) > 1:
        differences = [["minus the first", "loss", *_SHOWN], *map(_cells_of_difference, rows[1:])]
        parts += ["", table(differences), "a difference below two standard errors may be due to chance"]
    if any(row.tasks for row in rows):
        parts += ["", table([["model", "evaluation", *_OF_TASKS], *_rows_of_tasks(rows)])]
    return "\n".join(parts)


def _rows_of_tasks(rows: Sequence[EvalRow]) -> list[list[str]]:
    """Return a row for each model and evaluation; then, for each further model, its difference from the first."""
    found = [
        [row.title, name, *(_with_error(measured.get(measure)) for measure in _OF_TASKS)]
        for row in rows
        for name, measured in row.tasks.items()
    ]
    for row in rows:
        for name, less in row.difference.tasks.items() if row.difference and row is not rows[0] else ():
            cells = (_with_error(less.get(measure), signed) for measure in _OF_TASKS)
            found.append([f"{row.title}, minus the first", name, *cells])
    return found


def _cells(row: EvalRow) -> list[str]:
    return [
        row.title,
        MISSING if row.step is None else f"{row.step:,}",
        MISSING if row.tokens is None else tokens(row.tokens),
        _with_error(row.loss),
        fixed(row.perplexity, 2),
        fixed(None if row.bits_per_byte is None else row.bits_per_byte.value, 4),
        *(_with_error(row.hellaswag[measure] if row.hellaswag else None) for measure in _SHOWN),
        f"{row.items:,}" if row.items else MISSING,
    ]


def _cells_of_difference(row: EvalRow) -> list[str]:
    less = row.difference
    assert less is not None
    accuracies = (less.hellaswag[measure] if less.hellaswag else None for measure in _SHOWN)
    return [row.title, *(_with_error(estimate, signed) for estimate in (less.loss, *accuracies))]


def _with_error(estimate: Estimate | None, format_value: Callable[[float, int], str] = fixed) -> str:
    """Return the value and its standard error, as ``3.2874 ± 0.0031``."""
    if estimate is None:
        return MISSING
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:.4f}"
    return f"{format_value(estimate.value, 4)}{error}"
