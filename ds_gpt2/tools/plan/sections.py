"""The sections of a plan (batch, memory, time, disk, cost), and the reasons why a run is not possible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ds_gpt2.checkpoint.space import reserved_bytes
from ds_gpt2.common.formatting import clock, counted, duration, percent, size, tokens, truncated, zone
from ds_gpt2.config.settings import CheckpointSettings, Settings
from ds_gpt2.monitoring.pace import Range
from ds_gpt2.tools.plan.data_rows import data_rows
from ds_gpt2.tools.plan.fit import Calibration, micro_batches
from ds_gpt2.tools.plan.inputs import PlanInputs
from ds_gpt2.tools.plan.plan import Basis, PlanRow, PlanSection, Value
from ds_gpt2.tools.plan.timing import Timing
from ds_gpt2.tools.plan.trial_results import TrialResults
from ds_gpt2.tools.resources import memory_model, requirements
from ds_gpt2.tools.resources.checkpoint_space import Count, simulate
from ds_gpt2.tools.resources.prices import Prices, cost_of
from ds_gpt2.tools.resources.requirements import MANY_EPOCHS, disk_requirement
from ds_gpt2.tools.resources.run_schedule import RunSchedule, evaluation_counts

_LONGEST_LABEL = 14  # characters
_NO_STEPS = "not known without the number of steps"


def batch_section(inputs: PlanInputs) -> PlanSection:
    """Return the division of the token budget, the steps and the parameters."""
    batch, schedule, model = inputs.batch, inputs.schedule, inputs.model
    division = f"{batch.tokens_per_step:,} = {batch.division}"
    shape = f"{model.shape.layers} layers, {model.shape.heads} heads, width {model.shape.width:,}"
    arithmetic: dict[str, Value] = {
        "tokens_per_step": batch.tokens_per_step,
        "windows_per_micro_batch": batch.micro_batch,
        "tokens_per_window": batch.sequence_length,
        "micro_batches_per_step": batch.accumulation,
        "ranks": batch.world_size,
    }
    return PlanSection(
        "batch",
        [
            PlanRow("tokens per step", division, "exact", arithmetic),
            _steps_row(inputs, schedule),
            *data_rows(inputs),
            PlanRow("parameters", f"{model.parameters:,}: {shape}", "exact", {"parameters": model.parameters}),
        ],
    )


def _steps_row(inputs: PlanInputs, schedule: RunSchedule | None) -> PlanRow:
    if schedule is None:
        text = f"not known: schedule.epochs={inputs.settings.schedule.epochs:g} of data that does not exist yet"
        return PlanRow("steps", text, "not known", {"steps": None, "tokens": None, "epochs": None})
    total, epochs = inputs.batch.tokens_per_step * schedule.steps, schedule.epochs
    text = f"{schedule.steps:,}: {tokens(total)} tokens"
    if epochs is not None and schedule.windows_per_epoch is not None:
        digits = 2 if epochs < MANY_EPOCHS else 0
        text += f", {epochs:,.{digits}f} epochs of {counted(schedule.windows_per_epoch, 'window')}"
        text += ": the model will memorize the data" if epochs > MANY_EPOCHS else ""
    return PlanRow("steps", text, "exact", {"steps": schedule.steps, "tokens": total, "epochs": epochs})


def memory_section(inputs: PlanInputs, results: TrialResults | None, calibration: Calibration) -> PlanSection:
    """Return the tensors at their peak by kind, then the memory that a rank needs in total."""
    peak = memory_model.peak(inputs.model, inputs.batch, inputs.zero, inputs.layout.accelerator)
    ranks = inputs.batch.world_size
    state = "fp32 masters, two moments and moving average" if inputs.model.has_ema else "fp32 masters and two moments"
    parts = (
        ("weights", peak.weights, "in bf16, on every rank"),
        ("partition", peak.optimizer, f"{state}, divided among {counted(ranks, 'rank')}"),
        ("gradients", peak.gradients, "fp32 sums on every rank, and reduce buckets"),
        ("activations", peak.activations, "of one micro-batch"),
        ("logits", peak.logits, "and the temporary tensors of the loss"),
    )
    rows = [
        PlanRow(label, f"{size(count):>9}  {what}", "predicted", {f"{label}_bytes": count})
        for label, count, what in parts
    ]
    text = f"{size(peak.total):>9}  peak, in this part of a step: {peak.moment}"
    rows.append(PlanRow("all tensors", text, "predicted", {"tensors_bytes": peak.total}))
    if inputs.settings.hellaswag.every or any(each.every for each in inputs.settings.evaluations.values()):
        count = memory_model.evaluation(inputs.model, inputs.layout.accelerator)
        text = f"{size(count):>9}  at most, in place of gradients, activations and logits, while items are evaluated"
        rows.append(PlanRow("evaluation", text, "predicted", {"evaluation_bytes": count}))
    if results is not None and not inputs.on_cpu:
        allocated = max(rank.device_allocated or 0 for rank in results.ranks)
        off = percent(peak.total / allocated - 1)
        text = f"{size(allocated):>9}  peak of allocated memory: the prediction is off by {off}"
        rows.append(PlanRow("", text, "measured", {"allocated_bytes": allocated}))
    return PlanSection("memory of a rank", [*rows, _rank_row(inputs, results, calibration)])


def _rank_row(inputs: PlanInputs, results: TrialResults | None, calibration: Calibration) -> PlanRow:
    """Return the total memory of a rank and what is available."""
    needed, available = calibration.rank_bytes(inputs, inputs.batch), inputs.memory_free
    text = f"{size(needed):>9}"
    if available is not None:
        kind = "free for each rank" if inputs.on_cpu else "of its GPU"
        text += f"  of {size(available)} {kind}"
    figures: dict[str, Value] = {"rank_memory_bytes": needed, "rank_memory_free_bytes": available}
    if results is not None and inputs.on_cpu:
        minimum = min(rank.resident for rank in results.ranks)
        text += f"; the smallest rank used {size(minimum)}"
        figures["least_rank_memory_bytes"] = minimum
    return PlanRow("rank total", text, calibration.basis, figures)


def time_section(inputs: PlanInputs, timing: Timing | None, now: float) -> PlanSection:
    """Return the durations of the parts and of the whole run.

    Args:
        now: seconds since 1970.
    """
    if timing is None:
        return PlanSection(
            "time", [PlanRow("a step", "not measured: no step was run", "not known", {"step_seconds": None})]
        )
    if inputs.schedule is None:
        rows = [_step_row(inputs, timing)]
        return PlanSection("time", [*rows, PlanRow("whole run", _NO_STEPS, "not known", {"run_seconds": None})])
    schedule = inputs.schedule
    rows = [
        _step_row(inputs, timing),
        *_evaluation_rows(inputs, schedule, timing),
        *_save_rows(schedule, timing),
    ]
    total = run_seconds(inputs, schedule, timing)
    span = f"{duration(total.mean)} ({duration(total.low)} to {duration(total.high)})"
    ends = Range(now + total.mean, now + total.low, now + total.high)
    date = f"{clock(ends.mean)} {zone(ends.mean)} ({clock(ends.low)} to {clock(ends.high)}), if started now"
    basis: Basis = "predicted" if timing.basis == "measured" else timing.basis
    rows.append(PlanRow("whole run", span, basis, {"run_seconds": total}))
    rows.append(PlanRow("finished on", date, basis, {"finish_time": ends}))
    return PlanSection("time", rows)


def _step_row(inputs: PlanInputs, timing: Timing) -> PlanRow:
    step, speed = timing.step, inputs.batch.tokens_per_step / timing.step.mean
    text = f"{_seconds(step.mean)} ({_seconds(step.low)} to {_seconds(step.high)}), {speed:,.0f} tokens/s"
    figures: dict[str, Value] = {"step_seconds": step, "tokens_per_second": speed}
    if timing.mfu is not None:
        text += f", MFU {percent(timing.mfu, 0)}"
        figures["mfu"] = timing.mfu
    return PlanRow("a step", text, timing.basis, figures)


def _evaluation_rows(inputs: PlanInputs, schedule: RunSchedule, timing: Timing) -> list[PlanRow]:
    rows = []
    for name, count in evaluation_counts(inputs.settings, schedule.steps).items():
        cost = (timing.costs or {}).get(name)
        figures: dict[str, Value] = {f"{name}_seconds": cost, f"{name}_times": count}
        label = truncated(name.removeprefix("evaluations."), _LONGEST_LABEL)
        if count and cost is not None:
            rows.append(PlanRow(label, f"{_seconds(cost)} each, {counted(count, 'time')}", "measured", figures))
        elif count:
            rows.append(
                PlanRow(label, f"not measured, {counted(count, 'time')}: counted as 0 s below", "not known", figures)
            )
    return rows


def _save_rows(schedule: RunSchedule, timing: Timing) -> list[PlanRow]:
    count = _saves(schedule)
    if timing.save is None:
        text = f"not measured, {counted(count, 'time')}: counted as 0 s below"
        return [PlanRow("saves", text, "not known", {"save_seconds": None, "save_times": count})]
    cost, write = timing.save_seconds(schedule.save_every), timing.save.write_seconds
    text = f"{_seconds(cost)} of training each, at most {counted(count, 'time')}; written within {_seconds(write)}"
    figures: dict[str, Value] = {"save_seconds": cost, "save_write_seconds": write, "save_times": count}
    return [PlanRow("saves", text, "measured", figures)]


def _saves(schedule: RunSchedule) -> int:
    """Return the largest possible number of saves, as if every validation loss were the best so far."""
    return len(schedule.saves(schedule.validations))


def run_seconds(inputs: PlanInputs, schedule: RunSchedule, timing: Timing) -> Range:
    """Return the seconds of the whole run, including evaluations and saves."""
    times = evaluation_counts(inputs.settings, schedule.steps)
    return timing.run_seconds(schedule, times, _saves(schedule))


@dataclass(frozen=True)
class DiskNeed:
    """Bytes on the disk of the checkpoints, including the logs of the whole run."""

    schedule: RunSchedule
    checkpoint: int  # one checkpoint
    peak: int  # largest size of all checkpoints at one time
    peak_count: Count  # the checkpoints of ``peak``
    at_end: int  # if the best checkpoint is one of the newest, with which it shares its files
    at_end_count: Count  # the checkpoints of ``at_end``
    saves: int  # at most
    logs: int | None
    tensorboard: int | None  # the part of ``logs`` that event files take

    def needed(self, settings: CheckpointSettings) -> int:
        """Return the bytes that the run needs, including those that must remain free."""
        return self.peak + (self.logs or 0) + reserved_bytes(settings)


def disk_need(inputs: PlanInputs, results: TrialResults | None) -> DiskNeed | None:
    """Simulate all saves of the run and return the disk space; None if the number of steps is not known.

    Raises:
        UserError: the run has too many checkpoints to simulate.
    """
    settings, schedule, shape = inputs.settings, inputs.schedule, inputs.model.shape
    if schedule is None:
        return None
    full = results.checkpoint_bytes if results is not None else None
    weights = results.weights_bytes if results is not None else None
    full, weights = full or requirements.checkpoint_bytes(settings), weights or shape.weight_bytes(settings.ema.is_on)
    bytes_of = partial(Count.bytes, full=full, weights=weights)
    not_improving, improving = (simulate(settings.checkpoint, schedule, each, bytes_of) for each in (False, True))
    peak_count = max((not_improving.peak, improving.peak), key=bytes_of)
    times = evaluation_counts(settings, schedule.steps)
    return DiskNeed(
        schedule=schedule,
        checkpoint=full,
        peak=peak_count.bytes(full, weights),
        peak_count=peak_count,
        at_end=improving.at_end.bytes(full, weights),
        at_end_count=improving.at_end,
        saves=improving.saves,
        logs=None if results is None else round(results.logs.total(schedule.steps, times)),
        tensorboard=None if results is None else round(results.tensorboard.total(schedule.steps, times)),
    )


def disk_section(inputs: PlanInputs, results: TrialResults | None, need: DiskNeed | None) -> PlanSection:
    """Return the sizes of checkpoints and logs, and the space that the run needs."""
    if need is None:
        return PlanSection("disk", _disk_rows_without_steps(inputs))
    free_gb = inputs.settings.checkpoint.min_free_gb
    basis: Basis = "measured" if results is not None and results.checkpoint_bytes else "predicted"
    peak = f"{size(need.peak):>9}  {need.peak_count}, including one being written"
    peak += "" if need.schedule.windows_per_epoch else "; without epoch checkpoints, whose number is not known yet"
    needed = need.needed(inputs.settings.checkpoint)
    needed_text = f"{size(needed):>9}  including {free_gb:g} GB to remain free; {size(inputs.disk_free)} are free"
    rows = [
        PlanRow("a checkpoint", f"{size(need.checkpoint):>9}", basis, {"checkpoint_bytes": need.checkpoint}),
        PlanRow("maximum", peak, "predicted", {"checkpoints_most_bytes": need.peak}),
        PlanRow(
            "at the end",
            f"{size(need.at_end):>9}  {need.at_end_count}, if the best checkpoint is one of the newest",
            "predicted",
            {"checkpoints_at_end_bytes": need.at_end},
        ),
        _logs_row(need),
        PlanRow("needed", needed_text, "predicted", {"disk_needed_bytes": needed, "disk_free_bytes": inputs.disk_free}),
    ]
    if inputs.settings.checkpoint.backup.to is not None:
        rows.append(_backup_row(inputs.settings, need))
    return PlanSection("disk", rows)


def _disk_rows_without_steps(inputs: PlanInputs) -> list[PlanRow]:
    checkpoint = requirements.checkpoint_bytes(inputs.settings)
    minimum = disk_requirement(inputs.settings, None, None).minimum
    text = f"{size(minimum):>9}  at least; the total is {_NO_STEPS}; {size(inputs.disk_free)} are free"
    figures: dict[str, Value] = {"disk_needed_bytes": None, "disk_free_bytes": inputs.disk_free}
    return [
        PlanRow("a checkpoint", f"{size(checkpoint):>9}", "predicted", {"checkpoint_bytes": checkpoint}),
        PlanRow("needed", text, "predicted", figures),
    ]


def _logs_row(need: DiskNeed) -> PlanRow:
    figures: dict[str, Value] = {"logs_bytes": need.logs, "tensorboard_bytes": need.tensorboard}
    if need.logs is None or need.tensorboard is None:
        return PlanRow("logs", "not measured", "not known", figures)
    text = f"{size(need.logs):>9}  including {size(need.tensorboard)} of TensorBoard's event files"
    return PlanRow("logs", text, "predicted", figures)


def _backup_row(settings: Settings, need: DiskNeed) -> PlanRow:
    """Return the size of the backups, which are full copies without hard links."""
    backup, schedule = settings.checkpoint.backup, need.schedule
    rolling = min(backup.keep, need.saves) if "latest" in backup.roles else 0
    epochs = len(schedule.epoch_ends) if "epoch" in backup.roles else 0
    best = int("best" in backup.roles and bool(schedule.validations))
    count = (rolling + epochs + best) * need.checkpoint
    text = f"{size(count):>9}  at most, in the backup storage: {rolling} newest, {epochs} of epochs, {best} best"
    return PlanRow("backups", text, "predicted", {"backup_bytes": count})


def cost_section(inputs: PlanInputs, timing: Timing | None, prices: Prices) -> PlanSection:
    """Return energy and cost of the whole run; the cost is in the currency of the prices."""
    if timing is None:
        return PlanSection("cost", [PlanRow("energy", "not known: no step was run", "not known", {"energy_kwh": None})])
    if inputs.schedule is None:
        return PlanSection("cost", [PlanRow("energy", _NO_STEPS, "not known", {"energy_kwh": None})])
    basis: Basis = "predicted" if timing.basis == "measured" else timing.basis
    cost = cost_of(run_seconds(inputs, inputs.schedule, timing), timing.watts, prices)
    rows = []
    if cost is None or cost.energy_kwh is None:
        text = "not known: no power was measured, give --watts"
        rows.append(PlanRow("energy", text, "not known", {"energy_kwh": None}))
    else:
        source = "of the GPUs alone, measured" if cost.watts_recorded else "--watts"
        text = f"{_range(cost.energy_kwh)} kWh, at {cost.watts:,.0f} W ({source})"
        rows.append(PlanRow("energy", text, basis, {"power_watts": cost.watts, "energy_kwh": cost.energy_kwh}))
    if cost is not None and cost.energy_money is not None:
        rows.append(PlanRow("cost of energy", _range(cost.energy_money), basis, {"energy_money": cost.energy_money}))
    if cost is not None and cost.hours_money is not None:
        rows.append(PlanRow("cost of machine", _range(cost.hours_money), basis, {"hours_money": cost.hours_money}))
    return PlanSection("cost", rows)


def problems_of(inputs: PlanInputs, results: TrialResults | None, calibration: Calibration) -> list[str]:
    """Return the reasons why the run is not possible, each with a fix.

    Raises:
        UserError: the run has too many checkpoints to simulate.
    """
    problems = []
    memory, available = calibration.rank_bytes(inputs, inputs.batch), inputs.memory_free
    if available is not None and memory > available:
        fix = _smaller_batch(inputs, calibration)
        problems.append(f"memory: a rank needs {size(memory)}, {size(available)} are available: {fix}")
    disk = _disk_needed(inputs, results)
    if disk > inputs.disk_free:
        fix = _fewer_checkpoints(inputs, results)
        if inputs.other_hardware is not None and not inputs.disk_given:
            fix += "; if that machine has another disk, give --disk-free-gb"
        bound = "up to" if inputs.schedule is not None else "at least"
        problems.append(f"disk: the run needs {bound} {size(disk)}, {size(inputs.disk_free)} are free: {fix}")
    return problems


def _disk_needed(inputs: PlanInputs, results: TrialResults | None) -> int:
    """Return the bytes for the whole run; if its number of steps is not known, the least that it needs."""
    need = disk_need(inputs, results)
    if need is None:
        return disk_requirement(inputs.settings, None, None).minimum
    return need.needed(inputs.settings.checkpoint)


def _smaller_batch(inputs: PlanInputs, calibration: Calibration) -> str:
    """Return a fix with the largest micro-batch that fits."""
    fitting = [each.micro_batch for each in micro_batches(inputs, calibration) if each.fits]
    if fitting:
        return f"set batch.micro_batch={max(fitting)}"
    return "set a smaller model.preset or batch.sequence_length" + (", or use fewer ranks" if inputs.on_cpu else "")


def _fewer_checkpoints(inputs: PlanInputs, results: TrialResults | None) -> str:
    """Return a fix with the largest number of rolling checkpoints that fit."""
    checkpoint = inputs.settings.checkpoint
    for keep_last in range(checkpoint.keep_last - 1, 0, -1):
        changed = inputs.settings.model_copy(
            update={"checkpoint": checkpoint.model_copy(update={"keep_last": keep_last})}
        )
        if _disk_needed(replace(inputs, settings=changed), results) <= inputs.disk_free:
            return f"set checkpoint.keep_last={keep_last}, or free some space"
    return "set checkpoint.keep_epochs or epochs_as=weights, or checkpoint.dir to a larger disk"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:,.0f} ms"
    return f"{seconds:.2f} s" if seconds < 60 else duration(seconds)


def _range(found: Range) -> str:
    digits = 0 if found.mean >= 100 else 2
    return f"{found.mean:,.{digits}f} ({found.low:,.{digits}f} to {found.high:,.{digits}f})"
