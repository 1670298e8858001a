"""The steps of a trial: every evaluation and the save are among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES
from ds_gpt2.config.settings import PROJECT_DIR, Settings, load_settings
from ds_gpt2.tools.plan.trial import LEAST_STEPS, Limits, plan_trial


def settings_with(folder: Path, evaluations: int, validation: int) -> Settings:
    """Return settings with the first ``evaluations`` published evaluations, whose files exist."""
    overrides = {f"{name}.every": "0" for name in ("samples", "hellaswag", "histograms")}
    overrides["validation.every"] = str(validation)
    for name in EVALUATION_NAMES[:evaluations]:
        path = folder / f"{name}.jsonl"
        path.write_text(json.dumps({"context": "a", "endings": ["b", "c"], "label": 0}) + "\n")
        overrides |= {f"evaluations.{name}.every": "100", f"evaluations.{name}.path": str(path)}
    return load_settings(PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml", overrides)


@pytest.mark.parametrize("validation", [0, 100])
@pytest.mark.parametrize("evaluations", [0, 1, 5, 9])
@pytest.mark.parametrize("steps", [LEAST_STEPS, Limits().steps, 40])
def test_a_trial_reaches_every_evaluation_once_and_the_save(
    steps: int, evaluations: int, validation: int, tmp_path: Path
) -> None:
    schedule = plan_trial(settings_with(tmp_path, evaluations, validation), steps, 1)
    due = list(schedule.due.values())
    assert len(due) == len(set(due)) == evaluations + bool(validation)
    assert schedule.steps >= steps
    assert schedule.steps == steps or evaluations > 3
    for step in [*due, schedule.save]:
        assert schedule.steps // 2 < step or not due
        assert step < schedule.steps < 2 * step or not due
