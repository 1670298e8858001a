"""Compare our answers on nine published evaluations with those of lm-evaluation-harness, item by item, offline.

The rows are invented, in the format of the hub. One model with random weights is scored twice: by our code, and
exported as a transformers GPT-2 by the harness's own tasks. The harness is not a dependency of this project: see
``benchmarks/hellaswag_harness.py``.

    python benchmarks/evaluations_harness.py --out FILE
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.evaluation_rows import Row, rows_of
from benchmarks.hellaswag_harness import GAIN, SHAPE, exported, scaled
from benchmarks.program import make_parser, report_result
from ds_gpt2.data.evaluation_files import load_items, measures_of
from ds_gpt2.data.prepare.evaluation_sets import PUBLISHED
from ds_gpt2.evaluation import tasks
from ds_gpt2.evaluation.loss import Array
from ds_gpt2.model.gpt2 import GPT2

THEIRS = {  # task files below the harness's folder tasks/
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "winogrande": "winogrande/default.yaml",
}


def main() -> None:
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--items", type=int, default=100, help="number of invented items of each evaluation")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = scaled(GPT2(SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        weights = exported(model, Path(folder) / "exported")
        found = {name: _compare(name, model, weights, options.items, Path(folder)) for name in THEIRS}
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "datasets")}
    setting = f"{SHAPE}, random weights x {GAIN}, fp32"
    report_result(options.out, {"versions": versions, "setting": setting, "items": options.items, "evaluations": found})


def _compare(name: str, model: GPT2, weights: str, count: int, folder: Path) -> dict[str, Any]:
    rows = rows_of(name, count)
    ours = _ours(name, model, rows, folder)
    theirs = _theirs(name, weights, rows, folder)
    compared: dict[str, Any] = {}
    for measure, values in zip(measures_of(name), ours, strict=True):
        other = np.array([sample[measure] for sample in theirs], np.float64)
        if measure == "perplexity":  # the harness has the log-likelihood of an item under this name
            compared["largest difference of a log-likelihood, nats"] = float(np.abs(values - other).max())
        else:
            right = {"items right, ours": int(values.sum()), "items right, theirs": int(other.sum())}
            compared[measure] = {**right, "items that differ": int((values != other).sum())}
    return compared


def _ours(name: str, model: GPT2, rows: list[Row], folder: Path) -> Array:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(PUBLISHED[name].convert(row)) + "\n" for row in rows), encoding="utf-8")
    return tasks.results(model, load_items(path, name), measures_of(name), lambda done: None)


def _theirs(name: str, weights: str, rows: list[Row], folder: Path) -> list[dict[str, Any]]:
    """Return the harness's results per item, in the order of ``rows``."""
    import lm_eval.tasks  # type: ignore[import-not-found]  # not a dependency of this project
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]  # as above

    data = folder / f"{name}_rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    split = PUBLISHED[name].split
    settings = {
        "include": str(Path(lm_eval.tasks.__file__).parent / THEIRS[name]),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
        **dict.fromkeys(("training_split", "validation_split", "test_split"), None),
        f"{split}_split": split,
    }
    task = folder / f"{name}_here.yaml"  # the harness's task with our rows
    task.write_text(yaml.safe_dump(settings), encoding="utf-8")
    lm = HFLM(pretrained=weights, backend="causal", device="cpu", batch_size=8)
    results = lm_eval.simple_evaluate(lm, tasks=[str(task)], bootstrap_iters=0)
    (samples,) = results["samples"].values()
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


if __name__ == "__main__":
    main()
