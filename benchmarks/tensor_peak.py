"""Measure the peak memory of a rank's tensors, and compare it with the prediction of ``plan``.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 benchmarks/tensor_peak.py --data data/sample --out FILE
        --set model.preset=7M --set batch.micro_batch=4

On a CPU, PyTorch's profiler records every allocation; on a GPU, the caching allocator reports the peak.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser
from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.config.settings import parse_overrides
from ds_gpt2.distributed import collectives, device, torch_compile
from ds_gpt2.run_dir import exit_codes, process_end

_STEPS = 2  # the first one allocates what remains, the second one has all of it


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out", launched=True)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="a setting")
    options = parser.parse_args()
    torch_device = device.choose("auto")
    settings = settings_of(options.data, "7M", **parse_overrides(options.set))
    set_up_compiler(settings, torch_device)
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(torch_device)
    if collectives.world_size() == 1:
        _reduce_nothing()
    measured = max(collectives.gather_objects(_peak(settings, torch_device)))
    if collectives.is_main():
        options.out.write_text(
            json.dumps({"measured": measured, **_predicted(settings, torch_device)}), encoding="utf-8"
        )
    close_process_group()


def _reduce_nothing() -> None:
    """Disable all_reduce on a single rank, where gloo would keep its input alive for a moment."""
    import torch.distributed as torch_dist

    torch_dist.all_reduce = lambda *tensors, **named: None


def _peak(settings: Any, torch_device: Any) -> int:
    """Return the peak bytes of this rank's tensors, including the construction of the model."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.trainer import Trainer

    def train() -> None:
        trainer = Trainer(settings, torch_device)
        trainer.steps(_STEPS)
        model = trainer.engine.model
        with torch.no_grad():
            model.eval()(*next(trainer.data.micro_batches(1)))

    if torch_device.type == "cuda":
        train()
        return int(torch.cuda.max_memory_allocated())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    allocated = highest = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        allocated += event.nbytes()
        highest = max(highest, allocated)
    return highest


def _predicted(settings: Any, torch_device: Any) -> dict[str, Any]:
    from ds_gpt2.config.batch_plan import plan_batch
    from ds_gpt2.config.deepspeed_config import load_deepspeed_file
    from ds_gpt2.tools.resources.memory_model import describe_model, peak, read_zero

    batch = settings.batch
    plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, collectives.world_size())
    compiled = torch_compile.is_enabled(settings.run.compile, torch_device.type)
    model = describe_model(settings.model, batch.sequence_length, compiled)
    memory = peak(model, plan, read_zero(load_deepspeed_file(settings.deepspeed)), torch_device.type)
    return {"predicted": memory.total, "moment": memory.moment, "parameters": model.parameters}


if __name__ == "__main__":
    main()
    process_end.end_process(exit_codes.DONE)
