"""Measure the communication of a step in a real run, compare it with docs/scaling.md, and compute its tables.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 benchmarks/scaling.py --data data/sample --out FILE

The bytes of the tensors of all collective operations are counted. In a ring of N ranks, each rank sends 2 (N-1)/N of an
all-reduced tensor and (N-1)/N of a gathered one (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_codes, process_end

PRESETS = ("124M", "350M", "774M", "1558M")
RANKS = (1, 4, 8, 64)
TOKENS_PER_STEP = 524_288
GRADIENT, WEIGHT, STATE = 4, 2, 12  # bytes per parameter: fp32 sums, bf16 weights, fp32 master weights and two moments

# Name in torch.distributed -> index of the argument with the tensor of full size.
_SHARED = {
    "all_reduce": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "broadcast": 0,
    "reduce": 0,
    "all_gather": 0,
}


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out", launched=True)
    parser.add_argument("--preset", default="7M")
    parser.add_argument("--accumulation", type=int, default=2)
    options = parser.parse_args()
    torch_device = device.choose("auto")
    settings = settings_of(options.data, options.preset, options.accumulation)
    set_up_compiler(settings, torch_device)
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    counted = _count_collectives()
    open_process_group(torch_device)
    trainer = Trainer(settings, torch_device)
    trainer.step(1)
    counted.clear()
    trainer.step(2)
    ranks, parameters = collectives.world_size(), trainer.engine.model.shape.parameters
    sent = sum(size * _ring(name, ranks) for name, size in counted.items())
    predicted = zero_2(parameters, ranks)
    result = {
        "setting": f"{options.preset}, {ranks} ranks, {trainer.plan.accumulation} micro-batches a step",
        "tensors_bytes": dict(counted),
        "sent_bytes": round(sent),
        "predicted_bytes": round(predicted),
        "off": round(predicted / sent - 1, 5) if sent else None,
        "memory_gb": {preset: _memory(preset) for preset in PRESETS},
        "sent_gb_a_step": {preset: _sent(preset) for preset in PRESETS},
    }
    if collectives.is_main():
        report_result(options.out, result)
    close_process_group()


def _count_collectives() -> Counter[str]:
    """Count the bytes of each kind of collective operation from now on. Call it before DeepSpeed is imported."""
    import torch
    import torch.distributed as torch_dist

    counted: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted_call(*arguments: Any, **named: Any) -> Any:
            shared = arguments[_SHARED[name]] if arguments else next(iter(named.values()))
            for tensor in [shared] if isinstance(shared, torch.Tensor) else shared:
                counted[name] += tensor.numel() * tensor.element_size()
            return call(*arguments, **named)

        return counted_call

    for name in _SHARED:
        setattr(torch_dist, name, counting(name, getattr(torch_dist, name)))
    return counted


def _ring(name: str, ranks: int) -> float:
    """Return the share of a tensor's bytes that a rank sends."""
    return (2 if name == "all_reduce" else 1) * (ranks - 1) / ranks


def zero_2(parameters: int, ranks: int, gradient: int = GRADIENT) -> float:
    """Return the bytes that a rank sends per step: gradients all-reduced once, weights gathered in bf16.

    Args:
        gradient: bytes per parameter in which gradients are sent.
    """
    return parameters * (2 * gradient + WEIGHT) * (ranks - 1) / ranks


def step_seconds(computation: float, sent: float, link: float | None) -> float:
    """Return the time of a step whose communication does not overlap computation.

    Args:
        computation: seconds without the slowest link.
        sent: bytes over the slowest link, in each direction.
        link: its bytes per second in each direction; None: it takes no time.
    """
    return computation + (0.0 if link is None else sent / link)


def zero_3(parameters: int, ranks: int, accumulation: int) -> float:
    """Return the same for ZeRO-3: per micro-batch, weights gathered twice and gradients scattered once, in bf16."""
    return parameters * 3 * WEIGHT * accumulation * (ranks - 1) / ranks


def _sent(preset: str, micro_batch: int = 16) -> dict[str, dict[str, float]]:
    parameters = _describe(preset).parameters
    found = {}
    for ranks in RANKS:
        accumulation = TOKENS_PER_STEP // (min(micro_batch, TOKENS_PER_STEP // (1024 * ranks)) * 1024 * ranks)
        stages = {"ZeRO-1, 2": zero_2(parameters, ranks), "ZeRO-3": zero_3(parameters, ranks, accumulation)}
        found[f"{ranks}"] = {name: round(size / 1e9, 2) for name, size in stages.items()}
    return found


def _memory(preset: str) -> dict[str, dict[str, float]]:
    """Return the GB of the model states per stage, and the peak that ``plan`` predicts for 4 windows under ZeRO-2."""
    from ds_gpt2.config.batch_plan import BatchPlan
    from ds_gpt2.tools.resources.memory_model import Zero, peak

    model = _describe(preset)
    found = {}
    for ranks in RANKS:
        states = {
            "ZeRO-1, 2": WEIGHT + GRADIENT + STATE / ranks,
            "ZeRO-3": (WEIGHT + GRADIENT + STATE) / ranks,
        }
        plan = BatchPlan(4, 1024, max(1, TOKENS_PER_STEP // (4 * 1024 * ranks)), ranks)
        sizes = {name: each * model.parameters for name, each in states.items()}
        sizes["peak, 4 windows"] = peak(model, plan, Zero(100_000_000, 1, in_place=True), "cuda").total
        found[f"{ranks}"] = {name: round(size / 1e9, 2) for name, size in sizes.items()}
    return found


def _describe(preset: str) -> Any:
    from ds_gpt2.config.settings import ModelSettings
    from ds_gpt2.tools.resources.memory_model import describe_model

    return describe_model(ModelSettings(preset=preset), 1024, compiled=True)


if __name__ == "__main__":
    main()
    process_end.end_process(exit_codes.DONE)
