"""The data of a run: shards against ``dataset.json``, enough of them, HellaSwag."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import size, tokens
from ds_gpt2.common.host import usable_cores
from ds_gpt2.config.settings import HellaswagSettings, Settings
from ds_gpt2.data.dataset import Dataset, Shard, Windows
from ds_gpt2.data.shards import sha256
from ds_gpt2.tools.doctor.row import Finding
from ds_gpt2.tools.resources.requirements import MANY_EPOCHS


def shards(dataset: Dataset) -> Finding:
    """What there is; that sizes agree with the index was found when it was opened."""
    train, val = tokens(dataset.tokens("train")), tokens(dataset.tokens("val"))
    return Finding(
        "data", "ok", f"{train} training and {val} validation tokens, {len(dataset.shards)} shards of the right size"
    )


def windows(dataset: Dataset, settings: Settings) -> list[Finding]:
    """Whether there is a window to train on, one to validate on, and enough for a step and the whole run."""
    rows = []
    if settings.validation.every:
        try:
            held_out = len(Windows(dataset, "val", settings.batch.sequence_length))
            rows.append(
                Finding("validation", "ok", f"{held_out:,} windows of {settings.batch.sequence_length} held out")
            )
        except UserError as error:
            rows.append(Finding("validation", "fail", str(error), "or set validation.every=0"))
    return [*rows, _enough(dataset, settings)]


def schedule(dataset: Dataset, settings: Settings) -> tuple[int, float]:
    """(steps, epochs) of the whole run.

    Raises:
        UserError: there is not one window to train on.
    """
    count = len(Windows(dataset, "train", settings.batch.sequence_length))
    per_step = max(1, settings.batch.tokens_per_step // settings.batch.sequence_length)
    steps = settings.schedule.steps
    if steps is None:
        steps = math.ceil((settings.schedule.epochs or 0) * count / per_step)
    return steps, steps * per_step / count


def checksums(dataset: Dataset) -> Finding:
    """Every byte of every shard against ``dataset.json``; shards are read side by side, one a core."""
    known = [shard for shard in dataset.shards if shard.sha256 is not None]
    if not known:
        found = f"{dataset.dir} has no dataset.json, and so no checksums"
        return Finding(
            "checksums", "unknown", found, "prepare the data with ./launch.sh prepare, or compare it yourself"
        )

    def is_damaged(shard: Shard) -> bool:
        return sha256(dataset.dir / shard.file) != shard.sha256

    total, damaged = sum(shard.bytes for shard in known), []
    bar = tqdm(total=total, desc="checksums", unit="B", unit_scale=True, leave=False, disable=None)
    with bar, ThreadPoolExecutor(usable_cores()) as pool:
        for shard, is_bad in zip(known, pool.map(is_damaged, known), strict=True):
            bar.update(shard.bytes)
            damaged += [shard.file] if is_bad else []
    if damaged:
        fix = "restore them, or prepare the data again: training on them would go unnoticed"
        return Finding("checksums", "fail", f"not what was written: {', '.join(damaged)}", fix)
    return Finding("checksums", "ok", f"{len(known)} shards, {size(total)}, are what dataset.json says")


def hellaswag(settings: HellaswagSettings) -> Finding:
    """Whether the items are there; a run goes on without them where they cannot be fetched."""
    from ds_gpt2.data.hellaswag import is_original, read_questions  # only here: it needs the tokenizer

    name, path = "HellaSwag", settings.path
    if not settings.every:
        return Finding(name, "ok", "not asked for (hellaswag.every is 0)")
    if not path.exists():
        fix = "`./launch.sh prepare hellaswag`: else it is fetched at the start, or left out"
        return Finding(name, "warn", f"{path} is not there", fix)
    if is_original(path):
        return Finding(name, "ok", f"{path.name} is the authors' file")
    try:
        count = sum(1 for _ in read_questions(path))
    except UserError as error:
        return Finding(name, "warn", str(error), "the run would go on without it")
    return Finding(
        name, "warn", f"{path.name} has {count:,} items, but is not the authors' file", "results differ from others'"
    )


def _enough(dataset: Dataset, settings: Settings) -> Finding:
    name = "epochs"
    try:
        steps, epochs = schedule(dataset, settings)
    except UserError as error:
        return Finding(name, "fail", str(error))
    found = f"{steps:,} steps see the data {epochs:.2f} times"
    warmup = settings.schedule.warmup_steps
    if warmup >= steps:
        fix = "set schedule.warmup_steps lower or schedule.epochs higher"
        return Finding(name, "fail", f"{found}; the warm-up alone has {warmup:,} steps", fix)
    if epochs > steps:
        return Finding(
            name, "warn", f"{found}: a step is more than an epoch", "prepare more text, or a smaller token budget"
        )
    if epochs > MANY_EPOCHS:
        return Finding(name, "warn", found, "it will learn them by heart: prepare more text, or fewer steps")
    return Finding(name, "ok", found)
