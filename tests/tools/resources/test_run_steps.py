"""Number of steps of a run."""

from __future__ import annotations

from run_files import CONFIG, RunFiles

from ds_gpt2.config.settings import load_settings
from ds_gpt2.run_dir.metrics import METRICS
from ds_gpt2.tools.report.run import load_run
from ds_gpt2.tools.resources.run_steps import epochs_per_step, total_steps


def test_steps_follow_from_epochs(files: RunFiles) -> None:
    files.configure(CONFIG.replace("steps: 2000", "epochs: 3"))
    settings = load_settings(files.run_dir / "config.yaml")
    assert total_steps(settings.schedule, None, epochs_per_step([])) is None
    recorded = epochs_per_step([{"step": 50, "train/epoch": 0.25}, {"step": 51}])
    assert total_steps(settings.schedule, None, recorded) == 600
    assert files.status().progress.done_share is None


def test_status_and_report_compute_the_same_steps(files: RunFiles) -> None:
    """The newest record may lack the epoch."""
    files.configure(CONFIG.replace("steps: 2000", "epochs: 3"))
    (files.run_dir / METRICS).write_text('{"step": 50, "train/epoch": 0.25}\n{"step": 60}\n')
    assert files.status().progress.steps == load_run(files.run_dir).steps == 600
