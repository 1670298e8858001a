"""The engine's arithmetic in a plain loop on one rank without DeepSpeed, to measure the cost of DeepSpeed."""

from __future__ import annotations

import torch

from benchmarks.reference import rate
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import Settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import open_sources
from ds_gpt2.distributed import torch_compile
from ds_gpt2.engine.rng_state import seed_everything
from ds_gpt2.model.gpt2 import GPT2, parameter_groups
from ds_gpt2.model.shape import ModelShape


class Bare:
    """bf16 weights, fp32 gradient accumulation, fp32 master weights, clipping, torch's fused AdamW."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        batch, optimizer = settings.batch, settings.optimizer
        self.settings = settings
        self.plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, 1)
        windows = open_sources(settings.data).windows("train", batch.sequence_length)
        self.data = TrainingData(windows, self.plan, 0, settings.run.seed, device)
        seed_everything(settings.run.seed)
        self.model = GPT2(ModelShape(*settings.model.shape, batch.sequence_length), settings.model.dropout)
        self.model.to(device, torch.bfloat16)
        if torch_compile.decide(settings.run.compile, device):
            self.model.compile_blocks()
        groups = parameter_groups(self.model, optimizer.weight_decay)
        self.weights = [weight for group in groups for weight in group["params"]]
        self.masters = [weight.detach().float() for weight in self.weights]
        self.sums = [torch.zeros_like(master) for master in self.masters]
        masters = iter(self.masters)
        for group in groups:
            group["params"] = [next(masters) for _ in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps, fused=True)

    def step(self, step: int) -> float:
        """Train step ``step`` (1-based) and return its loss."""
        losses = []
        torch._foreach_zero_(self.sums)
        for tokens, targets in self.data.micro_batches(step):
            loss = self.model(tokens, targets)
            (loss / self.plan.accumulation).backward()
            losses.append(loss.detach())
            with torch.no_grad():
                torch._foreach_add_(self.sums, [weight.grad.float() for weight in self.weights])
            self.model.zero_grad(set_to_none=True)
        self._update(rate(self.settings, step))
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.sums)))
        scale = (self.settings.optimizer.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self.sums, scale)
        for master, gradient in zip(self.masters, self.sums, strict=True):
            master.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)
