"""Predict the memory of a rank, and compare other divisions of the token budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_gpt2.config.batch_plan import BatchPlan, fit_ranks
from ds_gpt2.tools.plan.inputs import PlanInputs
from ds_gpt2.tools.plan.plan import Basis, Option
from ds_gpt2.tools.plan.trial_results import TrialResults
from ds_gpt2.tools.resources import memory_model

# Usual resident memory of a CPU rank without a trial: bytes of libraries and small objects, and bytes of glibc's heap
# per byte of temporary tensors. Gloo ranks, 7 M and 30 M parameters: benchmarks/results/plan_accuracy_cpu.json.
_USUAL_LIBRARY_BYTES, _HEAP = 460_000_000, 1.9
# On a GPU without a trial: CUDA's context, NCCL's buffers, fragmentation of PyTorch's allocator. Assumed, not measured.
_CUDA_OVERHEAD = 1_000_000_000

_OTHER_RANKS = (1, 2, 3, 4, 6, 8)
_NEIGHBORS = 3  # smaller and larger micro-batches that are compared


@dataclass(frozen=True)
class Calibration:
    """Converts bytes of tensors to bytes that a rank uses: ``base + persistent + factor x transient``."""

    base: float
    factor: float
    basis: Basis

    def rank_bytes(self, inputs: PlanInputs, batch: BatchPlan) -> int:
        """Return the bytes that a rank uses.

        On a CPU, this includes the growth of the heap after the few steps of a trial: because of fragmentation, the
        largest temporary tensor may not fit into free heap memory again, and the heap never shrinks.
        """
        persistent, transient = tensor_bytes(inputs, batch)
        growth = memory_model.largest_block(inputs.model, batch, "cpu") if inputs.on_cpu else 0
        return round(self.base + persistent + self.factor * transient + growth)


def tensor_bytes(inputs: PlanInputs, batch: BatchPlan) -> tuple[int, int]:
    """Return the bytes of permanent tensors and the peak of temporary ones.

    On a CPU, the permanent ones include the copy from which a save in the background writes.
    """
    peak = memory_model.peak(inputs.model, batch, inputs.zero, inputs.layout.accelerator)
    persistent = peak.persistent
    if inputs.on_cpu and inputs.settings.checkpoint.in_background:
        persistent += memory_model.snapshot(inputs.model, batch.world_size, rank=0)
    return persistent, peak.transient


def calibrate(inputs: PlanInputs, results: TrialResults | None) -> Calibration:
    """Return the calibration by the rank that used most memory in the trial; without a trial, an estimate."""
    if results is None:
        base, factor = (_USUAL_LIBRARY_BYTES, _HEAP) if inputs.on_cpu else (_CUDA_OVERHEAD, 1.0)
        return Calibration(base, factor, "estimated")
    if inputs.on_cpu:
        base = max(rank.libraries for rank in results.ranks)
        used = max(rank.resident for rank in results.ranks) - base
    else:
        base = max(rank.device_outside_allocator or 0 for rank in results.ranks)
        used = max(rank.device_reserved or 0 for rank in results.ranks)
    persistent, transient = tensor_bytes(inputs, replace(inputs.batch, accumulation=results.accumulation))
    factor = (used - persistent) / transient
    if inputs.on_cpu and factor > _HEAP:  # the heap grows by at most _HEAP; the rest does not depend on the batch
        base, factor = base + round((factor - _HEAP) * transient), _HEAP
    return Calibration(base, factor, "measured")


def micro_batches(inputs: PlanInputs, calibration: Calibration) -> list[Option]:
    """Return the configured micro-batch and its neighbors that divide the budget, in ascending order."""
    batch = inputs.batch
    windows = batch.micro_batch * batch.accumulation
    divisors = [number for number in range(1, windows + 1) if windows % number == 0]
    index = divisors.index(batch.micro_batch)
    near = divisors[max(0, index - _NEIGHBORS) : index + _NEIGHBORS + 1]
    return [_option(inputs, calibration, each, batch.world_size) for each in near]


def other_ranks(inputs: PlanInputs, calibration: Calibration) -> list[Option]:
    """Return the same budget on other numbers of ranks, each with the nearest micro-batch that is possible."""
    batch = inputs.batch
    found = []
    for ranks in _OTHER_RANKS:
        fitting_ranks, micro_batch = fit_ranks(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, ranks)
        if fitting_ranks == ranks != batch.world_size:
            found.append(_option(inputs, calibration, micro_batch, ranks))
    return found


def _option(inputs: PlanInputs, calibration: Calibration, micro_batch: int, ranks: int) -> Option:
    batch = inputs.batch
    accumulation = batch.windows_per_step // (micro_batch * ranks)
    other = BatchPlan(micro_batch, batch.sequence_length, accumulation, ranks)
    needed, available = calibration.rank_bytes(inputs, other), inputs.memory_free
    if available is not None and inputs.on_cpu:
        available = available * batch.world_size // ranks  # the ranks share the memory of the host
    return Option(micro_batch, accumulation, ranks, needed, None if available is None else needed <= available)
