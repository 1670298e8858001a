"""Compare our HellaSwag answers on ``cleaned`` text with those of lm-evaluation-harness, item by item, offline.

One model with random weights is scored twice: by our code, and exported as a transformers GPT-2 by the harness's own
task. The harness is not a dependency of this project: install "lm_eval[hf]==0.4.13" into a separate environment, or
with ``pip install --target DIR`` into a directory of PYTHONPATH.

    python benchmarks/hellaswag_harness.py --file data/hellaswag/hellaswag_val.jsonl --out FILE
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

from benchmarks.program import make_parser, report_result
from ds_gpt2.data.hellaswag import load_items
from ds_gpt2.evaluation.scoring import MEASURES, Scores, score
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.pretrained import huggingface
from ds_gpt2.pretrained.tokenizer_files import write_tokenizer

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

SHAPE = ModelShape(layers=2, heads=2, width=64, sequence_length=256)
GAIN = 5.0  # factor of the initial weights; makes the logits differ clearly
THEIRS = {
    "acc": "acc",
    "acc_norm": "acc_norm_chars",
    "acc_bytes": "acc_norm_bytes",
}  # the harness's names of our measures


def main() -> None:
    parser = make_parser(__doc__, "--file", "--out")
    parser.add_argument("--items", type=int, default=300, help="number of items, evenly spaced in the file")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = scaled(GPT2(SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = _sample(options.file, options.items, Path(folder))
        ours = score(model, load_items(file, "cleaned", Path(folder)))
        theirs = _harness(model, file, Path(folder))
    report_result(options.out, _compare(ours, theirs))


def _sample(file: Path, items: int, folder: Path) -> Path:
    """Write a file of ``items`` lines, evenly spaced in ``file``."""
    lines = file.read_bytes().splitlines(keepends=True)
    sample = folder / "sample.jsonl"
    sample.write_bytes(b"".join(lines[number * len(lines) // items] for number in range(items)))
    return sample


@torch.no_grad()
def scaled(model: GPT2) -> GPT2:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(GAIN)
    return model


def _harness(model: GPT2, file: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the harness's results per item: log-likelihoods, and correctness by each measure."""
    os.environ["HF_HOME"] = str(folder)
    import lm_eval.tasks  # type: ignore[import-not-found]  # not a dependency of this project
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]  # as above

    task = folder / "hellaswag_here.yaml"  # the harness's task with our file
    settings = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "training_split": None,
        "metric_list": [{"metric": measure} for measure in THEIRS],
    }
    task.write_text(yaml.safe_dump(settings), encoding="utf-8")
    lm = HFLM(pretrained=exported(model, folder / "exported"), backend="causal", device="cpu", batch_size=8)
    results = lm_eval.simple_evaluate(lm, tasks=[str(task)], bootstrap_iters=0)
    return sorted(results["samples"]["hellaswag"], key=lambda sample: int(sample["doc_id"]))


def exported(model: GPT2, directory: Path) -> str:
    """Write model and tokenizer as ``export`` does; return the directory."""
    directory.mkdir()
    config = huggingface.config_of(model.shape, 0.0, "float32")
    (directory / huggingface.CONFIG).write_text(json.dumps(config), encoding="utf-8")
    huggingface.write_weights(dict(model.state_dict()), directory / huggingface.WEIGHTS, torch.float32)
    write_tokenizer(directory, model.shape.sequence_length)
    return str(directory)


def _compare(ours: Scores, theirs: list[dict[str, Any]]) -> dict[str, Any]:
    sums = np.array([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in theirs])
    right = ours.answers() == ours.labels
    measures = {
        name: {
            "ours": f"hellaswag/{measure}",
            "items right, ours": int(right[MEASURES.index(measure)].sum()),
            "items right, theirs": int(sum(sample[name] for sample in theirs)),
            "items that differ": int(
                (right[MEASURES.index(measure)] != np.array([sample[name] == 1 for sample in theirs])).sum()
            ),
        }
        for name, measure in THEIRS.items()
    }
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "datasets")},
        "setting": f"{SHAPE}, random weights x {GAIN}, fp32",
        "items": len(theirs),
        "measures": measures,
        "largest difference of a log-likelihood, nats": float(np.abs(sums - ours.sums).max()),
        "mean log-likelihood, nats": float(sums.mean()),
    }


if __name__ == "__main__":
    main()
