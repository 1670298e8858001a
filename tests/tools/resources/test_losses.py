"""Comparison with the reference run."""

from __future__ import annotations

import math

import pytest
from run_files import RunFiles

from ds_gpt2.config.settings import load_settings
from ds_gpt2.monitoring.reference_curves import REFERENCE_CURVE
from ds_gpt2.tools.resources.losses import reference_loss


def test_reference_loss_applies_to_comparable_runs_only(files: RunFiles) -> None:
    comparable = load_settings(files.run_dir / "config.yaml", {"model.preset": "124M"})
    for step, loss in REFERENCE_CURVE.items():
        assert reference_loss(comparable, step) == pytest.approx(loss)
    between = reference_loss(comparable, 12_000)
    assert between is not None
    assert 3.315 < between < (3.392 + 3.315) / 2
    assert between == pytest.approx(3.392 + (3.315 - 3.392) * math.log(1.2) / math.log(1.4))
    assert (reference_loss(comparable, 1999), reference_loss(comparable, 18_001)) == (None, None)
    smaller = load_settings(files.run_dir / "config.yaml", {"model.preset": "350M"})
    other_budget = load_settings(
        files.run_dir / "config.yaml", {"model.preset": "124M", "batch.tokens_per_step": "65536"}
    )
    assert reference_loss(smaller, 4000) is reference_loss(other_budget, 4000) is None
