"""Check that NaN and Inf never reach the weights: inject them on random ranks, in micro-batches, gradients and losses.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 4 benchmarks/bad_gradients.py --data data/sample --count 1000 --out FILE

After each injection the weights, fp32 master weights and both moments of Adam must be bitwise unchanged on all ranks.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_codes, process_end

if TYPE_CHECKING:
    from ds_gpt2.data.loader import TrainingData
    from ds_gpt2.engine.engine import Engine

KINDS = ("nan in a gradient", "inf in a gradient", "nan in the loss", "inf in the loss", "skip asked for")


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out", launched=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch_device = device.choose("auto")
    from benchmarks.settings import settings_of
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(torch_device)
    shape = {"model.preset": "null", "model.layers": "2", "model.heads": "2", "model.width": "64"}
    batch = {"batch.sequence_length": "64", "batch.tokens_per_step": str(64 * 2 * 3 * collectives.world_size())}
    settings = settings_of(options.data, "7M", **shape, **batch)
    trainer = Trainer(settings, torch_device)
    trainer.steps(3)
    result = inject(trainer.engine, trainer.data, options.count, options.seed)
    if collectives.is_main():
        report_result(options.out, result)
    trainer.engine.close()
    close_process_group()


def inject(engine: Engine, data: TrainingData, count: int, seed: int) -> dict[str, Any]:
    """Inject ``count`` bad values at random positions, the same on all ranks; return the counts of their effects."""
    rng = random.Random(seed)
    weights = [name for name, _ in engine.model.named_parameters()]
    kinds: Counter[str] = Counter()
    reached, applied = 0, 0
    before = _state(engine)
    for number in range(count):
        kind, weight = rng.choice(KINDS), rng.choice(weights)
        faulty_rank, micro_batch = rng.randrange(collectives.world_size()), rng.randrange(data.plan.accumulation)
        kinds[kind] += 1
        handles = _poison(engine, kind, weight, micro_batch) if collectives.rank() == faulty_rank else []
        engine.accumulate(data.micro_batches(number + 1))
        update = engine.skip_update(1e-3) if kind == "skip asked for" else engine.apply(1e-3)
        for handle in handles:
            handle.remove()
        after = _state(engine)
        applied += update.applied
        reached += any(collectives.gather_objects(after != before))
        before = after
    engine.accumulate(data.micro_batches(count + 1))
    continues = engine.apply(1e-3).applied and any(collectives.gather_objects(_state(engine) != before))
    return {
        "injections": count,
        "of": dict(kinds),
        "ranks": collectives.world_size(),
        "micro_batches": data.plan.accumulation,
        "updates_made": applied,
        "states_changed": reached,
        "next_update_made": continues,
    }


def _poison(engine: Engine, kind: str, weight: str, micro_batch: int) -> list[Any]:
    """Register hooks that corrupt micro-batch ``micro_batch`` of this rank once; return their handles."""
    import torch

    value = float("nan") if kind.startswith("nan") else float("inf")
    calls = iter(range(1_000_000))
    if "gradient" in kind:

        def corrupt(gradient: torch.Tensor) -> torch.Tensor:
            corrupted = gradient.clone()
            if next(calls) == micro_batch:
                corrupted.view(-1)[-1] = value
            return corrupted

        return [dict(engine.model.named_parameters())[weight].register_hook(corrupt)]
    if "loss" in kind:

        def corrupt_loss(module: object, inputs: object, loss: torch.Tensor) -> torch.Tensor:
            return loss * value if next(calls) == micro_batch else loss

        return [engine.model.register_forward_hook(corrupt_loss)]
    return []


def _state(engine: Engine) -> str:
    """Return a hash of this rank's weights, master weights and moments."""
    optimizer = engine.deepspeed.optimizer
    tensors = [parameter.detach() for parameter in engine.model.parameters()]
    tensors += optimizer.single_partition_of_fp32_groups
    for state in optimizer.optimizer.state.values():
        tensors += [value for value in state.values() if hasattr(value, "numel") and value.numel() > 1]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
    process_end.end_process(exit_codes.DONE)
