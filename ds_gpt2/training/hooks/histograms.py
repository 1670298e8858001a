"""Histograms of weights and gradients, and the relative size of an update for each part of the model.

Every rank counts the elements of its own partition, and the counts are summed: no tensor is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from ds_gpt2.config.interval import Every
from ds_gpt2.config.settings import HistogramsSettings
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.monitoring.monitor import Histogram, StepMetrics
from ds_gpt2.training.hooks.hook import Hook, on_all_ranks

_CHUNK = 1 << 22  # elements counted at a time
_PER_DECADE, _SMALLEST, _LARGEST = 12, -9, 3  # buckets per decade; range of magnitudes, as powers of ten

_MAGNITUDES = [10 ** (_SMALLEST + n / _PER_DECADE) for n in range((_LARGEST - _SMALLEST) * _PER_DECADE + 1)]
_EDGES = [-edge for edge in reversed(_MAGNITUDES)] + _MAGNITUDES  # the bucket in the middle holds zero
_SUM, _SQUARES = 0, 1  # columns that are summed over ranks; the counts follow
_COUNTS = slice(2, 3 + len(_EDGES))


class Histograms(Hook):
    """Histograms ``param/<tensor>`` and ``grad/<tensor>`` of matrices, scalars ``update_ratio/<part>`` of all parts.

    A part is an embedding, the final norm or a whole layer. The ratio is |w after - w before| / |w before|, L2 norms
    over the part: around 1e-3 is usual; 0 means no learning, 1e-1 divergence.
    """

    name = "histograms"
    can_be_repeated = False  # the gradients are not saved

    def __init__(self, settings: HistogramsSettings, model: GPT2) -> None:
        self.every = Every(settings.every)
        self._norms = settings.norms
        shown = _spread(model.shape.layers, settings.layers)
        names = [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]
        self._shown = [name for name in names if _layer_of(name) in (None, *shown)]
        self._parts = list(dict.fromkeys(part_of(name) for name, _ in model.named_parameters()))
        self._gradients: StepMetrics = {}
        self._gradient_norms: list[float] = []
        self._before: dict[str, torch.Tensor] = {}

    def before_update(self, engine: Engine) -> None:
        gradients = engine.gradients()
        self._gradients = _histograms("grad", self._shown, gradients, engine.device)
        self._gradient_norms = self._norms_of(_in_chunks(gradients), engine.device)
        # In host memory: the device may not have enough free memory for a copy.
        self._before = on_all_ranks(
            lambda: {name: part.to("cpu", copy=True) for name, part in engine.masters().items()}
        )

    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        masters, before, gradients = engine.masters(), self._before, self._gradients
        self._gradients, self._before = {}, {}  # freed also if this fails
        moved = {name: (chunk - old for chunk, old in _pairs(part, before[name])) for name, part in masters.items()}
        moved_norms, norms = self._norms_of(moved, engine.device), self._norms_of(_in_chunks(before), engine.device)
        metrics: StepMetrics = gradients | _histograms("param", self._shown, masters, engine.device)
        metrics |= {
            f"update_ratio/{part}": moved_norm / norm if norm else 0.0
            for part, moved_norm, norm in zip(self._parts, moved_norms, norms, strict=True)
        }
        if self._norms:
            metrics |= {f"param_norm/{part}": norm for part, norm in zip(self._parts, norms, strict=True)}
            metrics |= {f"grad_norm/{part}": norm for part, norm in zip(self._parts, self._gradient_norms, strict=True)}
        return metrics

    def _norms_of(self, chunks: Mapping[str, Iterable[torch.Tensor]], device: torch.device) -> list[float]:
        """Return the L2 norm of each part, over all ranks."""
        squares = on_all_ranks(lambda: self._squares_of(chunks, device))
        return collectives.sum_over_ranks(squares).sqrt().tolist()

    def _squares_of(self, chunks: Mapping[str, Iterable[torch.Tensor]], device: torch.device) -> torch.Tensor:
        """Return this rank's sum of squares of each part, (parts,) fp64."""
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=device)
        for name, pieces in chunks.items():
            for chunk in pieces:
                squares[self._parts.index(part_of(name))] += chunk.float().square().sum(dtype=torch.float64)
        return squares


