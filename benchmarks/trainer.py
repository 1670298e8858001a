"""An engine with its data and state, for benchmarks. Import this module after ``device.choose``."""

from __future__ import annotations

import time

import torch

from benchmarks.reference import rate
from ds_gpt2.config import deepspeed_config
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import open_sources
from ds_gpt2.distributed import collectives, torch_compile
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.rng_state import seed_everything
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape


class Trainer:
    """Trains without monitoring, checkpoints or logs."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        batch = settings.batch
        self.settings = settings
        self.plan = plan_batch(
            batch.tokens_per_step, batch.micro_batch, batch.sequence_length, collectives.world_size()
        )
        windows = open_sources(settings.data).windows("train", batch.sequence_length)
        self.data = TrainingData(windows, self.plan, collectives.rank(), settings.run.seed, device)
        content = deepspeed_config.load_deepspeed_file(settings.deepspeed)
        seed_everything(settings.run.seed)
        model = GPT2(ModelShape(*settings.model.shape, batch.sequence_length), settings.model.dropout)
        if torch_compile.decide(settings.run.compile, device):
            model.compile_blocks()
        completed = deepspeed_config.complete(content, settings, self.plan, model.shape.parameters)
        self.engine = Engine(model, completed, 0.1, settings.ema.decay)
        self.state = TrainState()

    def steps(self, count: int) -> float:
        """Train ``count`` steps; return the seconds until the device has completed them."""
        start_time = time.perf_counter()
        for _ in range(count):
            assert self.engine.accumulate(self.data.micro_batches(self.state.step + 1)) is not None
            self.engine.apply(1e-4)
            self.state.advance(self.plan.tokens_per_step, True, b"")
        self.wait_for_device()
        return time.perf_counter() - start_time

    def step(self, step: int) -> float:
        """Train step ``step`` (1-based) as the training loop does, which reads the loss before the update."""
        loss = self.engine.accumulate(self.data.micro_batches(step))
        assert loss is not None
        mean = float(collectives.sum_over_ranks(loss)) / collectives.world_size()
        self.engine.apply(rate(self.settings, step))
        return mean

    def wait_for_device(self) -> None:
        """Wait until a GPU has completed all operations."""
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
