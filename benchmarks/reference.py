"""A plain PyTorch training loop, the reference for speed and losses.

The same model in fp32 under bf16 autocast, with torch's cross entropy over all logits, torch's AdamW, clipping, and
DistributedDataParallel if there are several ranks. No DeepSpeed, no chunks, no allocator settings.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 4 benchmarks/reference.py CONFIG --steps 20 --out result.json
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import open_sources
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.rng_state import seed_everything
from ds_gpt2.model.gpt2 import GPT2, parameter_groups
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.training.lr_schedule import LearningRate


class PlainLoss(nn.Module):
    """The model with the loss of a plain script: cross entropy over all logits in fp32.

    The padding rows are included, as in nanoGPT: they add 0.0009 to an initial loss, but 50,257 columns are slow.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(self.model.hidden(tokens), self.model.wte.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Reference:
    """The loop, one step at a time. ``compiled`` compiles the whole model including the loss."""

    def __init__(self, settings: Settings, device: torch.device, compiled: bool = False) -> None:
        batch = settings.batch
        self.settings = settings
        self.plan = plan_batch(
            batch.tokens_per_step, batch.micro_batch, batch.sequence_length, collectives.world_size()
        )
        windows = open_sources(settings.data).windows("train", batch.sequence_length)
        self.data = TrainingData(windows, self.plan, collectives.rank(), settings.run.seed, device)
        self.device = device
        seed_everything(settings.run.seed)
        shape = ModelShape(*settings.model.shape, batch.sequence_length)
        self.model = GPT2(shape, settings.model.dropout).to(device)
        net: nn.Module = PlainLoss(self.model)
        if compiled:
            net.compile()
        self.net = net
        self.parallel = DistributedDataParallel(net) if collectives.world_size() > 1 else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.optimizer.weight_decay),
            betas=settings.optimizer.betas,
            eps=settings.optimizer.eps,
            fused=True,
        )

    def step(self, step: int) -> float:
        """Train step ``step`` (1-based); return its loss, the mean over ranks."""
        settings, accumulation = self.settings, self.plan.accumulation
        total = torch.zeros((), device=self.device)
        for number, (tokens, targets) in enumerate(self.data.micro_batches(step), start=1):
            sync: AbstractContextManager[None] = nullcontext()
            if self.parallel is not None and number < accumulation:
                sync = self.parallel.no_sync()
            with sync:
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss = (self.parallel or self.net)(tokens, targets)
                (loss / accumulation).backward()
            total += loss.detach() / accumulation
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.optimizer.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(settings, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(collectives.sum_over_ranks(total)) / collectives.world_size()


def rate(settings: Settings, step: int) -> float:
    """Return the learning rate of ``step``."""
    schedule = settings.schedule
    assert schedule.steps is not None
    return LearningRate(schedule, schedule.steps)(step)


def train_reference(config: Path, steps: int, seconds: list[float] | None = None) -> list[float]:
    """Train on the CPU; return the mean loss over ranks of every step. The step times are appended to ``seconds``."""
    reference = Reference(load_settings(config), torch.device("cpu"))
    losses = []
    for step in range(1, steps + 1):
        start_time = time.perf_counter()
        losses.append(reference.step(step))
        if seconds is not None:
            seconds.append(time.perf_counter() - start_time)
    return losses


def main() -> None:
    parser = make_parser(__doc__, "--out")
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    if "RANK" in os.environ:
        torch_dist.init_process_group("gloo")
    seconds: list[float] = []
    losses = train_reference(options.config, options.steps, seconds)
    memory = collectives.gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if collectives.is_main():
        options.out.write_text(json.dumps({"losses": losses, "seconds": seconds, "peak_bytes": memory}))
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


if __name__ == "__main__":
    main()
