"""The attributes of DeepSpeed's objects that this project uses although they are not public, checked before a run.

DeepSpeed may change them in any release. The ones of the optimizer are replaced or read in ``zero2_gradients`` and
``ema``, those of the engine in ``engine`` and ``checkpoint_io``, those of the parameters in ``Engine.masters`` and
``gradients``, those of the monitors in ``monitors``. Modules and classes that are imported are not listed: their import
fails.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import deepspeed
from torch import nn

from ds_gpt2.common.errors import UserError

TESTED = "0.19.8"

_OF_ENGINE = (
    "_copy_recovery_script",
    "checkpoint_engine",
    "coalesce_grad_reduction",
    "monitor",
    "set_gradient_accumulation_boundary",
    "was_step_applied",
)
_OF_OPTIMIZER = (
    "_gradient_reduction_buffer_dtype",
    "averaged_gradients",
    "clip_grad",
    "has_overflow",
    "scaled_global_norm",
    "single_partition_of_fp32_groups",
    "update_lp_params",
)
_OF_PARAMETER = ("_hp_mapping", "_index_in_param_group")
_OF_MAPPING = ("get_hp_fragment", "get_lp_grad_fragment", "lp_fragment_address")
_OF_MONITORS = ("comet_monitor", "csv_monitor", "enabled", "tb_monitor", "wandb_monitor")
_OF_MONITOR = {"csv_monitor": ("filenames", "log_dir", "write_events"), "tb_monitor": ("summary_writer",)}


def check(engine: Any, model: nn.Module) -> None:
    """Check that DeepSpeed has every internal name that is used.

    Args:
        engine: what ``deepspeed.initialize`` has returned for ``model``.

    Raises:
        UserError: one or more are missing.
    """
    parameter = next(model.parameters())
    mapping = getattr(parameter, "_hp_mapping", None)
    missing = [f"DeepSpeedEngine.{name}" for name in _OF_ENGINE if not hasattr(engine, name)]
    missing += [
        f"{type(engine.optimizer).__name__}.{name}" for name in _OF_OPTIMIZER if not hasattr(engine.optimizer, name)
    ]
    missing += [f"parameter.{name}" for name in _OF_PARAMETER if not hasattr(parameter, name)]
    if mapping is not None:  # None on ranks whose partition has no element of this parameter
        missing += [f"parameter._hp_mapping.{name}" for name in _OF_MAPPING if not hasattr(mapping, name)]
    _require_none([*missing, *_missing_of_monitors(getattr(engine, "monitor", None))])


def _missing_of_monitors(master: Any) -> list[str]:
    if master is None:
        return []
    missing = [f"MonitorMaster.{name}" for name in _OF_MONITORS if not hasattr(master, name)]
    for monitor, names in _OF_MONITOR.items():
        if (opened := getattr(master, monitor, None)) is not None:  # None if it is off, and on ranks other than 0
            missing += [f"{type(opened).__name__}.{name}" for name in names if not hasattr(opened, name)]
    return missing


def check_operators() -> None:
    """Check that DeepSpeed has the table of its compiled operators, which is replaced on a CPU.

    The table is built at the first access, which starts compilers; so this function does not access it.

    Raises:
        UserError: DeepSpeed has no such table.
    """
    has_table = not {"__compatible_ops__", "_probe_compatible_ops"}.isdisjoint(vars(deepspeed.ops))
    _require_none([] if has_table else ["deepspeed.ops.__compatible_ops__"])


def _require_none(missing: list[str]) -> None:
    if missing:
        raise UserError(
            f"DeepSpeed {metadata.version('deepspeed')} has no {', '.join(missing)}: install the version that was"
            f" tested (pip install deepspeed=={TESTED})"
        )
