"""Predict the memory of a rank, and compare other divisions of the token budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_gpt2.config.batch_plan import BatchPlan, fit_ranks
from ds_gpt2.tools.plan.plan import Basis, Subject
from ds_gpt2.tools.plan.trial_results import Traces
from ds_gpt2.tools.resources import memory_model

# Resident memory of a CPU rank without a trial: bytes of libraries and small objects, and bytes of glibc's heap per
# byte of temporary tensors. Gloo ranks, 7 M and 30 M parameters: benchmarks/results/plan_accuracy_cpu.json.
_LIBRARIES, _HEAP = 460_000_000, 1.9
# On a GPU without a trial: CUDA's context, NCCL's buffers, fragmentation of PyTorch's allocator. Assumed, not measured.
_BESIDE_TENSORS = 1_000_000_000

_OTHER_RANKS = (1, 2, 3, 4, 6, 8)
_NEIGHBOURS = 3  # smaller and larger micro-batches that are compared


@dataclass(frozen=True)
class Calibration:
    """Converts bytes of tensors to bytes that a rank uses: ``base + lasting + factor x passing``."""

    base: float
    factor: float
    basis: Basis

    def rank_bytes(self, subject: Subject, batch: BatchPlan) -> int:
        """Return the bytes that a rank uses.

        On a CPU, this includes the growth of the heap after the few steps of a trial: because of fragmentation, the
        largest temporary tensor may not fit into free heap memory again, and the heap never shrinks.
        """
        lasting, passing = tensor_bytes(subject, batch)
        growth = memory_model.largest_block(subject.model, batch, "cpu") if subject.on_cpu else 0
        return round(self.base + lasting + self.factor * passing + growth)


@dataclass(frozen=True)
class Option:
    """A division of the token budget into micro-batches and ranks."""

    micro_batch: int
    accumulation: int
    ranks: int
    rank_bytes: int
    fits: bool | None  # None: not known


def tensor_bytes(subject: Subject, batch: BatchPlan) -> tuple[int, int]:
    """Return the bytes of permanent tensors and the peak of temporary ones.

    On a CPU, the permanent ones include the copy from which a save in the background writes.
    """
    most = memory_model.peak(subject.model, batch, subject.zero, subject.layout.accelerator)
    lasting = most.lasting
    if subject.on_cpu and subject.settings.checkpoint.in_background:
        lasting += memory_model.snapshot(subject.model, batch.world_size, rank=0)
    return lasting, most.passing


def calibrate(subject: Subject, traces: Traces | None) -> Calibration:
    """Return the calibration by the rank that used most memory in the trial; without a trial, an estimate."""
    if traces is None:
        base, factor = (_LIBRARIES, _HEAP) if subject.on_cpu else (_BESIDE_TENSORS, 1.0)
        return Calibration(base, factor, "estimated")
    if subject.on_cpu:
        base = max(rank.libraries for rank in traces.ranks)
        used = max(rank.resident for rank in traces.ranks) - base
    else:
        base = max(rank.device_beside or 0 for rank in traces.ranks)
        used = max(rank.device_reserved or 0 for rank in traces.ranks)
    lasting, passing = tensor_bytes(subject, replace(subject.batch, accumulation=traces.accumulation))
    factor = (used - lasting) / passing
    if subject.on_cpu and factor > _HEAP:  # the heap grows by at most _HEAP; the rest does not depend on the batch
        base, factor = base + round((factor - _HEAP) * passing), _HEAP
    return Calibration(base, factor, "measured")


def micro_batches(subject: Subject, calibration: Calibration) -> list[Option]:
    """Return the configured micro-batch and its neighbours that divide the budget, in ascending order."""
    batch = subject.batch
    windows = batch.micro_batch * batch.accumulation
    divisors = [number for number in range(1, windows + 1) if windows % number == 0]
    index = divisors.index(batch.micro_batch)
    near = divisors[max(0, index - _NEIGHBOURS) : index + _NEIGHBOURS + 1]
    return [_option(subject, calibration, each, batch.world_size) for each in near]


def other_ranks(subject: Subject, calibration: Calibration) -> list[Option]:
    """Return the same budget on other numbers of ranks, each with the nearest micro-batch that is possible."""
    batch = subject.batch
    found = []
    for ranks in _OTHER_RANKS:
        shared, micro_batch = fit_ranks(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, ranks)
        if shared == ranks != batch.world_size:
            found.append(_option(subject, calibration, micro_batch, ranks))
    return found


def _option(subject: Subject, calibration: Calibration, micro_batch: int, ranks: int) -> Option:
    batch = subject.batch
    accumulation = batch.windows_per_step // (micro_batch * ranks)
    other = BatchPlan(micro_batch, batch.sequence_length, accumulation, ranks)
    needed, available = calibration.rank_bytes(subject, other), subject.memory_free
    if available is not None and subject.on_cpu:
        available = available * batch.world_size // ranks  # the ranks share the memory of the host
    return Option(micro_batch, accumulation, ranks, needed, None if available is None else needed <= available)
