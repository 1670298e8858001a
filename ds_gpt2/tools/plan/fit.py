"""What of a machine's memory a rank takes, and which other ways to share out the token budget would fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_gpt2.config.batch_plan import BatchPlan, fit_ranks
from ds_gpt2.tools.plan.plan import Basis, Subject
from ds_gpt2.tools.plan.trial_results import Traces
from ds_gpt2.tools.resources import memory_model

# Resident memory of a CPU rank without a trial: libraries and small things, and what glibc's heap comes to for each
# byte that comes and goes at most. Gloo ranks, 7 M and 30 M parameters: benchmarks/results/plan_accuracy_cpu.json.
_LIBRARIES, _HEAP = 460_000_000, 1.9
# On a GPU without a trial: CUDA's context, NCCL's buffers, what PyTorch's allocator cannot use. A guess: not measured.
_BESIDE_TENSORS = 1_000_000_000

_OTHER_RANKS = (1, 2, 3, 4, 6, 8)
_NEIGHBOURS = 3  # micro-batches on either side of the one that is set


@dataclass(frozen=True)
class Calibration:
    """From bytes of tensors to bytes that a rank takes: ``base + lasting + factor x passing``."""

    base: float
    factor: float
    basis: Basis

    def rank_bytes(self, subject: Subject, batch: BatchPlan) -> int:
        """On a CPU with what the heap, which gives nothing back, grows by after a trial's few steps.

        In time it may find no room for the largest tensor between others that stay: of two runs that are the same one
        grows by twice its size, the other by nothing.
        """
        lasting, passing = tensor_bytes(subject, batch)
        growth = memory_model.largest_block(subject.model, batch, "cpu") if subject.on_cpu else 0
        return round(self.base + lasting + self.factor * passing + growth)


@dataclass(frozen=True)
class Option:
    """A way to share out the token budget."""

    micro_batch: int
    accumulation: int
    ranks: int
    rank_bytes: int
    fits: bool | None  # None: not known


def tensor_bytes(subject: Subject, batch: BatchPlan) -> tuple[int, int]:
    """What lasts, on a CPU with the copy that a save in the background writes from; and at most what comes and goes."""
    most = memory_model.peak(subject.model, batch, subject.zero, subject.place.accelerator)
    lasting = most.lasting
    if subject.on_cpu and subject.settings.checkpoint.in_background:
        lasting += memory_model.snapshot(subject.model, batch.world_size, rank=0)
    return lasting, most.passing


def calibrate(subject: Subject, traces: Traces | None) -> Calibration:
    """By the rank that took most, if there was a trial."""
    if traces is None:
        base, factor = (_LIBRARIES, _HEAP) if subject.on_cpu else (_BESIDE_TENSORS, 1.0)
        return Calibration(base, factor, "estimated")
    if subject.on_cpu:
        base = max(rank.libraries for rank in traces.ranks)
        taken = max(rank.resident for rank in traces.ranks) - base
    else:
        base = max(rank.device_beside or 0 for rank in traces.ranks)
        taken = max(rank.device_reserved or 0 for rank in traces.ranks)
    lasting, passing = tensor_bytes(subject, replace(subject.batch, accumulation=traces.accumulation))
    factor = (taken - lasting) / passing
    if subject.on_cpu and factor > _HEAP:  # the heap makes no more of tensors: the rest is there anyway
        base, factor = base + round((factor - _HEAP) * passing), _HEAP
    return Calibration(base, factor, "measured")


def micro_batches(subject: Subject, calibration: Calibration) -> list[Option]:
    """Those that divide the budget on as many ranks, the one that is set among its neighbours, in ascending order."""
    batch = subject.batch
    windows = batch.micro_batch * batch.accumulation
    fitting = [number for number in range(1, windows + 1) if windows % number == 0]
    place = fitting.index(batch.micro_batch)
    near = fitting[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1]
    return [_option(subject, calibration, each, batch.world_size) for each in near]


def other_ranks(subject: Subject, calibration: Calibration) -> list[Option]:
    """The same budget on other numbers of ranks, with the nearest micro-batch that each can take."""
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
    needed, there = calibration.rank_bytes(subject, other), subject.memory_free
    if there is not None and subject.on_cpu:
        there = there * batch.world_size // ranks  # all ranks share the host's
    return Option(micro_batch, accumulation, ranks, needed, None if there is None else needed <= there)
