"""Report incidents of a run in its log and journal."""

from __future__ import annotations

import logging

from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.training.guards import Anomaly

log = logging.getLogger(__name__)


def report_anomaly(journal: Journal, anomaly: Anomaly) -> None:
    """Report an anomaly of training, on rank 0."""
    if collectives.is_main():
        log.warning(f"step {anomaly.step:,}: {anomaly.text}")
        facts = {"policy": anomaly.policy, "begun": anomaly.first_step, "batches": list(anomaly.batches)}
        journal.write(anomaly.kind, anomaly.text, anomaly.step, **facts)


def report_data_error(journal: Journal, text: str) -> None:
    """Report a read error of this rank; called from any thread."""
    text = f"rank {collectives.rank()}: {text}"
    log.error(text)
    journal.write("data_error", text)


def report_failed_evaluation(journal: Journal, step: int, text: str) -> None:
    """Report, on rank 0, that a part of the evaluation at ``step`` is missing."""
    if collectives.is_main():
        log.error(f"step {step:,}: {text}; training continues")
        journal.write("evaluation_failed", text, step)
