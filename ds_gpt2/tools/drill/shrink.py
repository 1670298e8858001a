"""Derive the settings of the drill's runs from the user's settings: scaled down, or with the real model and batch."""

from __future__ import annotations

from typing import Any

from ds_gpt2.config.settings import Settings
from ds_gpt2.model.shape import ModelShape, sharded_bytes
from ds_gpt2.monitoring.pace import EVALUATIONS

EVERY = 5  # steps between two checkpoints
UNDISTURBED, DISTURBED = "undisturbed", "disturbed"  # names of the two runs

_WIDTH = 128  # of a scaled-down model, about
_LAYERS = 4
_SEQUENCE = 64
_SAVE_SECONDS = 0.6  # duration of a save of a scaled-down model: long enough that some faults occur during a save
_HANG_SECONDS = 8.0
_DECAY_FRACTION = 0.5  # of the schedule wsd: the runs reach both the stable part and the decay


def tree_for(settings: Settings, ranks: int, steps: int, whole: bool) -> dict[str, Any]:
    """Return the settings of a run of the drill as a tree for YAML; the caller sets the directories.

    Seed, data, dropout, optimizer, learning rates, DeepSpeed file and number of ranks are always the user's.
    Alerts, backups, HellaSwag and other evaluations on items are disabled: they contact other machines or take long.

    Args:
        steps: of the whole run.
        whole: use the real model and batch.
    """
    tree = settings.model_dump(mode="json")
    if not whole:
        _shrink(tree, settings, ranks)
    tree["run"]["deterministic"] = True  # the runs are compared bit for bit
    warmup = min(settings.schedule.warmup_steps, steps // 10)
    tree["schedule"] |= {"steps": steps, "epochs": None, "warmup_steps": warmup}
    if settings.schedule.shape == "wsd":
        tree["schedule"] |= {"decay_steps": None, "decay_fraction": _DECAY_FRACTION}
    for number, stage in enumerate(stages := tree["data"]["stages"], start=1):  # the runs reach all of them
        stage["from_step"] = max(number + 1, steps * number // (len(stages) + 1) + 1)
    tree["checkpoint"] |= {"every": EVERY, "keep_last": 4, "keep_every": 0, "keep_epochs": 1, "min_free_gb": 0.0}
    tree["checkpoint"]["backup"]["to"] = None
    reduced = {
        "validation": {"every": 2 * EVERY, "tokens": 16 * tree["batch"]["sequence_length"]},
        "samples": {"every": 6 * EVERY, "per_prompt": 1, "tokens": 8},
        "hellaswag": {"every": 0},
    }
    for name in EVALUATIONS:
        if tree[name]["every"]:
            tree[name] |= reduced.get(name, {"every": 6 * EVERY})
    tree["evaluations"] = {}
    tree["monitor"]["dir"] = None
    tree["alerts"] |= {"kinds": [], "command": None, "urls_file": None}
    supervisor = settings.supervisor
    tree["supervisor"] |= {
        "restarts": max(3, supervisor.restarts),
        "backoff_seconds": min(0.5, supervisor.backoff_seconds),
        "hang_seconds": min(_HANG_SECONDS, supervisor.hang_seconds),
        "hang_factor": min(5.0, supervisor.hang_factor),
    }
    return tree


def _shrink(tree: dict[str, Any], settings: Settings, ranks: int) -> None:
    """Scale down the model, the batch and the speed of writing in ``tree``."""
    layers, heads, width = settings.model.shape
    head = min(width // heads, max(8, _WIDTH // heads // 8 * 8))
    shape = {"layers": min(layers, _LAYERS), "heads": heads, "width": heads * head}
    tree["model"] |= {"preset": None, **shape, "init_from": None}
    batch = settings.batch
    micro_batch, sequence = min(batch.micro_batch, 2), min(batch.sequence_length, _SEQUENCE)
    accumulation = 2 if batch.tokens_per_step > batch.micro_batch * batch.sequence_length * ranks else 1
    tokens = micro_batch * sequence * ranks * accumulation
    tree["batch"] |= {"tokens_per_step": tokens, "micro_batch": micro_batch, "sequence_length": sequence}
    if not settings.checkpoint.write_mb_per_s:
        parameters = ModelShape(shape["layers"], shape["heads"], shape["width"], sequence).parameters
        largest = (2 + sharded_bytes(settings.ema.is_on) / ranks) * parameters  # bytes that rank 0 writes
        tree["checkpoint"]["write_mb_per_s"] = round(largest / 1e6 / _SAVE_SECONDS, 3)
