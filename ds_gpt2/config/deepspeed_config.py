"""DeepSpeed's JSON file: read, check, and complete it with the values of the run's settings.

The settings own the batch, accumulation, learning rate, optimizer constants, clipping and the directory of event
files. A DeepSpeed file has "auto" for them or omits them.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.common.files import read_small
from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.settings import Settings

# What DeepSpeed 0.19.8 reads at the top level (runtime/config.py, runtime/constants.py and the config classes they
# import). It ignores any other key silently, so a misspelled key would have no effect.
_TOP_LEVEL = frozenset(
    """
    activation_checkpointing aio bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile csv_monitor
    data_types disable_allgather disable_python_gc dump_state flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level
    memory_breakdown optimizer prescale_gradients seq_parallel_communication_data_type
    sparse_gradients steps_per_print tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)

_TRACKERS = ("wandb", "comet")
# A key that matches is dropped, so the whole last word must; error messages of backups are redacted more broadly.
_SECRET_KEY = re.compile(r"(^|_)(key|secret|token|password|passwd|credentials?)$", re.IGNORECASE)

# Top-level key -> the setting that owns it.
_OWNED_KEYS = {
    "train_batch_size": "batch.tokens_per_step",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.tokens_per_step",
    "gradient_clipping": "optimizer.grad_clip",
    "tensorboard": "monitor.*",
    "scheduler": "schedule.*",
}
_OWNED_OPTIMIZER_KEYS = {
    "lr": "schedule.max_lr",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
}
_DEFAULT_BUCKET = 500_000_000  # elements: DeepSpeed's default for zero_optimization.reduce_bucket_size
# Checks that must stay on: without them a gradient with Inf or NaN would reach the weights.
_GUARDS = (
    ("bf16", "check_grad_overflow"),
    ("bfloat16", "check_grad_overflow"),
    ("zero_optimization", "compute_grad_norm"),
)
# Further parameters of torch's and DeepSpeed's Adam.
_OPTIMIZER_PARAMS = frozenset({"torch_adam", "fused", "foreach", "adam_w_mode", "bias_correction", "capturable"})


def load_deepspeed_file(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON file.

    Raises:
        UserError: the file cannot be read or is not a JSON object; it has an unknown top-level key, or a value other
            than "auto" for a key that a setting owns; it turns off a check of the gradients; or it configures what this
            project does not support (a ZeRO stage other than 2, an optimizer other than Adam).
    """
    try:
        content = safe_json.parse(read_small(path), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise UserError(f"DeepSpeed file not found: {path}; set deepspeed=PATH") from None
    except OSError as error:
        raise UserError(f"DeepSpeed file {path} cannot be read: {reason_of(error)}; set deepspeed=PATH") from None
    except ValueError as error:
        reason = "not text" if isinstance(error.__context__, UnicodeDecodeError) else reason_of(error)
        raise UserError(
            f"DeepSpeed file {path} is not valid JSON ({reason}): correct it, or set deepspeed=PATH"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"DeepSpeed file {path} must hold a JSON object")
    _check_owners(path, content, _OWNED_KEYS, "")
    _check_known(path, content)
    _check_guards(path, content)
    _check_optimizer(path, content.get("optimizer"))
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 2:
        raise UserError(f"{path}: zero_optimization.stage is {stage}: ds_gpt2 supports stage 2 only")
    try:
        bucket_size(content)
    except (TypeError, ValueError):
        raise UserError(f"{path}: zero_optimization.reduce_bucket_size must be a number of elements") from None
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; refuse duplicate keys, which Python's reader accepts silently."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object: remove one")
    return result


def without_trackers(content: dict[str, Any]) -> dict[str, Any]:
    """Return ``content`` of a DeepSpeed file with the trackers switched off and without secrets.

    DeepSpeed must not open the trackers a second time, and it stores its configuration in every checkpoint.
    """
    return _without_secrets({**content, **{name: {"enabled": False} for name in _TRACKERS if name in content}})


def _without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """Return ``tree`` without the keys, at any depth, whose name is that of a secret."""
    return {
        name: _without_secrets(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if not _SECRET_KEY.search(name)
    }


def complete(content: dict[str, Any], settings: Settings, plan: BatchPlan, parameters: int) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``: ``content`` with the values of the settings.

    Args:
        parameters: number of parameters of the model; it limits the bucket for gradients, which DeepSpeed allocates
            in full.
    """
    optimizer, zero = content["optimizer"], content["zero_optimization"]
    params = {
        **optimizer.get("params", {}),
        "lr": settings.schedule.max_lr,
        "betas": list(settings.optimizer.betas),
        "eps": settings.optimizer.eps,
        "weight_decay": settings.optimizer.weight_decay,
    }
    return {
        **without_trackers(content),
        "data_types": {"grad_accum_dtype": "fp32", **content.get("data_types", {})},
        "communication_data_type": content.get("communication_data_type", "fp32"),
        "train_batch_size": plan.windows_per_step,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": settings.optimizer.grad_clip,
        "optimizer": {**optimizer, "params": params},
        "zero_optimization": {**zero, "reduce_bucket_size": min(bucket_size(content), parameters)},
        "tensorboard": {
            "enabled": settings.monitor.tensorboard,
            "output_path": str(settings.tensorboard_dir.parent),
            "job_name": settings.tensorboard_dir.name,
        },
    }


def bucket_size(content: dict[str, Any]) -> int:
    """Return the number of elements of a gradient bucket that a checked file configures."""
    size = content["zero_optimization"].get("reduce_bucket_size", "auto")
    return _DEFAULT_BUCKET if size == "auto" else int(size)


def _check_owners(path: Path, block: dict[str, Any], owners: dict[str, str], prefix: str) -> None:
    for key, owner in owners.items():
        if block.get(key, "auto") != "auto":
            raise UserError(f'{path}: {prefix}{key} belongs to the setting {owner}: write "auto" or remove it')


def _check_guards(path: Path, content: dict[str, Any]) -> None:
    for name, guard in _GUARDS:
        block = content.get(name)
        if isinstance(block, dict) and block.get(guard, True) is not True:
            raise UserError(f"{path}: {name}.{guard} protects the weights from gradients with Inf or NaN: remove it")


def _check_optimizer(path: Path, optimizer: Any) -> None:
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    if kind not in ("Adam", "AdamW"):
        raise UserError(f"{path}: optimizer.type is {kind}: ds_gpt2 supports AdamW and Adam")
    params = optimizer.get("params", {})
    if not isinstance(params, dict):
        raise UserError(f"{path}: optimizer.params must be an object")
    _check_owners(path, params, _OWNED_OPTIMIZER_KEYS, "optimizer.params.")
    for key in sorted(set(params) - _OPTIMIZER_PARAMS - set(_OWNED_OPTIMIZER_KEYS)):
        raise UserError(f"{path}: optimizer.params.{key} is unknown; known are {', '.join(sorted(_OPTIMIZER_PARAMS))}")


def _check_known(path: Path, content: dict[str, Any]) -> None:
    for key in sorted(set(content) - _TOP_LEVEL - set(_OWNED_KEYS)):
        near = difflib.get_close_matches(key, _TOP_LEVEL, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        raise UserError(f"{path}: unknown top-level key {key!r}: {hint}")
