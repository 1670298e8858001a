"""``inspect DATA``: show the size, document lengths and examples of a dataset; and ``verify DATA``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

from ds_gpt2.commands.arguments import path, positive, whole_number
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted, percent, tokens
from ds_gpt2.common.terminal import one_line, printable_lines
from ds_gpt2.data.dataset import INDEX, SPLITS, Dataset, open_dataset, read_dataset
from ds_gpt2.data.inspect import examples, lengths
from ds_gpt2.data.shards import is_shard
from ds_gpt2.data.verify import ShardReport, verify_shards
from ds_gpt2.run_dir import exit_codes

_EXAMPLE_TOKENS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=path("DATA"), metavar="DATA", help="a directory of shards")
    parser.add_argument(
        "--examples", type=positive, default=3, metavar="N", help="number of example documents (default: 3)"
    )
    parser.add_argument(
        "--seed", type=whole_number, metavar="N", help="seed that selects the examples (default: random)"
    )


def run(options: argparse.Namespace) -> int:
    dataset = open_dataset(options.data)
    print(f"{dataset.dir}: {one_line(dataset.source)}")
    for name, count in dataset.counts.items():
        print(f"  {name:10} {count:,}")
    of_splits = {split: lengths(dataset, split) for split in SPLITS}
    for split, found in of_splits.items():
        print(
            f"  {split:10} {counted(dataset.tokens(split), 'token')} in {counted(len(dataset.split(split)), 'shard')}:"
            f" {counted(found.documents, 'document')} of {found.mean:,.0f} tokens (median"
            f" {found.median:,.0f}, longest {found.longest:,})"
        )
    cut = sum(found.documents for found in of_splits.values()) - dataset.counts.get("documents", 0)
    if dataset.counts and cut > 0:
        print(f"  {counted(cut, 'time')}, the end of a shard or split cuts a document; each part counts as a document")
    seed = random.randrange(10**6) if options.seed is None else options.seed
    for file, position, text in examples(dataset, "train", options.examples, _EXAMPLE_TOKENS, seed):
        print(f"\n{file}, token {position:,}:\n{printable_lines(text)}")
    return exit_codes.DONE


def is_data(name: str) -> bool:
    """Return whether this is a directory of shards, not of checkpoints.

    Raises:
        UserError: the directory cannot be read.
    """
    directory = Path(name)
    try:
        return directory.is_dir() and any(path.name == INDEX or is_shard(path.name) for path in directory.iterdir())
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None


def verify(directory: Path, as_json: bool) -> int:
    """Read all shards and verify their checksums; return exit code 1 if any is damaged.

    Raises:
        UserError: the directory is not a dataset, or has no shards.
    """
    dataset = read_dataset(directory, bad_shards=True)
    with tqdm(total=len(dataset.shards), unit="shard", leave=False, disable=not sys.stderr.isatty()) as bar:
        reports = verify_shards(dataset, lambda report: bar.update())
    bad = [report for report in reports if report.problem]
    if as_json:
        print(json.dumps([dataclasses.asdict(report) for report in reports]))
    else:
        _show(dataset, reports)
    return exit_codes.CRASHED if bad or not reports else exit_codes.DONE


def _show(dataset: Dataset, reports: list[ShardReport]) -> None:
    for report in reports:
        ends = f", {percent(report.end_of_text / report.tokens, 3)} <|endoftext|>" if report.tokens else ""
        print(f"{'BAD ' if report.problem else 'good'}  {one_line(report.file)}  {report.tokens:,} tokens{ends}")
        if report.problem:
            print(f"      {one_line(report.problem)}")
    if dataset.left_out:
        print(f"skipped, because their names mark them as test data: {', '.join(dataset.left_out)}")
    unknown = sum(shard.sha256 is None for shard in dataset.shards)
    if unknown:
        print(f"no recorded checksum of {counted(unknown, 'shard')}: {dataset.dir} has no {INDEX}")
    good = [report for report in reports if not report.problem]
    print(f"{len(good)} of {len(reports)} shards are good, {tokens(sum(report.tokens for report in good))} tokens")
    if not reports:
        raise UserError(f"{dataset.dir} has no shards")
