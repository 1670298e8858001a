"""Measure how long a save blocks training, and the size of a checkpoint.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 4 benchmarks/checkpoint_stall.py --data data/sample --out FILE
    deepspeed --num_gpus 1 benchmarks/checkpoint_stall.py --preset 124M --data data/sample --out FILE

Three kinds of blocks alternate: no save; a background save at the start of the block; the same state written by
``torch.save`` and fsync, as DeepSpeed's own engine does, but durably. "held" is the time until the training thread
continues. "excess" is the additional time of all steps of a block compared with blocks without a save.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result
from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.config.settings import CheckpointSettings
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_codes, process_end

if TYPE_CHECKING:
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.engine import Engine

KINDS = ("none", "background", "torch.save")


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out", launched=True)
    parser.add_argument("--preset", default="7M")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps per block; enough for a save to end within it")
    options = parser.parse_args()
    torch_device = device.choose("auto")
    settings = settings_of(options.data, options.preset, options.accumulation)
    set_up_compiler(settings, torch_device)
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(torch_device)
    logging.getLogger("ds_gpt2").setLevel(logging.ERROR)
    folder = collectives.broadcast_from_main(
        lambda: tempfile.mkdtemp(prefix="checkpoint-stall-", dir=options.out.parent)
    )
    trainer = Trainer(settings, torch_device)
    result = _measure(trainer, Path(folder), options.rounds, options.steps)
    if collectives.is_main():
        report_result(options.out, result)
    collectives.barrier()
    _remove(Path(folder))
    close_process_group()


def _measure(trainer: Trainer, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    from ds_gpt2.checkpoint.directory import CheckpointDirectory
    from ds_gpt2.checkpoint.filesystem import Disk
    from ds_gpt2.checkpoint.manager import Checkpoints

    engine, state = trainer.engine, trainer.state
    house = CheckpointDirectory(Disk(), folder, CheckpointSettings(keep_last=1))
    checkpoints = Checkpoints(house, engine, {}, {"run": {"seed": 1}})

    def save(kind: str) -> float:
        collectives.barrier()
        trainer.wait_for_device()
        start_time = time.perf_counter()
        if kind == "background":
            checkpoints.save(state, 0.0)
        elif kind == "torch.save":
            _save_by_torch(engine, folder)
        return time.perf_counter() - start_time

    trainer.steps(4)
    for kind in KINDS:  # warm up buffers, caches and the file system
        save(kind)
        trainer.steps(steps)
        checkpoints.finish(state, complete=False)
    held: dict[str, list[float]] = {kind: [] for kind in KINDS}
    blocks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    still_writing = []
    for _ in range(rounds):
        for kind in KINDS:
            held[kind].append(1000 * save(kind))
            blocks[kind].append(1000 * trainer.steps(steps))
            start_time = time.perf_counter()
            checkpoints.finish(state, complete=False)
            if kind == "background":
                still_writing.append(1000 * (time.perf_counter() - start_time))
    engine.close()
    size = sum(path.stat().st_size for path in next(folder.glob("rolling_step_*")).glob("*.pt"))
    parameters = engine.model.shape.parameters
    baseline = statistics.median(blocks["none"])
    return {
        "setting": f"{trainer.settings.model.preset}, {collectives.world_size()} ranks on {engine.device.type}",
        "steps_a_block": steps,
        "parameters": parameters,
        "bytes_per_parameter": round(size / parameters, 3),
        "held_ms": {kind: _spread(held[kind]) for kind in ("background", "torch.save")},
        "held_ratio": round(statistics.median(held["background"]) / statistics.median(held["torch.save"]), 4),
        "block_ms": {kind: _spread(blocks[kind]) for kind in KINDS},
        "excess_ms_of_a_background_save": round(statistics.median(blocks["background"]) - baseline, 1),
        "still_writing_ms": round(statistics.median(still_writing), 1),
        "waited_seconds": round(checkpoints.waited_seconds, 3),
    }


def _save_by_torch(engine: Engine, folder: Path) -> None:
    """Write the state by ``torch.save`` and fsync, on all ranks."""
    import torch

    contents = engine.save_checkpoint(folder, "stock", {})
    (folder / "stock").mkdir(exist_ok=True)
    for name, part in contents.items():
        with (folder / "stock" / name).open("wb") as file:
            torch.save(part, file)
            os.fsync(file.fileno())
    collectives.barrier()


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"p25": round(low, 2), "p50": round(middle, 2), "p75": round(high, 2)}


def _remove(folder: Path) -> None:
    import shutil

    if collectives.is_main():
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
    process_end.end_process(exit_codes.DONE)
