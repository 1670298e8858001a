"""Run by DeepSpeed's launcher: train with a moving average of the weights; write the results for test_ema.py."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"

from deepspeed.utils import safe_get_full_fp32_param
from disks import PausableDisk

from ds_gpt2.checkpoint import resume
from ds_gpt2.checkpoint.catalog import scan
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.manager import Checkpoints
from ds_gpt2.common.errors import UserError
from ds_gpt2.config import deepspeed_config
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import CheckpointSettings, ValidationSettings, load_settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import HeldOut, open_sources
from ds_gpt2.distributed import collectives, device
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.process_group import close_process_group, open_process_group
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.run_dir import exit_codes, process_end
from ds_gpt2.training.hooks import AveragedValidation, HookFailedError, Interrupted, Validation

LR, DECAY, SEQUENCE = 1e-2, 0.9, 16


class Bench:
    """Engines of one model on the same data."""

    def __init__(self, config: Path) -> None:
        self.settings = settings = load_settings(config)
        self.plan = plan_batch(16 * SEQUENCE, 2, SEQUENCE, collectives.world_size())
        dataset = open_sources(settings.data)
        windows = dataset.windows("train", SEQUENCE)
        self.data = TrainingData(windows, self.plan, collectives.rank(), settings.run.seed, torch.device("cpu"))
        held_out = [HeldOut(dataset.windows("val", SEQUENCE))]
        self.validation = Validation(ValidationSettings(tokens=7 * SEQUENCE), held_out, group=2)
        self.averaged = AveragedValidation(self.validation)

    def engine(self, decay: float | None = DECAY) -> Engine:
        torch.manual_seed(5)
        content = deepspeed_config.load_deepspeed_file(self.settings.deepspeed)
        model = GPT2(ModelShape(2, 2, 32, SEQUENCE))
        complete = deepspeed_config.complete(content, self.settings, self.plan, model.shape.parameters)
        return Engine(model, complete, 0.1, decay)

    def step(self, engine: Engine, step: int, accept: Callable[[float], bool] = lambda norm: True) -> list[float]:
        """Train a step; return what would differ if the training did: the loss of the rank and the gradient norm."""
        loss = engine.accumulate(self.data.micro_batches(step))
        assert loss is not None
        return [float(loss), engine.apply(LR, accept).grad_norm]


def everywhere(value: bool) -> bool:
    return all(collectives.gather_objects(value))


def parts_of(engine: Engine) -> list[torch.Tensor]:
    """Return a copy of this rank's part of the average."""
    assert engine.average is not None
    return [part.clone() for part in engine.average.parts]


