"""What only a GPU can show. Skipped, and said so, on machines without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import launch

from ds_gpt2.loss import cross_entropy

pytestmark = pytest.mark.gpu


def test_one_rank_trains_over_nccl(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    config = write_config(tmp_path, run={"name": "test", "dir": str(tmp_path / "runs"), "device": "auto"})
    launched = launch(1, "--config", str(config), accelerator="cuda")
    assert launched.code == 0, launched.output
    assert f"1 rank on {torch.cuda.get_device_name()}, NCCL" in launched.output
    lines = (tmp_path / "runs" / "test" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5
    again = launch(1, "--config", str(config), "--resume", "6", accelerator="cuda")
    assert again.code == 0, again.output


def test_the_loss_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(300, 64, generator=generator), torch.randn(50_304, 64, generator=generator)
    targets = torch.randint(50_257, (300,), generator=generator)
    here = cross_entropy(hidden, head, targets, 50_257)
    there = cross_entropy(hidden.cuda(), head.cuda(), targets.cuda(), 50_257)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)
