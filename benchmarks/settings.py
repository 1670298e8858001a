"""Settings of benchmarks, and setup of the compiler. Use them before DeepSpeed is imported."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_gpt2.config.settings import PROJECT_DIR, Settings, load_settings
from ds_gpt2.distributed import collectives, torch_compile


def settings_of(data: Path, preset: str, accumulation: int = 1, /, **overrides: str) -> Settings:
    """Return settings for a preset: short windows for small presets, GPT-2's sequence length for the others.

    The preset ``toy`` is a model that takes milliseconds per step, for checks of the programs.
    """
    model = {"model.preset": preset}
    sequence, micro = (256, 2) if preset in ("7M", "30M") else (1024, 32)
    if preset == "toy":
        model = {"model.preset": "null", "model.layers": "2", "model.heads": "2", "model.width": "32"}
        sequence, micro = 64, 2
    return load_settings(
        PROJECT_DIR / "ds_configs" / "quickstart.yaml",
        {
            "data.dir": str(data.absolute()),
            **model,
            "batch.sequence_length": str(sequence),
            "batch.micro_batch": str(micro),
            "batch.tokens_per_step": str(sequence * micro * accumulation * collectives.world_size()),
            "monitor.tensorboard": "false",
            **overrides,
        },
    )


def set_up_compiler(settings: Settings, device: torch.device) -> None:
    """Set up torch.compile as ``train.py`` does."""
    torch_compile.set_up(torch_compile.decide(settings.run.compile, device))
