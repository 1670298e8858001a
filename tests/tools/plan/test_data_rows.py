"""What a plan says about the sources of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ds_gpt2.config.settings import load_settings
from ds_gpt2.tools.plan.data_rows import data_rows
from ds_gpt2.tools.plan.estimate import inputs_of


@pytest.fixture
def mixture(dataset_dir: Path, tmp_path: Path) -> list[dict[str, object]]:
    for name in "ab":
        (tmp_path / name).symlink_to(dataset_dir)
    return [{"dir": str(tmp_path / "a"), "weight": 0.75}, {"dir": str(tmp_path / "b"), "weight": 0.25}]


def test_each_source_has_its_shares_tokens_and_passes(
    tmp_path: Path, write_config: Callable[..., Path], mixture: list[dict[str, object]]
) -> None:
    stages = [{"from_step": 201, "mixture": mixture[1:]}]
    schedule = {"steps": 1000, "warmup_steps": 3}
    config = write_config(tmp_path, data={"mixture": mixture, "stages": stages}, schedule=schedule)
    inputs = inputs_of(load_settings(config), 2, None)
    assert inputs.sources is not None
    windows = inputs.sources.count("train", 64) // 2  # of one of the two equal sources
    first, second = data_rows(inputs)
    assert first.figures == {"source_a_tokens": 200 * 12 * 64, "source_a_epochs": 200 * 12 / windows}
    assert second.figures["source_b_tokens"] == (200 * 4 + 800 * 16) * 64
    assert first.text == "a, 75.0%, 0.0% from step 201: 153,600 tokens, 1.19 passes"
    assert second.text.startswith("b, 25.0%, 100.0% from step 201: ")


def test_a_single_dataset_has_no_row_and_missing_data_has_one(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(tmp_path)
    assert data_rows(inputs_of(load_settings(config), 2, None)) == []
    missing = inputs_of(load_settings(config, {"data.dir": str(tmp_path / "none")}), 2, None)
    assert [row.basis for row in data_rows(missing)] == ["not known"]
