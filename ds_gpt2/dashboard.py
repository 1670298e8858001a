"""What TensorBoard shows beside the curves: their layout, hyper-parameters and settings, a reference, marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_gpt2.monitor import Monitor, as_code_block

# Validation loss of llm.c's GPT-2 124M on FineWeb, 524,288 tokens a step (its published log, karpathy/llm.c
# discussion 481): not on one scale with FineWeb-Edu, but of the same shape.
REFERENCE = "llm.c-124M-on-FineWeb"
REFERENCE_TOKENS_PER_STEP = 524_288
REFERENCE_CURVE = {
    2_000: 3.859,
    4_000: 3.618,
    6_000: 3.507,
    8_000: 3.443,
    10_000: 3.392,
    14_000: 3.315,
    18_000: 3.275,
}

# The CUSTOM SCALARS page: is it healthy?
_LAYOUT = {
    "is it healthy?": {
        "loss": ["Multiline", [r"train/loss$", r"val/loss$"]],
        "gradient norm before clipping": ["Multiline", [r"train/grad_norm$"]],
        "updates clipped (share) and skipped": ["Multiline", [r"train/clipped_share$", r"train/skipped_steps$"]],
        "tokens a second": ["Multiline", [r"perf/tokens_per_s$"]],
        "share of the time that trained": ["Multiline", [r"perf/goodput$"]],
    },
    "does it learn?": {
        "HellaSwag": ["Multiline", [r"hellaswag/acc$", r"hellaswag/acc_norm$"]],
        "perplexity": ["Multiline", [r"val/perplexity$"]],
        "learning rate": ["Multiline", [r"train/lr$"]],
    },
    "where does the time go?": {
        "ms of a step": [
            "Multiline",
            [r"perf/step_ms$", r"perf/forward_backward_ms$", r"perf/update_ms$", r"perf/data_ms$"],
        ],
        "ms beside steps": ["Multiline", [r"perf/eval_ms$", r"perf/save_ms$"]],
        "GPUs": ["Multiline", [r"perf/gpu_temperature_c$", r"perf/gpu_power_w$", r"perf/gpu_throttled$"]],
    },
}

_RESULTS = ("val/loss", "train/loss", "hellaswag/acc_norm", "perf/tokens_per_s")  # columns of the HPARAMS page


def open_dashboard(monitor: Monitor, settings_text: str, hyper_parameters: dict[str, Any], compare: bool) -> None:
    """Write what does not change during a run.

    Args:
        hyper_parameters: name to number, text or truth value, for the HPARAMS page; its results are the newest values
            of the run's own curves.
        compare: show the reference's curve beside the run's.
    """
    writer = monitor.tensorboard
    if writer is None:
        return
    writer.add_custom_scalars(_LAYOUT)
    writer.add_text("config", as_code_block(settings_text))
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(hyper_parameters, dict.fromkeys(_RESULTS, 0.0))[:2]:  # the third says that it has ended
        writer.file_writer.add_summary(summary)
    if compare:
        _write_reference(type(writer), Path(writer.log_dir) / REFERENCE)


def mark(monitor: Monitor, step: int, what: str) -> None:
    """Leave a mark at ``step``, such as a restart: a line of the text page, under ``marks``."""
    if monitor.tensorboard is not None:
        monitor.tensorboard.add_text("marks", what, step)


def _write_reference(writer_type: Any, directory: Path) -> None:
    """As a run of its own beside the run: TensorBoard draws it into the same chart in another colour."""
    if directory.exists():
        return
    writer = writer_type(log_dir=str(directory))
    for step, loss in REFERENCE_CURVE.items():
        writer.add_scalar("val/loss", loss, step)
    writer.close()
