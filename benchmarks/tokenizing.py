"""Measure the speed and memory of preparing text.

    python benchmarks/tokenizing.py --text FILE... [--megabytes N] [--rounds N] [--memory MB...] [--out FILE]

A parquet file of documents is converted to shards by two implementations that alternate: ``ds_gpt2.data.prepare``, and
the recipe of build-nanogpt's fineweb.py (``encode_ordinary`` and ``np.array`` of each document in a pool, 16 documents
per task, collected by the parent). Both run with one worker, with half of the cores (as in the recipe), and with all
cores. All tokens are compared. Our time includes hashes, fsync, notes of progress and the start of the workers.

The given text is repeated as needed. In repetitions, every fiftieth word is replaced by a new one, because a cache of
words would otherwise be unrealistically effective.

``--memory``: the command is run for inputs of these sizes, as documents and as one long text, and the memory of all its
processes is recorded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import psutil
import pyarrow
from pyarrow import parquet

from benchmarks.program import make_parser
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Split, open_dataset
from ds_gpt2.data.prepare.holdout import FirstTokens
from ds_gpt2.data.prepare.parquet import parquet_documents
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import local_source
from ds_gpt2.data.shards import open_shard

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENT_CHARACTERS = 4_700  # approximate mean of FineWeb-Edu


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        results: dict[str, Any] = {"speed": measure_speed(Path(name), options)}
        if options.memory:
            results["memory"] = measure_memory(Path(name), options.text, options.memory)
    print(json.dumps(results, indent=1))
    if options.out:
        from benchmarks.machine import describe  # imports torch

        options.out.write_text(json.dumps({**results, "machine": _versions(describe())}, indent=1) + "\n", "utf-8")


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="English text")
    parser.add_argument("--megabytes", type=int, default=200, metavar="N", help="size of the text (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "--shard_tokens", type=int, default=10_000_000, metavar="N", help="tokens of a shard (default: 10 million)"
    )
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[], metavar="MB", help="sizes of inputs for measuring memory"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="directory of temporary files (default: the system's)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, too")
    return parser.parse_args()


def measure_speed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return MB of text per second of whole preparations, and the ratios of consecutive runs."""
    source = folder / "speed.parquet"
    size = write_documents(source, options.text, options.megabytes * 1_000_000)
    cores = os.cpu_count() or 1
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(options.rounds):
        for workers in sorted({1, max(1, cores // 2), cores}):
            tokens = {}
            for name, arm in (("recipe", by_recipe), ("ours", by_prepare)):
                out = folder / f"{name}_{workers}_{turn}"
                start_time = time.perf_counter()
                tokens[name] = arm(source, out, workers, options.shard_tokens)
                seconds.setdefault((name, workers), []).append(time.perf_counter() - start_time)
            _check_equal(*(tokens[name] for name in ("recipe", "ours")))
    results: dict[str, Any] = {"megabytes": round(size / 1e6, 1), "cores": cores}
    for workers in sorted({workers for _, workers in seconds}):
        recipe, ours = (seconds[name, workers] for name in ("recipe", "ours"))
        results[f"workers_{workers}"] = {
            "recipe_mb_per_s": [round(size / each / 1e6, 1) for each in recipe],
            "ours_mb_per_s": [round(size / each / 1e6, 1) for each in ours],
            "ratio": [round(one / other, 2) for one, other in zip(recipe, ours, strict=True)],
            "ratio_median": round(statistics.median(one / other for one, other in zip(recipe, ours, strict=True)), 2),
        }
    return results


def by_prepare(source: Path, out: Path, workers: int, shard_tokens: int) -> Iterator[np.ndarray[Any, Any]]:
    recipe = Recipe(FirstTokens(shard_tokens), shard_tokens)
    dataset = prepare(local_source([source]), out, recipe, workers=workers, progress=False)

    def tokens() -> Iterator[np.ndarray[Any, Any]]:
        splits: tuple[Split, ...] = ("val", "train")
        for split in splits:
            for number, shard in enumerate(dataset.split(split)):
                content = open_shard(dataset.dir / shard.file)
                yield content[1:] if split == "train" and number == 0 else content  # without the leading <|endoftext|>

    return tokens()


def by_recipe(source: Path, out: Path, workers: int, shard_tokens: int) -> Iterator[np.ndarray[Any, Any]]:
    """Write shards as build-nanogpt does, from the same parquet file."""
    out.mkdir()
    shard, filled = np.empty((shard_tokens,), np.uint16), 0
    files: list[Path] = []

    def save(tokens: np.ndarray[Any, Any]) -> None:
        files.append(out / f"shard_{len(files):06d}.npy")
        np.save(files[-1], tokens)

    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for tokens in pool.imap(_recipe_of_one, parquet_documents(source, "text"), chunksize=16):
            if filled + len(tokens) < shard_tokens:
                shard[filled : filled + len(tokens)] = tokens
                filled += len(tokens)
            else:
                left = shard_tokens - filled
                shard[filled:] = tokens[:left]
                save(shard)
                filled = len(tokens) - left
                shard[:filled] = tokens[left:]
        if filled:
            save(shard[:filled])
    return (np.load(file) for file in files)


def _recipe_of_one(text: str | None) -> np.ndarray[Any, Any]:
    assert text is not None
    tokens = np.array([tokenizer.END_OF_TEXT, *tokenizer.gpt2().encode_ordinary(text)])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def _check_equal(one: Iterator[np.ndarray[Any, Any]], other: Iterator[np.ndarray[Any, Any]]) -> None:
    if not np.array_equal(np.concatenate(list(one)), np.concatenate(list(other))):
        raise SystemExit("the two implementations give different tokens")


def measure_memory(folder: Path, texts: list[Path], sizes: list[int]) -> list[dict[str, Any]]:
    """Return the peak resident memory of the command and its workers together, in MB; shared pages count repeatedly."""
    writers: dict[str, Callable[[Path, list[Path], int], int]] = {
        "parquet": write_documents,
        "txt": lambda path, texts, size: _write_text(path, texts, size),
    }
    results = []
    for kind, write in writers.items():
        for megabytes in sizes:
            source = folder / f"memory.{kind}"
            write(source, texts, megabytes * 1_000_000)
            results.append({"input": kind, "megabytes": megabytes, **_watched(source, folder / "out")})
            source.unlink()
    return results


def _watched(source: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "prepare", "text", str(source), "--out"]
    start_time, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, str(out)], stdout=output, stderr=output)
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.02)
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read().decode())
    tokens = sum(shard.tokens for shard in open_dataset(out).shards)
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    return {"peak_mb": round(peak / 1e6), "seconds": round(time.perf_counter() - start_time, 1), "tokens": tokens}


