"""TensorBoard pages other than the curves: layout, hyper-parameters, settings, and a reference curve."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ds_gpt2.monitoring.monitor import Monitor, as_code_block
from ds_gpt2.monitoring.reference_curves import REFERENCE, REFERENCE_CURVE

# The CUSTOM SCALARS page.
_LAYOUT = {
    "health": {
        "loss": ["Multiline", [r"train/loss$", r"val/loss$", r"val/loss_ema$"]],
        "gradient norm before clipping": ["Multiline", [r"train/grad_norm$"]],
        "updates clipped (share) and skipped": ["Multiline", [r"train/clipped_share$", r"train/skipped_steps$"]],
        "tokens per second": ["Multiline", [r"perf/tokens_per_s$"]],
        "goodput: share of the time spent training": ["Multiline", [r"perf/goodput$"]],
    },
    "learning": {
        "HellaSwag": ["Multiline", [r"hellaswag/acc$", r"hellaswag/acc_norm$"]],
        "evaluations": ["Multiline", [r"eval/\w+/acc$", r"eval/\w+/acc_norm$"]],
        "validation loss of each source": ["Multiline", [r"val/[^/]+/loss$"]],
        "passes over each source": ["Multiline", [r"data/[^/]+/epoch$"]],
        "perplexity": ["Multiline", [r"val/perplexity$"]],
        "learning rate": ["Multiline", [r"train/lr$"]],
        "update size relative to the weights": ["Multiline", [r"update_ratio/"]],
    },
    "time": {
        "ms per step": [
            "Multiline",
            [r"perf/step_ms$", r"perf/forward_backward_ms$", r"perf/update_ms$", r"perf/data_ms$"],
        ],
        "ms of evaluation and saving": ["Multiline", [r"perf/eval_ms$", r"perf/save_ms$"]],
        "GPUs": ["Multiline", [r"perf/gpu_temperature_c$", r"perf/gpu_power_w$", r"perf/gpu_throttled$"]],
    },
}

# The hyper-parameters that the HPARAMS page shows by default; five fit.
_SHOWN_FIRST = ("parameters", "batch.tokens_per_step", "schedule.max_lr", "schedule.steps", "optimizer.weight_decay")
_RESULTS = ("val/loss", "train/loss", "hellaswag/acc_norm", "perf/tokens_per_s")  # columns of the HPARAMS page


def open_dashboard(monitor: Monitor, settings_text: str, hyper_parameters: dict[str, Any], compare: bool) -> None:
    """Write the content that does not change during a run.

    Args:
        hyper_parameters: name to number, text or bool, for the HPARAMS page, whose results are the newest values of
            the run's curves.
        compare: show the reference curve next to the run's.
    """
    if monitor.tensorboard is not None:
        write = functools.partial(_write_pages, monitor.tensorboard, settings_text, hyper_parameters, compare)
        monitor.attempt("write TensorBoard's pages", write)


def _write_pages(writer: Any, settings_text: str, hyper_parameters: dict[str, Any], compare: bool) -> None:
    writer.add_custom_scalars(_LAYOUT)
    writer.add_text("config", as_code_block(settings_text))
    _write_hyper_parameters(writer, hyper_parameters)
    if compare:
        _write_reference(type(writer), Path(writer.log_dir) / REFERENCE)


def _write_hyper_parameters(writer: Any, hyper_parameters: dict[str, Any]) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    columns, start, _ = hparams(hyper_parameters, dict.fromkeys(_RESULTS, 0.0))  # the third marks the run as ended
    data = HParamsPluginData.FromString(columns.value[0].metadata.plugin_data.content)
    for column in data.experiment.hparam_infos:
        column.differs = column.name in _SHOWN_FIRST  # TensorBoard lists these first
    columns.value[0].metadata.plugin_data.content = data.SerializeToString()
    for summary in (columns, start):
        writer.file_writer.add_summary(summary)


def _write_reference(writer_type: Any, directory: Path) -> None:
    """Write the reference as a separate run, which TensorBoard draws into the same chart in another color."""
    if directory.exists():
        return
    writer = writer_type(log_dir=str(directory))
    for step, loss in REFERENCE_CURVE.items():
        writer.add_scalar("val/loss", loss, step)
    writer.close()
