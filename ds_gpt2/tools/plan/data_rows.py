"""What a plan says about the data: that it is missing, or how a mixture uses its sources."""

from __future__ import annotations

from ds_gpt2.common.formatting import tokens
from ds_gpt2.config.sections import MIXTURE_PERIOD
from ds_gpt2.data.sources import Sources
from ds_gpt2.tools.plan.inputs import PlanInputs
from ds_gpt2.tools.plan.plan import PlanRow
from ds_gpt2.tools.resources.requirements import MANY_EPOCHS


def data_rows(inputs: PlanInputs) -> list[PlanRow]:
    """Return a row for each source of a mixture; for data that does not exist yet, one with the reason."""
    if inputs.no_data is not None:
        return [PlanRow("data", f"no epochs and no trial: {inputs.no_data}", "not known")]
    if inputs.sources is None or inputs.schedule is None or not inputs.sources.names:
        return []
    return [_source_row(inputs.sources, number, used) for number, used in enumerate(_use_of_sources(inputs))]


def _use_of_sources(inputs: PlanInputs) -> list[tuple[int, float]]:
    """Return the training tokens that the run takes from each source, and its passes over the source."""
    assert inputs.sources is not None and inputs.schedule is not None
    batch, windows = inputs.batch, inputs.schedule.steps * inputs.batch.windows_per_step
    mixture = inputs.sources.mixture(batch.sequence_length, batch.windows_per_step, seed=0)
    used, passes = mixture.used_before(windows).tolist(), mixture.epochs_before(windows).tolist()
    return [(count * batch.sequence_length, epochs) for count, epochs in zip(used, passes, strict=True)]


def _source_row(sources: Sources, number: int, used: tuple[int, float]) -> PlanRow:
    """Return the shares of a source in each stage, and how often the run passes over it."""
    name, (taken, epochs) = sources.names[number], used
    shares = [
        f"{shares[number] / MIXTURE_PERIOD:.1%}" + (f" from step {step:,}" if step > 1 else "")
        for step, shares in sources.stages
    ]
    text = f"{name}, {', '.join(shares)}: {tokens(taken)} tokens, {epochs:,.2f} passes"
    text += ": the model will memorize it" if epochs > MANY_EPOCHS else ""
    return PlanRow("source", text, "exact", {f"source_{name}_tokens": taken, f"source_{name}_epochs": epochs})