def _resident(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:  # a process has just ended
        return total
    return total


def write_documents(path: Path, texts: list[Path], size: int) -> int:
    """Write a parquet file with ``size`` bytes of text, 1,000 documents per row group; return the bytes written."""
    written = 0
    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(path, schema) as file:
        documents = _documents(_endless(texts))
        while written < size:
            group = list(itertools.islice(documents, 1000))
            file.write_table(pyarrow.table({"text": group}, schema=schema))
            written += sum(len(each.encode()) for each in group)
    return written


def _write_text(path: Path, texts: list[Path], size: int) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for stretch in _endless(texts):
            written += len(stretch.encode())
            file.write(stretch)
            if written >= size:
                return written
    raise AssertionError("the text is endless")


def _documents(stretches: Iterable[str]) -> Iterator[str]:
    """Yield documents of exponentially distributed lengths, similar to web pages."""
    rng = random.Random(0)
    for stretch in stretches:
        start = 0
        while start < len(stretch):
            length = 200 + int(rng.expovariate(1 / (DOCUMENT_CHARACTERS - 200)))
            yield stretch[start : start + length]
            start += length


def _endless(texts: list[Path]) -> Iterator[str]:
    """Yield the texts in blocks of a million characters, in repetitions with new words in them."""
    rng = random.Random(1)

    def new(word: re.Match[str]) -> str:
        return word[0] if rng.random() > 0.02 else "".join(rng.choices("etaoinshrdlu", k=rng.randint(4, 12)))

    words = re.compile(r"[a-z]+")
    for turn in itertools.count():
        for path in texts:
            with path.open(encoding="utf-8", errors="replace") as file:
                for stretch in iter(lambda file=file: file.read(1_000_000), ""):  # type: ignore[misc]  # lambda's default
                    yield words.sub(new, stretch) if turn else stretch


def _versions(machine: dict[str, str]) -> dict[str, str]:
    from importlib import metadata

    return machine | {name: metadata.version(name) for name in ("tiktoken", "gigatoken", "pyarrow")}


if __name__ == "__main__":
    main()
