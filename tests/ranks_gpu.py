"""Count how often a step waits for the GPU; write the result as JSON for tests/system/test_gpu.py."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.distributed import device
from ds_gpt2.run_dir import exit_codes, process_end


def waits(work: Callable[[], object]) -> list[str]:
    """Return the source lines at which ``work`` makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


def main(data: Path, out: Path) -> None:
    chosen = device.choose("cuda")
    settings = settings_of(data, "7M", 2)
    set_up_compiler(settings, chosen)
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(chosen)
    trainer = Trainer(settings, chosen)
    for step in (1, 2):
        trainer.step(step)
    accumulate = waits(lambda: trainer.engine.accumulate(trainer.data.micro_batches(3)))
    found = {"accumulate": accumulate, "apply": waits(lambda: trainer.engine.apply(1e-4))}
    out.write_text(json.dumps(found), encoding="utf-8")
    close_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[-2]), Path(sys.argv[-1]))
    process_end.end_process(exit_codes.DONE)
