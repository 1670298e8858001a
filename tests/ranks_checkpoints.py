"""Run by DeepSpeed's launcher on two ranks: save and load, and write the results as JSON for test_manager.py."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"

from disks import PausableDisk

from ds_gpt2.checkpoint import commit, resume
from ds_gpt2.checkpoint.catalog import problem_of, scan
from ds_gpt2.checkpoint.directory import CheckpointDirectory
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manager import Checkpoints
from ds_gpt2.config import deepspeed_config
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import CheckpointSettings, Settings, load_settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import open_sources
from ds_gpt2.distributed import collectives, device
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.process_group import close_process_group, open_process_group
from ds_gpt2.engine.rng_state import get_rng_state, seed_everything
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.run_dir import exit_codes, process_end

IDENTITY = {"model.width": 32}


class Bench:
    """An engine, its data and a directory for its checkpoints."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.plan = plan_batch(16 * 64, 2, 64, collectives.world_size())
        windows = open_sources(settings.data).windows("train", 64)
        self.data = TrainingData(windows, self.plan, collectives.rank(), settings.run.seed, torch.device("cpu"))
        self.engine = self.fresh_engine(settings)
        self.state = TrainState()
        self.disk = PausableDisk()

    def fresh_engine(self, settings: Settings) -> Engine:
        torch.manual_seed(5)
        content = deepspeed_config.load_deepspeed_file(settings.deepspeed)
        model = GPT2(ModelShape(2, 2, 32, 64), 0.1)
        complete = deepspeed_config.complete(content, settings, self.plan, model.shape.parameters)
        engine = Engine(model, complete, settings.optimizer.weight_decay)
        seed_everything(7 + collectives.rank())
        return engine

    def checkpoints(self, engine: Engine | None = None, **settings: Any) -> Checkpoints:
        chosen = CheckpointSettings.model_validate({"min_free_gb": 0, **settings})
        run = self.settings.model_dump(mode="json")
        house = CheckpointDirectory(self.disk, self.folder, chosen)
        collectives.call_on_all_ranks(lambda: house.start() if collectives.is_main() else None)
        return Checkpoints(house, engine or self.engine, IDENTITY, run)

    def steps(self, count: int) -> None:
        for _ in range(count):
            step = self.state.step + 1
            assert self.engine.accumulate(self.data.micro_batches(step)) is not None
            self.engine.apply(1e-3)
            self.state.advance(1024, True, b"")

    def fingerprint(self, engine: Engine | None = None) -> list[float]:
        """Return exact sums of all values that a checkpoint must restore on this rank."""
        optimizer = (engine or self.engine).deepspeed.optimizer
        tensors = [*(engine or self.engine).model.parameters(), *optimizer.single_partition_of_fp32_groups]
        for state in optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        bits = [int(tensor.detach().float().reshape(-1).view(torch.int32).long().sum()) for tensor in tensors]
        return [*bits, int(get_rng_state()["torch"].long().sum())]


def main(config: Path, out: Path) -> None:
    open_process_group(device.choose("cpu"))
    collectives.gather_objects(None)
    log = logging.getLogger("ds_gpt2")
    messages: list[str] = []
    log.addHandler(_Listener(messages))
    log.setLevel(logging.INFO)
    settings = load_settings(config)
    found: dict[str, Any] = {}

    bench = Bench(settings, out.parent / "run")
    if collectives.is_main():
        bench.folder.mkdir()
    collectives.barrier()
    found["async"] = _save_while_training(bench)
    found["unrecorded"] = _evaluation_cannot_be_written(bench)
    found["settings"] = _load_with_other_settings(bench)
    found["sizes"] = _sizes(bench)
    found["one_rank_full"] = _one_rank_cannot_write(bench, messages)
    found["waited"] = _slow_disk(bench, messages)
    found["inline"] = _inline(bench)
    found["no_room"] = _no_room(bench, messages)
    found["at_length"] = collectives.gather_objects(
        collectives.broadcast_slow_from_main(lambda: time.sleep(2.5) or collectives.rank() + 7)
    )
    if collectives.is_main():
        out.write_text(json.dumps(found))
    collectives.barrier()
    close_process_group()


