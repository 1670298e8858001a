"""``prepare``: convert local text or datasets of the Hugging Face hub to token shards; download evaluations."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from ds_gpt2.commands.arguments import path, positive
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import MISSING, counted, table
from ds_gpt2.common.host import usable_cores
from ds_gpt2.data.dataset import Dataset
from ds_gpt2.data.prepare import datasets, evaluation_sets, hub_datasets
from ds_gpt2.data.prepare.chunking import SEPARATOR
from ds_gpt2.data.prepare.datasets import HELLASWAG_DIR, SAMPLE_DIR, Destination
from ds_gpt2.data.prepare.documents import COLUMN
from ds_gpt2.data.prepare.formats import FORMS
from ds_gpt2.data.prepare.hub_datasets import Repository
from ds_gpt2.data.prepare.sources import Reading
from ds_gpt2.run_dir import exit_codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    sample = kinds.add_parser("sample", help="text of the Python installation: its manual and library sources")
    sample.add_argument(
        "--out", type=path("--out"), default=SAMPLE_DIR, metavar="DIR", help="output directory (default: data/sample)"
    )
    text = kinds.add_parser("text", help="your own text, JSON Lines or Parquet files, or directories of them")
    text.add_argument(
        "files", nargs="+", type=path("FILE"), metavar="FILE", help="files, or directories that are searched for them"
    )
    text.add_argument(
        "--separator",
        type=separator,
        metavar="TEXT",
        help="text that separates documents, for example '<|endoftext|>', taken literally; for a line end write"
        " $'\\n' in bash (default: each text file is one document)",
    )
    text.add_argument(
        "--encoding", metavar="NAME", help="encoding of text files (default: UTF-8, or from the byte order mark)"
    )
    text.add_argument("--format", choices=FORMS, help="format of the named files (default: from the file extension)")
    hub = kinds.add_parser("hub", help="any dataset on the Hugging Face hub that has Parquet files")
    hub.add_argument("repository", metavar="OWNER/NAME", help="the dataset's name on the hub")
    hub.add_argument("--path", default="", metavar="DIR", help="only the files below this directory of the dataset")
    hub.add_argument("--revision", default="main", metavar="NAME", help="a branch, tag or commit (default: main)")
    edu = kinds.add_parser("fineweb-edu", help="FineWeb-Edu: educational web text")
    fineweb = kinds.add_parser("fineweb", help="FineWeb: web text")
    for kind in (edu, fineweb):
        kind.add_argument(
            "--sample",
            choices=hub_datasets.SAMPLES,
            default=hub_datasets.SAMPLES[0],
            help="size of the sample in GPT-2 tokens (default: 10BT)",
        )
    webtext = kinds.add_parser("openwebtext", help="OpenWebText")
    tokens = kinds.add_parser("pretokenized", help="published GPT-2 token shards")
    tokens.add_argument("name", metavar="NAME", help=f"{', '.join(hub_datasets.TOKENS)}, or OWNER/NAME on the hub")
    for kind in (text, hub):
        kind.add_argument("--column", default=COLUMN, metavar="NAME", help="column with the text (default: text)")
    for kind in (text, hub, edu, fineweb, webtext, tokens):
        kind.add_argument(
            "--out",
            type=path("--out"),
            metavar="DIR",
            help="output directory (default: in data/, named after the input)",
        )
        kind.add_argument("--tokens", type=positive, metavar="N", help="maximum number of tokens (default: all)")
    for kind in (sample, text, hub, edu, fineweb, webtext):
        kind.add_argument("--workers", type=_workers, metavar="N", help="number of processes (default: one per core)")
    evaluation = kinds.add_parser("evaluation", help="items of a published evaluation, such as arc_easy or lambada")
    evaluation.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(evaluation_sets.PUBLISHED)}, or all")
    evaluation.add_argument("--list", action="store_true", help="list the evaluations and which of them are prepared")
    evaluation.add_argument(
        "--out",
        type=path("--out"),
        default=evaluation_sets.DIR,
        metavar="DIR",
        help="output directory (default: data/evaluations)",
    )
    evaluation.add_argument(
        "--from",
        type=path("--from"),
        dest="source",
        metavar="FILE",
        help="use this file instead of downloading: Parquet or JSON Lines with the fields of the hub",
    )
    items = kinds.add_parser("hellaswag", help="HellaSwag's validation items, downloaded or from a local file")
    items.add_argument(
        "--out",
        type=path("--out"),
        default=HELLASWAG_DIR,
        metavar="DIR",
        help="output directory (default: data/hellaswag)",
    )
    items.add_argument(
        "--from", type=path("--from"), dest="source", metavar="FILE", help="use this file instead of downloading"
    )


def run(options: argparse.Namespace) -> int:
    if options.kind == "hellaswag":
        with _empty_directories_removed(options.out):
            prepared = datasets.prepare_hellaswag(options.out, options.source)
        kind = "the original file" if prepared.is_original else "not the original file byte for byte"
        print(f"{counted(prepared.items, 'item')} in {prepared.path}: {kind}")
    elif options.kind == "evaluation":
        _prepare_evaluations(options)
    else:
        report(_prepare(options))
    return exit_codes.DONE


def _prepare_evaluations(options: argparse.Namespace) -> None:
    """Prepare evaluations, or list them.

    Raises:
        UserError: there is no such evaluation, or it cannot be read, downloaded or written.
    """
    if options.list:
        print(table([["evaluation", "repository", "split", "items", "revision"], *_evaluations(options.out)]))
        return
    names = options.names
    if not names:
        raise UserError(f"give one of {', '.join(evaluation_sets.PUBLISHED)}, or all")
    evaluation_sets.check_names(name for name in names if name != "all")
    if "all" in names:
        names = list(evaluation_sets.PUBLISHED)
    if options.source is not None and len(names) > 1:
        raise UserError(f"--from gives one file, not those of {len(names)} evaluations: give one name")
    for name in names:
        with _empty_directories_removed(options.out):
            path, record = evaluation_sets.prepare_evaluation(name, options.out, options.source)
        at = f" at {record.revision[:12]}" if record.revision else ""
        print(f"{name}: {counted(record.items, 'item')} in {path}, from {record.source}{at}", flush=True)


def _evaluations(directory: Path) -> Iterator[list[str]]:
    for name, published in evaluation_sets.PUBLISHED.items():
        record = evaluation_sets.read_record(directory / f"{name}.jsonl")
        found = [MISSING, MISSING] if record is None else [f"{record.items:,}", (record.revision or "local file")[:12]]
        yield [name, published.repository, published.split, *found]


@contextlib.contextmanager
def _empty_directories_removed(out: Path) -> Iterator[None]:
    """If the body fails, delete ``out`` and its parents as far as the body has created them and they are empty."""
    missing = [directory for directory in (out, *out.parents) if not directory.exists()]
    try:
        yield
    except BaseException:
        for directory in missing:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _prepare(options: argparse.Namespace) -> Dataset:
    if options.kind == "sample":
        return datasets.prepare_sample(options.out, options.workers)
    to = Destination(options.out, options.tokens, getattr(options, "workers", None))
    if options.kind == "text":
        reading = Reading(options.column, options.separator, options.encoding, options.format)
        return datasets.prepare_text(options.files, reading, to)
    if options.kind == "pretokenized":
        return datasets.download_shards(options.name, to)
    repository = _repository(options)
    name = options.kind if options.kind != "hub" else repository.name
    return datasets.prepare_from_hub(repository, name, getattr(options, "column", COLUMN), to)


def separator(text: str) -> str:
    """Parse a text that is not empty, as a type for argparse."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty: give the text between two documents")
    return text


