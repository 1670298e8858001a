"""What does watching a run cost?

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 benchmarks/monitor_overhead.py --data DIR --out FILE
    deepspeed --num_gpus 1 benchmarks/monitor_overhead.py --preset 124M --accumulation 4 --one_of 4 --data DIR ...

The training loop runs in blocks that take turns: nothing is recorded; every scalar of every step goes to
metrics.jsonl and TensorBoard, and the machine is looked at. The difference is far below what blocks differ by anyway,
so the calls themselves are timed too, by the clock and by the processor: the rest is waiting for a core. What
validation, samples, histograms and HellaSwag cost is timed at single occasions, and divided by the steps between two
of them in ds_configs/gpt2_124m.yaml. With ``--one_of 4`` a rank stands for four: what ranks share among them then
counts a quarter.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.config.settings import PROJECT_DIR, load_settings
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_report

if TYPE_CHECKING:
    from benchmarks.trainer import Trainer
    from ds_gpt2.training.hooks import Hook

T = TypeVar("T")


class Silent:
    """In the place of everything around the training itself; each part does nothing, as cheaply as can be."""

    requested = False

    def begin(self) -> None: ...
    def mark(self, phase: str) -> None: ...
    def flush(self, durable: bool = False) -> None: ...
    def write(self, step: int, seen: object) -> None: ...
    def show(self, step: int, seen: object, eta: float) -> None: ...
    def save(self, state: object, epoch: float, roles: object = ()) -> None: ...

    def waiting_for(self, items: Iterable[T]) -> Iterable[T]:
        return items

    def end(self, step: int) -> dict[str, float]:
        return {}

    def eta(self, step: int, steps: int) -> float:
        return 0.0

    def has_saved(self, state: object) -> bool:
        return True

    def finish(self, state: object, complete: bool) -> bool:
        return True


class Timed:
    """Hands on every call, and adds up what the calls take."""

    can_be_repeated = True  # of a hook

    def __init__(self, target: Any, *names: str) -> None:
        self.seconds = self.busy = 0.0  # busy: of the processor, what this thread did itself
        for name in names:
            setattr(self, name, self._timed(getattr(target, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun, busy = time.perf_counter(), time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - begun
                self.busy += time.thread_time() - busy

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="7M")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--occasions", type=int, default=5)
    parser.add_argument("--one_of", type=int, default=1, metavar="RANKS", help="what each rank here stands for")
    parser.add_argument("--hellaswag", type=Path, help="its file; left out without one")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = device.choose("auto")
    set_up_compiler(settings_of(options.data, options.preset), place)
    from benchmarks import machine
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(place)
    logging.getLogger("ds_gpt2").setLevel(logging.ERROR)
    folder = Path(collectives.broadcast_from_main(lambda: tempfile.mkdtemp(prefix="monitor-overhead-")))
    places = {"run.dir": str(folder / "runs"), "monitor.tensorboard": "true"}
    if options.hellaswag:
        places["hellaswag.path"] = str(options.hellaswag.absolute())
    trainer = Trainer(settings_of(options.data, options.preset, options.accumulation, **places), place)
    trainer.steps(4)
    result = _scalars(trainer, options.rounds, options.steps)
    result["occasions"] = {
        name: _occasions(trainer, hook, every, options.occasions, result["step_ms"] * (options.one_of if shared else 1))
        for name, every, hook, shared in _hooks(trainer, bool(options.hellaswag))
    }
    if collectives.is_main():
        setting = f"{options.preset}, {collectives.world_size()} ranks on {place.type}, {trainer.plan}"
        shown = {"machine": machine.describe(), "command": " ".join(sys.argv), "setting": setting, **result}
        options.out.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(shown, indent=1))
    collectives.barrier()
    if collectives.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    close_process_group()


def _scalars(trainer: Trainer, rounds: int, steps: int) -> dict[str, Any]:
    from ds_gpt2.model.gpt2 import flops_per_token
    from ds_gpt2.monitoring.monitor import Monitor
    from ds_gpt2.monitoring.pace import Cadence, Pace
    from ds_gpt2.monitoring.step_reporter import StepReporter
    from ds_gpt2.monitoring.step_timer import EarlierTime, StepTimer
    from ds_gpt2.run_dir.heartbeat import Heartbeat
    from ds_gpt2.training.evaluator import Evaluator
    from ds_gpt2.training.guards import Guard
    from ds_gpt2.training.hooks import Health
    from ds_gpt2.training.lr_schedule import Every
    from ds_gpt2.training.trainer import Trainer as TrainingLoop
    from ds_gpt2.training.trainer import TrainingSchedule

    engine, settings, nothing = trainer.engine, trainer.settings, Silent()
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    monitor = Monitor(engine.monitors, settings.run_dir / "metrics.jsonl", 0)
    earlier = EarlierTime(0.0, time.time(), Pace(Cadence({}, 0), []))
    meter = StepTimer(trainer.plan.tokens_per_step, flops_per_token(engine.model), 1e15, earlier, engine.record_event)
    guard, heartbeat = Guard(settings.guards, print), Heartbeat(settings.run_dir, collectives.rank())
    watching = (
        Timed(meter, "begin", "mark", "end", "eta", "waiting_for"),
        Timed(monitor, "write", "flush"),
        Timed(Health(engine.device), "observe", "before_update"),
    )
    timed_meter, timed_monitor, health = watching
    health.every = Every(1)  # type: ignore[attr-defined]  # it stands in for the hook

    def block(hooks: list[Any], monitor: Any, meter: Any) -> float:
        collectives.barrier()
        trainer.wait_for_device()
        begun = time.perf_counter()
        schedule = TrainingSchedule(trainer.state.step + steps, lambda _: 1e-4, Every(0))
        silent: Any = nothing
        reporter = StepReporter(heartbeat, meter, silent, monitor, schedule.steps)
        evaluator = Evaluator(hooks)
        training = TrainingLoop(schedule, engine, trainer.data, guard, evaluator, silent, reporter, silent)
        training.train(trainer.state)
        trainer.wait_for_device()
        return time.perf_counter() - begun

    off, on = [], []
    for _ in range(rounds):
        off.append(block([], nothing, nothing))
        on.append(block([health], timed_monitor, timed_meter))
    monitor.close()
    spent, busy = (sum(values) for values in zip(*((timed.seconds, timed.busy) for timed in watching), strict=True))
    ratios = [with_it / without - 1 for with_it, without in zip(on, off, strict=True)]
    return {
        "step_ms": round(1000 * statistics.median(off) / steps, 2),
        "scalars_a_step_ms": round(1000 * spent / (rounds * steps), 4),
        "scalars_a_step_processor_ms": round(1000 * busy / (rounds * steps), 4),
        "scalars_share_of_the_time": round(spent / sum(on), 6),
        "paired_blocks": {
            "blocks": rounds,
            "steps_a_block": steps,
            "on_over_off_minus_1": [round(ratio, 5) for ratio in ratios],
            "median": round(statistics.median(ratios), 5),
        },
    }


def _occasions(trainer: Trainer, hook: Hook, every: int, count: int, step_ms: float) -> dict[str, Any]:
    """What one occasion costs, a first one not counted, and its share of the time."""
    _occasion(trainer, hook)
    costs = [1000 * _occasion(trainer, hook) for _ in range(count)]
    share = statistics.median(costs) / (every * step_ms)
    return {"ms": [round(one, 1) for one in costs], "every": every, "share_of_the_time": round(share, 6)}


def _hooks(trainer: Trainer, with_hellaswag: bool) -> Iterator[tuple[str, int, Hook, bool]]:
    """Name, steps between two occasions in the mission, the hook, and whether ranks share its work."""
    from ds_gpt2.data.dataset import Windows, open_dataset
    from ds_gpt2.training.hooks import Histograms, Samples, Validation, open_hellaswag

    mission = load_settings(PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml")
    settings = trainer.settings
    context = settings.batch.sequence_length
    held_out = Windows(open_dataset(settings.data.dir), "val", context)
    validation = Validation(mission.validation, held_out, settings.batch.micro_batch)
    yield f"validation, {len(held_out)} windows", mission.validation.every, validation, True
    samples = Samples(mission.samples, settings.run.seed, settings.run_dir / "samples", context)
    yield "samples", mission.samples.every, samples, False
    yield "histograms", mission.histograms.every, Histograms(mission.histograms, trainer.engine.model), True
    if with_hellaswag and (hellaswag := open_hellaswag(settings.hellaswag, settings.run_dir)) is not None:
        yield "hellaswag", mission.hellaswag.every, hellaswag, True


def _occasion(trainer: Trainer, hook: Hook) -> float:
    """Seconds that a step takes longer for ``hook``, the training of the step itself left out."""
    engine, state = trainer.engine, trainer.state
    assert engine.accumulate(trainer.data.micro_batches(state.step + 1)) is not None
    trainer.wait_for_device()
    begun = time.perf_counter()
    hook.before_update(engine)
    trainer.wait_for_device()
    before = time.perf_counter() - begun
    engine.apply(1e-4)
    state.advance(trainer.plan.tokens_per_step, True, b"")
    collectives.barrier()
    begun = time.perf_counter()
    hook.observe(engine, state)
    collectives.barrier()
    return before + time.perf_counter() - begun


if __name__ == "__main__":
    main()
    exit_report.end_process(exit_report.DONE)