def whole(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the parts of all ranks, in one vector."""
    gathered = collectives.gather_objects(parts)
    return torch.cat([part for group in range(len(parts)) for part in (rank[group] for rank in gathered)])


def bits(tensors: list[torch.Tensor]) -> list[int]:
    """Return the exact sum of each tensor's bit patterns."""
    return [int(each.detach().float().reshape(-1).view(torch.int32).long().sum()) for each in tensors]


def weights(engine: Engine) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def average_of_steps(bench: Bench, engine: Engine, plain: Engine) -> dict[str, Any]:
    """Train 25 steps, compare with a reference in fp64 and with an engine without an average, evaluating in between."""
    masters = whole(engine._master_parts()).double()
    expected, initial = masters.clone(), bool(torch.equal(whole(parts_of(engine)).double(), masters))
    errors, losses, losses_plain, restored, skipped = [], [], [], [], []
    for step in range(1, 26):
        if step == 10:  # an update that is skipped
            before = parts_of(engine)
            for one in (engine, plain):
                bench.step(one, step, lambda norm: False)
            skipped.append(same(before, parts_of(engine)))
            continue
        losses.append(bench.step(engine, step))
        losses_plain.append(bench.step(plain, step))
        expected = DECAY * expected + (1 - DECAY) * whole(engine._master_parts()).double()
        errors.append(float((whole(parts_of(engine)).double() - expected).abs().max()))
        if step % 5 == 0:
            before = weights(engine)
            loss = bench.averaged.observe(engine, TrainState(step=step))["val/loss_ema"]
            restored.append(same(before, weights(engine)) and loss != bench.validation.loss(engine))
    size = float((expected - whole(engine._master_parts()).double()).abs().max())
    elements = sum(part.numel() for part in parts_of(engine))
    return {
        "initial": initial,
        "error": max(errors),
        "distance": size,
        "losses_equal": losses == losses_plain,
        "weights_equal": everywhere(same(weights(engine), weights(plain))),
        "restored": everywhere(all(restored)),
        "skipped": everywhere(all(skipped)),
        "elements": sum(collectives.gather_objects(elements)),
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "equal_parts": len(set(collectives.gather_objects(elements))) == 1,
    }


def evaluated(bench: Bench, engine: Engine) -> dict[str, Any]:
    """Compare the loss of the average with that of a model that has the rounded average; interrupt evaluations."""
    assert engine.average is not None
    before = weights(engine)
    loss = bench.averaged.observe(engine, TrainState(step=1))["val/loss_ema"]
    other = bench.engine(None)
    engine.use_averaged_weights()
    rounded = weights(engine)
    engine.use_trained_weights()
    with torch.no_grad():
        for parameter, value in zip(other.model.parameters(), rounded, strict=True):
            parameter.copy_(value)
    flat = torch.cat([weight.float().reshape(-1) for weight in rounded]).sort().values
    nonzero = whole(engine.average.parts).bfloat16().float().sort().values
    found = {
        "loss": loss == bench.validation.loss(other),
        "rounded": torch.equal(flat[flat != 0], nonzero[nonzero != 0]),
        "differs": not same(rounded, before),
    }
    for kind, expected in ((Interrupted, Interrupted), (UserError, HookFailedError), (RuntimeError, HookFailedError)):

        def fail(kind: type[Exception] = kind) -> None:
            if collectives.rank() == 0 and same(rounded, weights(engine)):
                raise kind("while the averaged weights are in use")

        bench.validation.progress = fail
        try:
            bench.averaged.observe(engine, TrainState(step=1))
        except expected:
            found[kind.__name__] = everywhere(same(before, weights(engine)))
    bench.validation.progress = lambda: None
    return found


def checkpoints_of(bench: Bench, engine: Engine, disk: PausableDisk, folder: Path) -> Checkpoints:
    house = CheckpointDirectory(disk, folder, CheckpointSettings(min_free_gb=0))
    collectives.call_on_all_ranks(lambda: house.start() if collectives.is_main() else None)
    settings = bench.settings.model_dump(mode="json")
    settings["ema"] = {"decay": None if engine.average is None else engine.average.decay}
    return Checkpoints(house, engine, {}, settings)


def saved(bench: Bench, engine: Engine, folder: Path) -> dict[str, Any]:
    """Save in the background, and evaluate the average before the copy is made; load into other engines."""
    if collectives.is_main():
        folder.mkdir()
    collectives.barrier()
    checkpoints = checkpoints_of(bench, engine, PausableDisk(), folder)
    state, before = TrainState(step=25), [*parts_of(engine), *weights(engine)]
    copy = checkpoints._memory.copy  # type: ignore[union-attr]  # saves are in the background
    waited = []

    def slow_copy(*arguments: Any) -> Any:
        time.sleep(0.5)
        waited.append(same([*parts_of(engine), *weights(engine)], before))
        return copy(*arguments)

    checkpoints._memory.copy = slow_copy  # type: ignore[union-attr,method-assign]  # replaced for the test
    checkpoints.save(state, 0.1)
    engine.use_averaged_weights()
    time.sleep(1.0)  # an evaluation that takes longer than the copy
    engine.use_trained_weights()
    bench.step(engine, 26)
    finished = checkpoints.finish(state, complete=False)
    restored = resume.choose_checkpoint(folder, "latest", {})
    other = bench.engine(0.5)
    checkpoints_of(bench, other, PausableDisk(), folder).load(restored)
    plain = bench.engine(None)
    checkpoints_of(bench, plain, PausableDisk(), folder).load(restored)
    assert other.average is not None
    (newest,) = scan(folder)
    assert newest.manifest is not None
    return {
        "finished": finished,
        "waited": everywhere(waited == [True]),
        "restored": everywhere(same([*parts_of(other), *weights(other)], before)),
        "decay": other.average.decay,
        "plain": everywhere(same(weights(plain), before[len(parts_of(other)) :])),
        "bytes": newest.manifest.bytes,
        "next": bench.step(other, 26) == bench.step(plain, 26),
    }


def initialized(bench: Bench) -> bool:
    """Return whether the average starts from the weights of another model."""
    engine = bench.engine()
    torch.manual_seed(9)
    engine.set_weights({name: torch.randn(parameter.shape) for name, parameter in engine.model.named_parameters()})
    full = safe_get_full_fp32_param(engine.model.wpe.weight)
    return everywhere(same(parts_of(engine), engine._master_parts()) and float(full.std()) > 0.5)


def main(config: Path, out: Path) -> None:
    open_process_group(device.choose("cpu"))
    bench = Bench(config)
    engine, plain = bench.engine(), bench.engine(None)
    found = {
        "steps": average_of_steps(bench, engine, plain),
        "evaluated": evaluated(bench, engine),
        "saved": saved(bench, engine, out.parent / "run"),
        "initialized": initialized(bench),
    }
    if collectives.is_main():
        out.write_text(json.dumps(found))
    collectives.barrier()
    close_process_group()


main(Path(sys.argv[-2]), Path(sys.argv[-1]))
process_end.end_process(exit_codes.DONE)
