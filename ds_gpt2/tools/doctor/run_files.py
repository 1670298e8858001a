"""Check the files that an earlier start of the run has left."""

from __future__ import annotations

from ds_gpt2.checkpoint.catalog import newest_step
from ds_gpt2.config.settings import Settings
from ds_gpt2.run_dir import metrics_tail
from ds_gpt2.run_dir.file_checks import RESTORE_METRICS, metrics_problem
from ds_gpt2.tools.doctor.finding import Finding


def metrics(settings: Settings) -> Finding:
    """Check that a run with checkpoints has its metrics, which a resume continues."""
    newest = metrics_tail.newest(settings.run_dir, 1)
    recorded = newest[0]["step"] if newest else 0
    if (problem := metrics_problem(settings.run_dir, recorded, newest_step(settings.checkpoint_dir))) is not None:
        return Finding("metrics", "warn", problem, RESTORE_METRICS)
    return Finding("metrics", "ok", f"recorded up to step {recorded:,}" if recorded else "no step is recorded yet")
