"""What the model writes: the same prompts and the same dice every time, so that days can be compared."""

from __future__ import annotations

import logging

import torch

from ds_gpt2 import dist
from ds_gpt2.config import SamplesSettings
from ds_gpt2.engine import Engine
from ds_gpt2.generate import generate
from ds_gpt2.hooks.hook import Hook
from ds_gpt2.monitor import Seen
from ds_gpt2.schedule import Every
from ds_gpt2.state import TrainState

log = logging.getLogger(__name__)


class Samples(Hook):
    """Continues each prompt on rank 0 (under ZeRO-2 every rank holds all weights)."""

    def __init__(self, settings: SamplesSettings, seed: int) -> None:
        self.every = Every(settings.every)
        self._settings = settings
        self._seed = seed

    def observe(self, engine: Engine, state: TrainState) -> Seen:
        if not dist.is_main():
            return {}
        engine.model.eval()
        dice = torch.Generator(engine.device).manual_seed(self._seed)
        seen: Seen = {}
        for number, prompt in enumerate(self._settings.prompts):
            text = generate(
                engine.model,
                prompt,
                self._settings.tokens,
                temperature=self._settings.temperature,
                top_k=self._settings.top_k,
                generator=dice,
            )
            seen[f"samples/{number}"] = text
            log.info(f"step {state.step}: sample {number}: {text!r}")
        engine.model.train()
        return seen