class _Listener(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def _everywhere(value: bool) -> bool:
    return all(collectives.gather_objects(value))


def _save_while_training(bench: Bench) -> dict[str, Any]:
    """Save in the background while training continues, then load into another engine: the states are equal.

    The evaluation is added to the checkpoint, which is not written yet.
    """
    checkpoints = bench.checkpoints(write_mb_per_s=20)
    bench.steps(2)
    before = bench.fingerprint()
    bench.disk.ready.clear()
    bench.state.unevaluated = {"train/loss": 2.0}
    checkpoints.save(bench.state, 0.1)
    bench.state.record_validation(3.0)
    bench.state.unevaluated = None
    added = checkpoints.add_evaluation(bench.state, ["best_model"])
    bench.steps(2)
    under_way = not scan(bench.folder)
    bench.disk.ready.set()
    changed = bench.fingerprint() != before
    finished = checkpoints.finish(TrainState(step=2), complete=False)
    seed_everything(99)
    engine = bench.fresh_engine(bench.settings)
    restored = resume.choose_checkpoint(bench.folder, "latest", IDENTITY)
    state = bench.checkpoints(engine).load(restored)
    return {
        "under_way": _everywhere(under_way),
        "changed": _everywhere(changed),
        "finished": _everywhere(finished),
        "same": _everywhere(bench.fingerprint(engine) == before),
        "step": state.step,
        "evaluation": [added, state.val_loss, state.is_evaluated],
        "tags": [generation.tag for generation in scan(bench.folder)],
    }


def _evaluation_cannot_be_written(bench: Bench) -> dict[str, Any]:
    """The disk is full when the evaluation is added to the manifest; later it is added. In a directory of its own."""
    other = Bench(bench.settings, bench.folder.with_name("unrecorded"))
    collectives.call_on_all_ranks(lambda: other.folder.mkdir() if collectives.is_main() else None)
    checkpoints = other.checkpoints()
    other.steps(1)
    other.state.unevaluated = {}
    checkpoints.save(other.state, 0.1)
    committed = checkpoints.has_saved(other.state)
    path = other.folder / "rolling_step_000001"
    alone = other.folder.with_name("alone")
    collectives.call_on_all_ranks(lambda: collectives.is_main() and _link(path, alone, "epoch_00002"))
    other.state.unevaluated = None
    other.disk.full = True
    checkpoints.add_evaluation(other.state, ["epoch_00001"])
    recorded = checkpoints.has_saved(other.state)
    other.disk.full = False
    again = checkpoints.add_evaluation(other.state, ["epoch_00001"]) and checkpoints.has_saved(other.state)
    manifests = [generation.manifest for generation in scan(other.folder)]
    return {
        "committed": _everywhere(committed),
        "recorded": not _everywhere(not recorded),
        "again": _everywhere(again),
        "tags": [generation.tag for generation in scan(other.folder)],
        "evaluated": [manifest is not None and manifest.is_evaluated for manifest in manifests],
        "another": checkpoints.add_evaluation(other.state),
        "alone": _is_saved_after_load(other, alone),
    }


def _link(path: Path, directory: Path, tag: str) -> None:
    directory.mkdir()
    commit.link(Disk(), path, directory, tag)


def _is_saved_after_load(bench: Bench, folder: Path) -> bool:
    """Load an epoch checkpoint without its evaluation; return whether its state counts as saved."""
    bench.folder = folder
    checkpoints = bench.checkpoints()
    state = checkpoints.load(resume.choose_checkpoint(folder, "epoch_00002", IDENTITY))
    return _everywhere(checkpoints.has_saved(state))


def _load_with_other_settings(bench: Bench) -> dict[str, Any]:
    """The settings of this run apply, not those of the checkpoint."""
    optimizer = bench.settings.optimizer.model_copy(
        update={"weight_decay": 0.25, "grad_clip": 0.5, "betas": (0.8, 0.9)}
    )
    engine = bench.fresh_engine(bench.settings.model_copy(update={"optimizer": optimizer}))
    bench.checkpoints(engine).load(resume.choose_checkpoint(bench.folder, "best", IDENTITY))
    groups = engine.deepspeed.optimizer.param_groups
    return {
        "weight_decay": [group["weight_decay"] for group in groups],
        "betas": list(groups[0]["betas"]),
        "clip": engine.deepspeed.optimizer.clip_grad,
        "moments": float(engine.deepspeed.optimizer.optimizer.state[groups[0]["params"][0]]["exp_avg"].abs().sum()) > 0,
    }


def _sizes(bench: Bench) -> dict[str, int]:
    (newest, *_) = scan(bench.folder)
    assert newest.manifest is not None
    parameters = sum(parameter.numel() for parameter in bench.engine.model.parameters())
    return {"bytes": newest.manifest.bytes, "parameters": parameters}


def _one_rank_cannot_write(bench: Bench, messages: list[str]) -> dict[str, Any]:
    """The disk of the last rank is full, even for its failure record: training continues, the next save succeeds."""
    checkpoints = bench.checkpoints()
    bench.disk.full = collectives.rank() == collectives.world_size() - 1
    checkpoints.save(bench.state, 0.1)
    bench.steps(1)
    saved = checkpoints.finish(TrainState(step=bench.state.step - 1), complete=False)
    bench.disk.full = False
    after_failure = sorted(path.name for path in bench.folder.iterdir())
    logged = [message for message in messages if "was not saved" in message]
    checkpoints.save(bench.state, 0.1)
    return {
        "saved": saved,
        "left": after_failure,
        "logged": logged,
        "next": _everywhere(checkpoints.finish(bench.state, complete=False)),
        "good": problem_of(scan(bench.folder)[0]),
    }


def _slow_disk(bench: Bench, messages: list[str]) -> dict[str, Any]:
    checkpoints = bench.checkpoints()
    bench.disk.ready.clear()
    bench.steps(1)
    checkpoints.save(bench.state, 0.1)
    bench.steps(1)
    threading.Timer(2.0, bench.disk.ready.set).start()
    checkpoints.save(bench.state, 0.1)
    checkpoints.finish(bench.state, complete=False)
    logged = [message for message in messages if "slower than checkpoint.every" in message]
    return {"seconds": checkpoints.waited_seconds, "logged": logged}


def _inline(bench: Bench) -> dict[str, Any]:
    checkpoints = bench.checkpoints(**{"async": False})  # type: ignore[arg-type]  # async is a keyword
    bench.steps(1)
    checkpoints.save(bench.state, 0.1)
    collectives.barrier()
    there = scan(bench.folder)[0].step == bench.state.step
    return {"there": _everywhere(there), "good": problem_of(scan(bench.folder)[0])}


def _no_room(bench: Bench, messages: list[str]) -> dict[str, Any]:
    """No deletion frees space: all deletable checkpoints are deleted, the save is skipped, training continues."""
    bench.disk.free = 0
    checkpoints = bench.checkpoints()
    restored = resume.choose_checkpoint(bench.folder, "latest", IDENTITY)
    checkpoints.load(restored)
    bench.steps(1)
    begun = time.monotonic()
    checkpoints.save(bench.state, 0.1)
    finished = checkpoints.finish(bench.state, complete=False)
    collectives.barrier()
    return {
        "finished": finished,
        "quick": time.monotonic() - begun < 30,
        "logged": [message for message in messages if "no checkpoint was saved" in message],
        "left": [generation.tag for generation in scan(bench.folder)],
        "restored": restored.generation.tag,
    }


main(Path(sys.argv[-2]), Path(sys.argv[-1]))
process_end.end_process(exit_codes.DONE)
