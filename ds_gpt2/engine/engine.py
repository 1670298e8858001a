"""The DeepSpeed engine, wrapped to what a training loop says: accumulate, apply."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import safe_set_full_fp32_param
from pydantic import ValidationError

from ds_gpt2.common import host
from ds_gpt2.common.errors import UserError
from ds_gpt2.data.loader import MicroBatch
from ds_gpt2.distributed import collectives, launch_environment
from ds_gpt2.engine.rng_state import get_rng_state, set_rng_state
from ds_gpt2.engine.zero2_patches import read_norm_at_once, sum_gradients_in_fp32
from ds_gpt2.model.gpt2 import GPT2, parameter_groups
from ds_gpt2.run_dir import exit_report

log = logging.getLogger(__name__)

_NOTICE_SECONDS = 30.0  # without the other ranks, until that is said
_ALONE_SECONDS = 60.0  # until a rank gives up whose variables are probably left over from another job


@dataclass(frozen=True)
class Update:
    """What became of one optimizer update."""

    applied: bool  # False: a gradient was Inf or NaN and the update was skipped
    grad_norm: float  # global norm before clipping; inf if skipped
    clipped: bool  # the gradient was scaled down to optimizer.grad_clip


class Engine:
    """A GPT-2 under ZeRO: bf16 weights, fp32 masters and moments partitioned over the ranks."""

    def __init__(self, model: GPT2, deepspeed_config: dict[str, Any], weight_decay: float) -> None:
        """
        Args:
            deepspeed_config: complete, see ``deepspeed_config.complete``.
            weight_decay: on matrices and embeddings; biases and norms have none.

        Raises:
            UserError: DeepSpeed does not accept its configuration.
        """
        groups = parameter_groups(model, weight_decay)
        try:
            self.deepspeed, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=deepspeed_config)
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"DeepSpeed refuses its configuration: {' '.join(str(error).split())}") from None
        self.model = model
        sum_gradients_in_fp32(model, self.deepspeed.optimizer)
        read_norm_at_once(self.deepspeed.optimizer)
        # DeepSpeed would write the learning rate with x = samples and flush at every step; ours is the monitor module.
        self.deepspeed.monitor.enabled = False
        self._accumulation: int = deepspeed_config["gradient_accumulation_steps"]
        self._constants = self._read_constants()
        self._snapshot: threading.Event | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.deepspeed.device)

    def accumulate(
        self, micro_batches: Iterable[MicroBatch], interrupted: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Forward and backward over this rank's micro-batches of a step; no update yet.

        Args:
            interrupted: asked between micro-batches, on all ranks alike; True drops the step, random state included.

        Returns:
            This rank's mean loss, fp32 scalar on the device: reading it is left to the caller, so nothing waits here.
            None if interrupted; then there must be no ``apply``.
        """
        engine = self.deepspeed
        self._random_before = get_rng_state()
        engine.train()
        engine.set_gradient_accumulation_boundary(True)
        losses = None
        with engine.coalesce_grad_reduction():  # it reduces what gradients there are, also after an exception
            try:
                losses = self._backward(micro_batches, interrupted)
            finally:
                if losses is None:
                    self.model.zero_grad()
        return torch.stack(losses).mean() if losses is not None else None

    def _backward(
        self, micro_batches: Iterable[MicroBatch], interrupted: Callable[[], bool]
    ) -> list[torch.Tensor] | None:
        losses: list[torch.Tensor] = []
        for number, (tokens, targets) in enumerate(micro_batches, start=1):
            if number > 1 and interrupted():
                set_rng_state(self._random_before)
                return None
            loss = self.deepspeed(tokens, targets)
            self.deepspeed.backward(loss)
            losses.append(loss.detach())
        return losses

    def apply(self, lr: float, skip: bool = False) -> Update:
        """Clip, step and zero the gradients; skipped, and said so, if any gradient is not finite.

        Args:
            skip: make no update of these gradients, on any rank.
        """
        engine = self.deepspeed
        if skip:  # the way of DeepSpeed's that keeps all of its counters right
            for part in self.gradients().values():
                part[:1] = float("inf")
        if self._snapshot is not None:
            self._snapshot.wait()
            self._snapshot = None
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        engine.step()
        applied, norm, limit = engine.was_step_applied(), float(engine.get_global_grad_norm()), self._constants[1]
        return Update(applied, norm, clipped=applied and 0 < limit < norm)

    def drop(self) -> None:
        """Forget the gradients of this step, on all ranks; weights, optimizer and random state are as before it."""
        self.apply(0.0, skip=True)
        set_rng_state(self._random_before)

    def has_finite_weights(self) -> bool:
        """Whether all of this rank's weights are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def moment(self) -> torch.cuda.Event | None:
        """On a GPU, an event that happens when all work given to it so far is done; None on a CPU, where it is."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def masters(self) -> dict[str, torch.Tensor]:
        """This rank's part of each parameter's fp32 master, flat, by name; what it has no part of is left out."""
        mappings = ((name, parameter._hp_mapping) for name, parameter in self.model.named_parameters())  # type: ignore[attr-defined]  # DeepSpeed's
        return {name: mapping.get_hp_fragment() for name, mapping in mappings if mapping is not None}

    def gradients(self) -> dict[str, torch.Tensor]:
        """The same parts of the gradients, averaged over ranks and micro-batches, before clipping.

        There are some only between a step's last backward pass and its update.
        """
        parts = {}
        for name, parameter in self.model.named_parameters():
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if mapping is not None:
                part = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]  # DeepSpeed's
                address = mapping.lp_fragment_address
                parts[name] = part if len(part) == address.numel else part.narrow(0, address.start, address.numel)
        return parts

    @torch.no_grad()
    def begin_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Take ``weights`` (fp32, by parameter name) for masters, and rounded for bf16; rows they lack stay."""
        for name, parameter in self.model.named_parameters():
            value = parameter.float()
            value[: len(weights[name])] = weights[name]
            parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value)

    def fingerprint(self) -> str:
        """A hash of this rank's bf16 weights: ranks that hold the same weights have the same one.

        A sum of bit patterns a tensor, on the device: any one bit that differs shows.
        """
        sums = [parameter.detach().view(torch.int16).sum(dtype=torch.int64) for parameter in self.model.parameters()]
        return hashlib.sha256(repr(torch.stack(sums).tolist()).encode()).hexdigest()[:16]

    def hold_updates_until(self, snapshot: threading.Event) -> None:
        """The next update waits until somebody has copied the state."""
        self._snapshot = snapshot

    def reset_constants(self) -> None:
        """The settings' clipping and optimizer constants again, in place of those that a checkpoint brought."""
        groups, self.deepspeed.optimizer.clip_grad = self._constants
        for group, constants in zip(self.deepspeed.optimizer.param_groups, groups, strict=True):
            group.update(constants)

    def _read_constants(self) -> tuple[list[dict[str, Any]], float]:
        optimizer = self.deepspeed.optimizer
        changing = ("params", "lr")  # each step sets its learning rate
        groups = [
            {key: value for key, value in group.items() if key not in changing} for group in optimizer.param_groups
        ]
        return groups, optimizer.clip_grad

    def close(self) -> None:
        """Free the engine's buffers, as far as DeepSpeed still finds its modules: a project may have been moved."""
        with contextlib.suppress(ImportError):
            self.deepspeed.destroy()


