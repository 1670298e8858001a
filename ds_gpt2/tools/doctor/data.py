"""Check the data of a run: shards, checksums, number of windows, HellaSwag."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tqdm import tqdm

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import sha256
from ds_gpt2.common.formatting import counted, size, tokens
from ds_gpt2.common.host import usable_cores
from ds_gpt2.config.batch_plan import check_schedule, steps_of
from ds_gpt2.config.settings import EvaluationSettings, HellaswagSettings, Settings
from ds_gpt2.data.dataset import Dataset, Shard
from ds_gpt2.data.sources import Sources
from ds_gpt2.tools.doctor.finding import Finding, failure
from ds_gpt2.tools.resources.requirements import MANY_EPOCHS


def shards(sources: Sources) -> list[Finding]:
    """Report the size of the data. Opening the datasets has compared the shards' sizes with the index."""
    rows = []
    for number, dataset in enumerate(sources.datasets):
        name = f"{sources.names[number]}: " if sources.names else ""
        train, val = tokens(dataset.tokens("train")), tokens(dataset.tokens("val"))
        found = f"{name}{train} training and {val} validation tokens, {len(dataset.shards)} shards of the right size"
        rows.append(Finding("data", "ok", found))
    return rows


def windows(sources: Sources, settings: Settings) -> list[Finding]:
    """Check that there are windows to train on and to validate on, and enough of them for the whole run."""
    rows = []
    if settings.validation.every:
        try:
            held_out = sources.count("val", settings.batch.sequence_length)
            rows.append(
                Finding("validation", "ok", f"{held_out:,} windows of {settings.batch.sequence_length} held out")
            )
        except UserError as error:
            row = failure("validation", error)
            rows.append(replace(row, fix=f"{row.fix}, or set validation.every=0".removeprefix(", or ")))
    return [*rows, _enough(sources, settings)]


def schedule(sources: Sources, settings: Settings) -> tuple[int, float]:
    """Return (steps, epochs) of the whole run.

    Raises:
        UserError: the data has no training window.
    """
    count = sources.count("train", settings.batch.sequence_length)
    per_step = _windows_per_step(settings)
    steps = steps_of(settings.schedule, count, per_step)
    return steps, steps * per_step / count


def _windows_per_step(settings: Settings) -> int:
    return max(1, settings.batch.tokens_per_step // settings.batch.sequence_length)


def checksums(dataset: Dataset) -> Finding:
    """Compare the SHA-256 of every shard with ``dataset.json``; one thread per core reads the shards."""
    known = [shard for shard in dataset.shards if shard.sha256 is not None]
    if not known:
        fix = "prepare the data with ./launch.sh prepare, or compare it yourself"
        return Finding("checksums", "unknown", f"{dataset.dir} has no dataset.json, so no checksums", fix)

    def is_damaged(shard: Shard) -> bool:
        return sha256(dataset.dir / shard.file) != shard.sha256

    total, damaged = sum(shard.bytes for shard in known), []
    bar = tqdm(total=total, desc="checksums", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        for shard, is_bad in zip(known, pool.map(is_damaged, known), strict=True):
            bar.update(shard.bytes)
            damaged += [shard.file] if is_bad else []
    if damaged:
        fix = "restore them, or prepare the data again"
        return Finding("checksums", "fail", f"checksum mismatch: {', '.join(damaged)}", fix)
    return Finding("checksums", "ok", f"{len(known)} shards, {size(total)}, match dataset.json")


def hellaswag(settings: HellaswagSettings) -> Finding:
    """Check the HellaSwag file; a run continues without it if it cannot be downloaded."""
    from ds_gpt2.data.hellaswag import is_original, read_questions  # imported late: it needs the tokenizer

    name, path = "HellaSwag", settings.path
    if not settings.every:
        return Finding(name, "ok", "not requested (hellaswag.every is 0)")
    if not path.exists():
        fix = "`./launch.sh prepare hellaswag`; otherwise it is downloaded at the start, or skipped"
        return Finding(name, "warn", f"{path} does not exist", fix)
    if is_original(path):
        return Finding(name, "ok", f"{path.name} is the original file")
    try:
        count = sum(1 for _ in read_questions(path))
    except UserError as error:
        return Finding(name, "warn", str(error), "the run would continue without it")
    found = f"{path.name} has {count:,} items, but is not the original file"
    return Finding(name, "warn", found, "results are not comparable with published ones")


def evaluation(name: str, settings: EvaluationSettings) -> Finding:
    """Check the items of an evaluation; a run continues without it if they cannot be read."""
    from ds_gpt2.data.evaluation_files import count_items  # imported late: it needs the tokenizer

    try:
        return Finding(name, "ok", f"{settings.path.name} has {counted(count_items(settings.path, name), 'item')}")
    except UserError as error:
        return Finding(name, "warn", str(error), "the run would continue without it")


def _enough(sources: Sources, settings: Settings) -> Finding:
    name = "epochs"
    try:
        steps, epochs = schedule(sources, settings)
    except UserError as error:
        return failure(name, error)
    found = f"{steps:,} steps train on the data {epochs:.2f} times"
    try:
        check_schedule(settings.schedule, steps)
        sources.check_limits(settings.batch.sequence_length, _windows_per_step(settings), steps)
    except UserError as error:
        return failure(name, error)
    if epochs > steps:
        fix = "prepare more text, or set a smaller batch.tokens_per_step"
        return Finding(name, "warn", f"{found}: a step is more than an epoch", fix)
    if epochs > MANY_EPOCHS:
        return Finding(name, "warn", found, "the model will memorize the data: prepare more text, or fewer steps")
    return Finding(name, "ok", found)
