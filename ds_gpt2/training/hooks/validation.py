"""Loss on a fixed set of held-out windows, averaged over tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.interval import Every
from ds_gpt2.config.settings import ValidationSettings
from ds_gpt2.data.loader import on_device, with_targets
from ds_gpt2.data.sources import HeldOut
from ds_gpt2.data.token_bytes import count_bytes
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation.eval_mode import eval_mode
from ds_gpt2.evaluation.loss import bits_per_byte, count_windows, perplexity
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.hooks.hook import Hook, on_all_ranks

log = logging.getLogger(__name__)


class Validation(Hook):
    """Validation loss of the weights.

    With the same weights, it is bitwise identical for any number of ranks.

    Windows are evaluated in groups that do not depend on the world size, ranks take turns, and the groups' losses
    are summed in one order. A group has one loss, as a micro-batch of training has; ``loss.window_losses`` returns one
    for each window, whose mean is the same up to fp32 rounding.
    """

    name = "validation loss"
    is_bounded = True

    def __init__(self, settings: ValidationSettings, held_out: Sequence[HeldOut], group: int) -> None:
        """
        Args:
            held_out: the validation windows of each source; of them the number in the settings is used, at least one
                of each source.
            group: windows per forward pass.
        """
        self.every = Every(settings.every)
        self._held_out = held_out
        self._groups: list[tuple[int, npt.NDArray[np.int64]]] = []  # source and windows
        for source, part in enumerate(held_out):
            count = count_windows(part.windows, round(part.size * settings.tokens))
            self._groups += [(source, np.arange(start, min(start + group, count))) for start in range(0, count, group)]
        self._sources = torch.tensor([source for source, _ in self._groups])
        self._sizes = torch.tensor([len(indices) for _, indices in self._groups], dtype=torch.float64)
        self._group_bytes = torch.zeros(len(self._groups), dtype=torch.int64)  # of the target tokens, once read
        self._bytes_per_token: list[float] = []  # of each source; known from the first validation on

    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        losses = self.losses(engine)
        loss = self._mean(losses)
        parts = {f"val/{part.name}/loss": each for part, each in zip(self._held_out, losses, strict=True) if part.name}
        return parts | self._metrics(loss, state) | self._bits_per_byte(loss)

    def loss(self, engine: Engine) -> float:
        """Return the validation loss: the mean of ``losses`` by the shares of the sources, in nats.

        Sources with share 0 are not evaluated. Raises what ``losses`` raises.
        """
        return self._mean(self._means(engine, [source for source, part in enumerate(self._held_out) if part.share]))

    def _mean(self, losses: Sequence[float]) -> float:
        """Return the mean of the sources' losses, weighted by their shares."""
        return sum(part.share * loss for part, loss in zip(self._held_out, losses, strict=True) if part.share)

    def _bits_per_byte(self, loss: float) -> StepMetrics:
        """Return the loss in bits per UTF-8 byte of the target tokens; <|endoftext|> has none."""
        mean_bytes = self._mean(self._bytes_per_token) if self._bytes_per_token else 0.0
        return {"val/bits_per_byte": bits_per_byte(loss, mean_bytes)} if mean_bytes else {}

    def _metrics(self, loss: float, state: TrainState) -> StepMetrics:
        if not math.isfinite(loss):
            best = "none yet" if state.best_step is None else f"{state.best_val_loss:.4f} at step {state.best_step:,}"
            log.warning(f"step {state.step:,}: the validation loss is {loss}, not a finite number; best so far: {best}")
            return {"val/loss": loss, "val/perplexity": loss}
        is_best = state.is_best(loss)
        log.info(f"step {state.step:,}: validation loss {loss:.4f}{'  (best so far)' if is_best else ''}")
        metrics: StepMetrics = {"val/loss": loss, "val/perplexity": perplexity(loss)}
        return metrics | ({"marks/best": f"best validation loss so far: {loss:.4f}"} if is_best else {})

    def losses(self, engine: Engine) -> list[float]:
        """Return the mean cross entropy over the tokens of each source, in nats.

        Raises:
            Interrupted: on every rank: a stop is requested.
            HookFailedError: on every rank: a rank has failed, such as to read its windows.
        """
        means = self._means(engine, range(len(self._held_out)))
        if not self._bytes_per_token:
            self._bytes_per_token = self._count_bytes(engine)
        return means

    @torch.no_grad()
    def _means(self, engine: Engine, sources: Collection[int]) -> list[float]:
        """Return the mean cross entropy over the tokens of each source, in nats; 0 for those not in ``sources``."""
        groups = [number for number, (source, _) in enumerate(self._groups) if source in sources]
        losses = on_all_ranks(lambda: self._losses(engine, groups))
        per_group = collectives.sum_over_ranks(losses).cpu()
        means = []
        for source in range(len(self._held_out)):
            own = self._sources == source
            means.append(float((per_group[own] * self._sizes[own]).sum() / self._sizes[own].sum()))
        return means

    def _count_bytes(self, engine: Engine) -> list[float]:
        """Return the bytes per target token of each source; every rank has read its groups."""
        per_group = collectives.sum_over_ranks(self._group_bytes.clone().to(engine.device)).cpu()
        means = []
        for source, part in enumerate(self._held_out):
            own = self._sources == source
            means.append(int(per_group[own].sum()) / (float(self._sizes[own].sum()) * part.windows.sequence_length))
        return means

    def _losses(self, engine: Engine, groups: Sequence[int]) -> torch.Tensor:
        """Return the loss of each group, (all groups,) fp64; 0 for those of other ranks and those not in ``groups``."""
        losses = torch.zeros(len(self._groups), dtype=torch.float64, device=engine.device)
        with eval_mode(engine.model):
            for number in groups[collectives.rank() :: collectives.world_size()]:
                self.progress()
                windows = self._read(number)
                if not self._bytes_per_token:
                    self._group_bytes[number] = count_bytes(windows)
                tokens, targets = with_targets(on_device(windows, engine.device))
                losses[number] = engine.model(tokens, targets)
        return losses

    def _read(self, group: int) -> npt.NDArray[np.int64]:
        """Return the windows of a group, (windows, sequence_length + 1) int64.

        Raises:
            Interrupted: a stop is requested while a shard cannot be read.
            UserError: a shard cannot be read.
        """
        try:
            source, indices = self._groups[group]
            return self._held_out[source].windows.read(indices)
        except UserError:
            self.progress()
            raise