def part_of(name: str) -> str:
    """Return the part of a parameter: ``h.3`` of ``h.3.mlp.c_fc.weight``, ``wte`` of ``wte.weight``."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "h" else words[0]


def _counts(
    names: list[str], tensors: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's sums and counts, and the extremes, see ``_count``: (names, columns) and (names, 2) fp64."""
    sums = torch.zeros(len(names), _COUNTS.stop, dtype=torch.float64, device=device)
    extremes = torch.full((len(names), 2), -math.inf, dtype=torch.float64, device=device)
    edges = torch.tensor(_EDGES, dtype=torch.float32, device=device)
    for row, name in enumerate(names):
        for chunk in _chunks(tensors[name]) if name in tensors else ():
            _count(chunk.float(), edges, sums[row], extremes[row])
    return sums, extremes


def _histograms(kind: str, names: list[str], tensors: dict[str, torch.Tensor], device: torch.device) -> StepMetrics:
    """Return ``<kind>/<name>`` of each tensor over all ranks, without elements that are not finite."""
    sums, extremes = on_all_ranks(lambda: _counts(names, tensors, device))
    totals, (largest, smallest) = collectives.sum_over_ranks(sums).cpu(), collectives.max_over_ranks(extremes).cpu().t()
    return {
        f"{kind}/{name}": _histogram(totals[row], -float(smallest[row]), float(largest[row]))
        for row, name in enumerate(names)
        if totals[row, _COUNTS].any()
    }


def _count(values: torch.Tensor, edges: torch.Tensor, sums: torch.Tensor, extremes: torch.Tensor) -> None:
    """Add ``values``, fp32, to a row of sums and of (largest, -smallest)."""
    values = values[values.isfinite()]
    if not len(values):
        return
    buckets = torch.bucketize(values, edges, out_int32=True)
    sums[_COUNTS] += torch.bincount(buckets, minlength=len(edges) + 1)
    sums[_SUM] += values.sum(dtype=torch.float64)
    sums[_SQUARES] += values.square().sum(dtype=torch.float64)
    torch.maximum(extremes, torch.stack([values.max(), -values.min()]), out=extremes)


def _histogram(sums: torch.Tensor, smallest: float, largest: float) -> Histogram:
    """Return the histogram of a row of sums, without empty buckets at either end."""
    counts = sums[_COUNTS].tolist()
    limits = [*_EDGES, max(largest, _EDGES[-1])]
    filled = [bucket for bucket, count in enumerate(counts) if count]
    kept = slice(max(0, filled[0] - 1), filled[-1] + 1)  # an empty bucket first: its edge is the lower limit
    return Histogram(
        limits[kept], counts[kept], smallest, largest, total=float(sums[_SUM]), squares=float(sums[_SQUARES])
    )


def _in_chunks(tensors: dict[str, torch.Tensor]) -> dict[str, Iterable[torch.Tensor]]:
    return {name: _chunks(tensor) for name, tensor in tensors.items()}


def _chunks(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    return tensor.detach().split(_CHUNK)


def _pairs(new: torch.Tensor, old: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for chunk, before in zip(_chunks(new), _chunks(old), strict=True):
        yield chunk, before.to(chunk.device)


def _layer_of(name: str) -> int | None:
    words = name.split(".")
    return int(words[1]) if words[0] == "h" else None


def _spread(layers: int, most: int) -> set[int]:
    """Return at most ``most`` evenly spaced layers, including the first and the last."""
    count = min(layers, most)
    return {round(n * (layers - 1) / max(1, count - 1)) for n in range(count)}
