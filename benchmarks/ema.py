"""Measure what the moving average of the weights (``ema.decay``) costs: in a step, in a validation, in a save.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 benchmarks/ema.py --data data/sample --out FILE
    deepspeed --num_gpus 1 benchmarks/ema.py --preset 124M --accumulation 4 --data data/sample --out FILE

One engine trains with and without its average in turn; each round has both arms, and every other round begins with the
second. "added" is the difference between the arms of a round. The cost in a step may be below the noise between blocks,
so the update of the average alone is timed, too, as are the two changes of the weights of an evaluation. A save is
timed until training may continue ("held", in the background), and until it is committed ("written").
"""

from __future__ import annotations

import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
    from ds_gpt2.engine.ema import WeightAverage

_DECAY = 0.999
_WARM_UP_STEPS = 4


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out", launched=True)
    parser.add_argument("--preset", default="7M")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="steps per block")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of a validation")
    options = parser.parse_args()
    torch_device = device.choose("auto")
    overrides = {"ema.decay": str(_DECAY), "validation.tokens": str(options.tokens)}
    settings = settings_of(options.data, options.preset, options.accumulation, **overrides)
    set_up_compiler(settings, torch_device)
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(torch_device)
    logging.getLogger("ds_gpt2").setLevel(logging.ERROR)
    folder = Path(collectives.broadcast_from_main(lambda: tempfile.mkdtemp(prefix="ema-", dir=options.out.parent)))
    trainer = Trainer(settings, torch_device)
    result = _Arms(trainer, options.rounds).measure(folder, options.steps)
    if collectives.is_main():
        setting = f"{options.preset}, {collectives.world_size()} ranks on {torch_device.type}, {trainer.plan}"
        report_result(options.out, {"setting": setting, "steps_a_block": options.steps, **result})
    collectives.barrier()
    if collectives.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    close_process_group()


class _Arms:
    """Measures in turn with and without the average."""

    def __init__(self, trainer: Trainer, rounds: int) -> None:
        average = trainer.engine.average
        assert average is not None
        self._trainer, self._engine, self._rounds = trainer, trainer.engine, rounds
        self._average: WeightAverage = average

    def measure(self, folder: Path, steps: int) -> dict[str, Any]:
        trainer = self._trainer
        trainer.steps(_WARM_UP_STEPS)
        validation = self._validation()
        found: dict[str, Any] = {
            "step_ms": self._paired(lambda: trainer.steps(steps) / steps),
            "update_of_the_average_ms": _summary([self._update() for _ in range(self._rounds)]),
            "validation_ms": self._paired(lambda: self._timed(lambda: self._validate(validation))),
            "two_changes_of_weights_ms": _summary([self._timed(self._change_weights) for _ in range(self._rounds)]),
        }
        return {**found, "save": self._saves(folder)}

    def _paired(self, run: Callable[[], float]) -> dict[str, Any]:
        """Return medians and quartiles of the seconds that ``run`` returns, in ms, after one call of each arm."""
        arms = {"without": None, "with": self._average}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(self._rounds + 1):
            for name in sorted(arms, reverse=number % 2 == 0):
                self._engine.average = arms[name]
                seconds[name].append(run())
        self._engine.average = self._average
        measured = {name: values[1:] for name, values in seconds.items()}
        added = [one - other for one, other in zip(measured["with"], measured["without"], strict=True)]
        share = statistics.median(added) / statistics.median(measured["without"])
        summaries = {name: _summary(values) for name, values in measured.items()}
        return {**summaries, "added": _summary(added), "added_share": round(share, 5)}

    def _timed(self, action: Callable[[], object]) -> float:
        """Return the seconds until ``action`` is complete on all ranks."""
        collectives.barrier()
        self._trainer.wait_for_device()
        start_time = time.perf_counter()
        action()
        self._trainer.wait_for_device()
        collectives.barrier()
        return time.perf_counter() - start_time

    def _update(self) -> float:
        masters = self._engine.deepspeed.optimizer.single_partition_of_fp32_groups
        return self._timed(lambda: self._average.update(masters))

    def _change_weights(self) -> None:
        self._engine.use_averaged_weights()
        self._engine.use_trained_weights()

    def _validate(self, validation: Any) -> None:
        from ds_gpt2.training.hooks import AveragedValidation

        validation.observe(self._engine, self._trainer.state)
        if self._engine.average is not None:
            AveragedValidation(validation).observe(self._engine, self._trainer.state)

    def _validation(self) -> Any:
        from ds_gpt2.data.sources import HeldOut, open_sources
        from ds_gpt2.training.hooks import Validation

        settings = self._trainer.settings
        windows = open_sources(settings.data).windows("val", settings.batch.sequence_length)
        return Validation(settings.validation, [HeldOut(windows)], settings.batch.micro_batch)

    def _saves(self, folder: Path) -> dict[str, Any]:
        from ds_gpt2.checkpoint.catalog import scan
        from ds_gpt2.checkpoint.directory import CheckpointDirectory
        from ds_gpt2.checkpoint.filesystem import Disk
        from ds_gpt2.checkpoint.manager import Checkpoints

        trainer = self._trainer
        house = CheckpointDirectory(Disk(), folder, CheckpointSettings(keep_last=1))
        checkpoints = Checkpoints(house, self._engine, {}, {"run": {"seed": 1}, "ema": {"decay": _DECAY}})
        held: list[float] = []
        sizes: dict[bool, int] = {}

        def save() -> float:
            trainer.steps(1)
            start_time = time.perf_counter()
            held.append(self._timed(lambda: checkpoints.save(trainer.state, 0.0)))
            assert checkpoints.finish(trainer.state, complete=False)
            took = time.perf_counter() - start_time
            manifest = scan(folder)[0].manifest
            assert manifest is not None
            sizes[self._engine.average is not None] = manifest.bytes
            return took

        written = self._paired(save)
        order = [
            name for number in range(self._rounds + 1) for name in sorted(("with", "without"), reverse=number % 2 == 0)
        ]
        by_arm = {arm: [took for took, name in zip(held, order, strict=True) if name == arm][1:] for arm in set(order)}
        parameters = self._engine.model.shape.parameters
        return {
            "held_ms": {arm: _summary(by_arm[arm]) for arm in sorted(by_arm)},
            "written_ms": written,
            "bytes_per_parameter": {
                "without": round(sizes[False] / parameters, 3),
                "with": round(sizes[True] / parameters, 3),
            },
        }


def _summary(seconds: list[float]) -> dict[str, float]:
    """Return the quartiles in ms, and the number of values."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    quartiles = {"p25": low, "p50": middle, "p75": high}
    return {name: round(1000 * value, 3) for name, value in quartiles.items()} | {"values": len(seconds)}


if __name__ == "__main__":
    main()
    process_end.end_process(exit_codes.DONE)
