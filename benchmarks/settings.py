"""Settings of what benchmarks train, and PyTorch set up for them; to be used before DeepSpeed is imported."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_gpt2.config.settings import PROJECT_DIR, Settings, load_settings
from ds_gpt2.distributed import collectives, torch_compile


def settings_of(data: Path, preset: str, accumulation: int = 1, /, **overrides: str) -> Settings:
    """Short windows for the small presets, GPT-2's own for the others."""
    sequence, micro = (256, 2) if preset in ("7M", "30M") else (1024, 32)
    return load_settings(
        PROJECT_DIR / "ds_configs" / "quickstart.yaml",
        {
            "data.dir": str(data.absolute()),
            "model.preset": preset,
            "batch.sequence_length": str(sequence),
            "batch.micro_batch": str(micro),
            "batch.tokens_per_step": str(sequence * micro * accumulation * collectives.world_size()),
            "monitor.tensorboard": "false",
            **overrides,
        },
    )


def set_up_compiler(settings: Settings, place: torch.device) -> None:
    """As ``train.py`` does."""
    torch_compile.set_up(torch_compile.decide(settings.run.compile, place))
