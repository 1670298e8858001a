"""``prepare``: convert local text or datasets of the Hugging Face hub to token shards; download HellaSwag."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

from ds_gpt2.commands.arguments import path, positive
from ds_gpt2.common.host import usable_cores
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.data import hellaswag
from ds_gpt2.data.dataset import UNFINISHED, Dataset, open_dataset
from ds_gpt2.data.prepare import formats, hub_datasets
from ds_gpt2.data.prepare.chunking import SEPARATOR
from ds_gpt2.data.prepare.documents import COLUMN
from ds_gpt2.data.prepare.formats import FORMS
from ds_gpt2.data.prepare.holdout import FirstTokens
from ds_gpt2.data.prepare.hub import hub_source
from ds_gpt2.data.prepare.hub_datasets import Repository
from ds_gpt2.data.prepare.output import workplace
from ds_gpt2.data.prepare.pipeline import Recipe, is_prepared, prepare
from ds_gpt2.data.prepare.pretokenized import fetch_shards
from ds_gpt2.data.prepare.sources import Reading, local_source, python_source
from ds_gpt2.run_dir import exit_report

log = logging.getLogger(__name__)

SAMPLE_DIR = PROJECT_DIR / "data" / "sample"
HELLASWAG_DIR = PROJECT_DIR / "data" / "hellaswag"

_EARLIER = PROJECT_DIR / "data" / f"text{UNFINISHED}"  # the output of `prepare text` in earlier versions
_TAKEN = {"sample", "hellaswag", "fineweb", "fineweb-edu", "openwebtext", *hub_datasets.TOKENS}  # names of other kinds
_HELD_OUT, _HELD_OUT_SHARE = 100_000_000, 0.02  # of the hub's datasets: the smaller of a number of tokens and a share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    sample = kinds.add_parser("sample", help="text of the Python installation: its manual and library sources")
    sample.add_argument("--out", type=path("--out"), default=SAMPLE_DIR, metavar="DIR")
    text = kinds.add_parser("text", help="your own text, JSON Lines or Parquet files, or directories of them")
    text.add_argument("files", nargs="+", type=path("FILE"), metavar="FILE")
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
    hub.add_argument("repository", metavar="OWNER/NAME")
    hub.add_argument("--path", default="", metavar="DIR", help="only the files below this directory of the dataset")
    hub.add_argument("--revision", default="main", metavar="NAME", help="a branch, tag or commit (default: main)")
    edu = kinds.add_parser("fineweb-edu", help="FineWeb-Edu: educational web text")
    fineweb = kinds.add_parser("fineweb", help="FineWeb: web text")
    for kind in (edu, fineweb):
        kind.add_argument(
            "--sample", choices=hub_datasets.SAMPLES, default=hub_datasets.SAMPLES[0], help="(default: 10BT)"
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
    items = kinds.add_parser("hellaswag", help="HellaSwag's validation items, downloaded or from a local file")
    items.add_argument("--out", type=path("--out"), default=HELLASWAG_DIR, metavar="DIR")
    items.add_argument(
        "--from", type=path("--from"), dest="source", metavar="FILE", help="use this file instead of downloading"
    )


def run(options: argparse.Namespace) -> int:
    if options.kind == "sample":
        prepare_sample(options.out, options.workers)
    elif options.kind == "hellaswag":
        prepare_hellaswag(options.out, options.source)
    elif options.kind == "text":
        _report(_prepare_text(options))
    elif options.kind == "pretokenized":
        repository = hub_datasets.TOKENS.get(options.name, Repository(options.name))
        _report(fetch_shards(repository, _out(options, options.name), options.tokens))
    else:
        _report(_prepare_from_hub(options))
    return exit_report.DONE


def separator(text: str) -> str:
    """Parse a text that is not empty, as a type for argparse."""
    if not text:
        raise ValueError(text)
    return text


def _workers(text: str) -> int:
    """Parse a number of processes, as a type for argparse."""
    number, limit = positive(text), max(64, 8 * usable_cores())
    if number > limit:
        raise argparse.ArgumentTypeError(f"{number} processes on {usable_cores()} cores: at most {limit}")
    return number


def _prepare_text(options: argparse.Namespace) -> Dataset:
    source = local_source(
        options.files, reading=Reading(options.column, options.separator, options.encoding, options.format)
    )
    if options.out is None and _EARLIER.is_dir():
        log.warning(
            f"{_EARLIER} is from an earlier version: remove it, or continue with --out {_EARLIER.with_suffix('')}"
        )
    out = _out(options, _name_for(options.files))
    return prepare(source, out, Recipe(tokens=options.tokens), workers=options.workers)


def _name_for(files: list[Path]) -> str:
    """Return the default name of a dataset, from the first of its files."""
    first = files[0].resolve() if files[0].name in ("", "..") else files[0]
    name = re.sub(r"\s+", "-", first.name if files[0].is_dir() else formats.stem_of(first.name)).strip(".-")
    name = name.removesuffix(UNFINISHED) or "text"
    if len(files) > 1:
        name += f"-and-{len(files) - 1}-more"
    return f"{name}-text" if name in _TAKEN else name


def _prepare_from_hub(options: argparse.Namespace) -> Dataset:
    repository = _repository(options)
    out = _out(options, options.kind if options.kind != "hub" else repository.name)
    column = getattr(options, "column", COLUMN)
    source = hub_source(repository, column, workplace(out) / "fetched")
    expected = min(source.tokens, options.tokens or source.tokens)
    held_out = FirstTokens(min(_HELD_OUT, max(1, round(_HELD_OUT_SHARE * expected))))
    return prepare(source, out, Recipe(held_out, tokens=options.tokens), workers=options.workers)


def _repository(options: argparse.Namespace) -> Repository:
    if options.kind == "fineweb-edu":
        return hub_datasets.fineweb_edu(options.sample)
    if options.kind == "fineweb":
        return hub_datasets.fineweb(options.sample)
    if options.kind == "openwebtext":
        return hub_datasets.OPENWEBTEXT
    return Repository(options.repository, options.path, options.revision)


def _out(options: argparse.Namespace, name: str) -> Path:
    out: Path = options.out or PROJECT_DIR / "data" / name.rsplit("/", 1)[-1]
    return out.absolute()


def prepare_sample(out: Path = SAMPLE_DIR, workers: int | None = None) -> None:
    """Prepare the sample dataset unless it exists."""
    if is_prepared(out):
        _report(open_dataset(out))
    else:
        _report(prepare(python_source(), out.absolute(), workers=workers))


def prepare_hellaswag(out: Path, source: Path | None) -> None:
    """Write the validation file into ``out`` unless it exists.

    Args:
        source: a local file to copy; None: download.
    """
    path = out / hellaswag.FILE
    if source is not None:
        hellaswag.copy(source, path)
    elif not hellaswag.is_original(path):
        hellaswag.fetch(path, hellaswag.URL, hellaswag.SHA256)
    items = sum(1 for _ in hellaswag.read_questions(path))
    kind = "the original file" if hellaswag.is_original(path) else "not the original file byte for byte"
    print(f"{items:,} items in {path}: {kind}")


def _report(dataset: Dataset) -> None:
    print(
        f"data in {dataset.dir}: {dataset.tokens('train'):,} training and {dataset.tokens('val'):,} validation tokens"
        f" from {dataset.source}"
    )
    if skipped := dataset.counts.get("unreadable"):
        print(f"skipped {skipped:,} documents that are damaged or have no text")
    if replaced := dataset.counts.get("replacement"):
        print(
            f"{replaced:,} characters of the text are U+FFFD, which replaces invalid bytes or was already in the text"
        )
    if control := dataset.counts.get("control"):
        print(f"{control:,} characters of the text are control characters, such as NUL")
    if marks := dataset.counts.get("endoftext"):
        print(f"the text contains {SEPARATOR} {marks:,} times, tokenized as ordinary characters: see --separator")