def open_process_group(device: torch.device) -> None:
    """Join the ranks of this run: NCCL on GPUs, gloo on CPUs.

    Raises:
        UserError: the port for the rendezvous is taken, usually by another run, or other ranks do not come.
    """
    started_by = launch_environment.adopt()
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(host.free_port())
    if device.type == "cpu":
        # DeepSpeed's shared-memory all-reduce needs g++ and half a minute at first use, and was no faster
        # where ranks share cores (benchmarks/LOG.md).
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # asked for what else it can, it runs g++
        if collectives.local_world_size() == collectives.world_size() and os.path.exists("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no need for its name to resolve
    # torchrun's agent listens on the port itself, and the ranks are its clients.
    if collectives.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        host.check_port_free(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    # Raised in DeepSpeed's calls: one line per rank would be all that a newcomer reads.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with _waiting_for_ranks(started_by):
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    collectives.open_cpu_group()


@contextlib.contextmanager
def _waiting_for_ranks(started_by: launch_environment.Launcher) -> Iterator[None]:
    """Say so where other ranks do not come; on one machine, where nothing known has started them, give up soon.

    Raises:
        UserError: PyTorch has waited for its own limit.
    """
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    ranks = collectives.world_size()
    text = f"rank {collectives.rank()} has waited {{:.0f}} s for all {ranks} ranks to meet at {where}"
    if started_by == "environment":
        text += "; RANK and WORLD_SIZE come from the environment: unset them if they are left over from another job"
    alone = started_by == "environment" and os.environ["MASTER_ADDR"] in launch_environment.LOOPBACK

    def give_up() -> None:  # the main thread waits in C++ and cannot be interrupted
        print(f"error: {text.format(_ALONE_SECONDS)}", file=sys.stderr, flush=True)
        os._exit(exit_report.MISTAKE)

    timers = [threading.Timer(_NOTICE_SECONDS, lambda: log.warning(text.format(_NOTICE_SECONDS)))]
    timers += [threading.Timer(_ALONE_SECONDS, give_up)] if alone else []
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    except torch.distributed.DistError as error:
        raise UserError(f"the ranks cannot meet at {where}: {' '.join(str(error).split())[:300]}") from None
    finally:
        for timer in timers:
            timer.cancel()


def close_process_group() -> None:
    """Leave the ranks of this run; without it NCCL complains when the process ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
