"""``prepare sample`` and ``prepare text``: text to token shards; ``prepare hellaswag``: the items to evaluate on."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_gpt2 import outcome
from ds_gpt2.commands.arguments import positive
from ds_gpt2.config import PROJECT_DIR
from ds_gpt2.data import hellaswag
from ds_gpt2.data.dataset import Dataset, open_dataset
from ds_gpt2.data.prepare import Recipe, is_prepared, prepare
from ds_gpt2.data.sources import COLUMN, local_source, python_source

SAMPLE_DIR = PROJECT_DIR / "data" / "sample"
HELLASWAG_DIR = PROJECT_DIR / "data" / "hellaswag"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="sample|text|hellaswag")
    sample = kinds.add_parser("sample", help="text that every Python has: its manual and its library's sources")
    sample.add_argument("--out", type=Path, default=SAMPLE_DIR, metavar="DIR")
    text = kinds.add_parser("text", help="your own .txt, .md, .rst, .jsonl or .parquet files, or directories of them")
    text.add_argument("files", nargs="+", type=Path, metavar="FILE")
    text.add_argument("--out", type=Path, default=PROJECT_DIR / "data" / "text", metavar="DIR")
    text.add_argument("--column", default=COLUMN, metavar="NAME", help="field of .jsonl, column of .parquet files")
    text.add_argument("--tokens", type=positive, metavar="N", help="stop after so many (default: all)")
    for kind in (sample, text):
        kind.add_argument("--workers", type=positive, metavar="N", help="processes (default: every core)")
    items = kinds.add_parser("hellaswag", help="HellaSwag's validation items, downloaded or from a file of yours")
    items.add_argument("--out", type=Path, default=HELLASWAG_DIR, metavar="DIR")
    items.add_argument("--from", type=Path, dest="source", metavar="FILE", help="take this file, download nothing")


def run(options: argparse.Namespace) -> int:
    if options.kind == "sample":
        prepare_sample(options.out, options.workers)
    elif options.kind == "hellaswag":
        prepare_hellaswag(options.out, options.source)
    else:
        source = local_source(options.files, options.column)
        _say(prepare(source, options.out.absolute(), Recipe(tokens=options.tokens), workers=options.workers))
    return outcome.DONE


def prepare_sample(out: Path = SAMPLE_DIR, workers: int | None = None) -> None:
    """Make the sample unless it is there already."""
    if is_prepared(out):
        _say(open_dataset(out))
    else:
        _say(prepare(python_source(), out.absolute(), workers=workers))


def prepare_hellaswag(out: Path, source: Path | None) -> None:
    """Put the validation file into ``out`` unless it is there already."""
    path = out / hellaswag.FILE
    if source is not None:
        hellaswag.copy(source, path)
    elif not hellaswag.is_original(path):
        hellaswag.fetch(path, hellaswag.URL, hellaswag.SHA256)
    items = sum(1 for _ in hellaswag.read_questions(path))
    kind = "the original file" if hellaswag.is_original(path) else "not the original file byte for byte"
    print(f"{items:,} items in {path}: {kind}")


def _say(dataset: Dataset) -> None:
    print(
        f"data in {dataset.dir}: {dataset.tokens('train'):,} training and {dataset.tokens('val'):,} validation tokens"
        f" from {dataset.source}"
    )