def _workers(text: str) -> int:
    """Parse a number of processes, as a type for argparse."""
    number, limit = positive(text), max(64, 8 * usable_cores())
    if number > limit:
        raise argparse.ArgumentTypeError(f"{number} processes on {usable_cores()} cores: at most {limit}")
    return number


def _repository(options: argparse.Namespace) -> Repository:
    if options.kind == "fineweb-edu":
        return hub_datasets.fineweb_edu(options.sample)
    if options.kind == "fineweb":
        return hub_datasets.fineweb(options.sample)
    if options.kind == "openwebtext":
        return hub_datasets.OPENWEBTEXT
    return Repository(options.repository, options.path, options.revision)


def report(dataset: Dataset) -> None:
    """Print the size of a dataset and notes on its text."""
    print(
        f"data in {dataset.dir}: {dataset.tokens('train'):,} training and {dataset.tokens('val'):,} validation tokens"
        f" from {dataset.source}"
    )
    if skipped := dataset.counts.get("unreadable"):
        print(f"skipped {counted(skipped, 'document')}, damaged or without text")
    if replaced := dataset.counts.get("replacement"):
        print(
            f"the text contains {counted(replaced, 'character')} U+FFFD, which"
            " replaces invalid bytes or was already in the text"
        )
    if control := dataset.counts.get("control"):
        print(f"the text contains {counted(control, 'control character')}, such as NUL")
    if marks := dataset.counts.get("endoftext"):
        times = counted(marks, "time")
        print(f"the text contains {SEPARATOR} {times}, tokenized as ordinary characters: see --separator")
