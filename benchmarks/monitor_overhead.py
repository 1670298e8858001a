"""Measure the overhead of monitoring.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 benchmarks/monitor_overhead.py --data DIR --out FILE
    deepspeed --num_gpus 1 benchmarks/monitor_overhead.py --preset 124M --accumulation 4 --one_of 4 --data DIR ...

Blocks of the training loop alternate: without any monitoring, and with all scalars of every step written to
metrics.jsonl and TensorBoard and the health of the machine observed. The difference is far below the noise between
blocks, so the calls themselves are timed, too, in wall and processor time. Single calls of validation, samples,
histograms and HellaSwag are timed and divided by the number of steps between them in ds_configs/gpt2_124m.yaml. With
``--one_of 4`` a rank represents four: work that is shared among ranks then counts a quarter.
"""

from __future__ import annotations

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

from benchmarks.program import make_parser, report_result
from benchmarks.settings import set_up_compiler, settings_of
from ds_gpt2.config.settings import PROJECT_DIR, load_settings
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_codes, process_end

if TYPE_CHECKING:
    from benchmarks.trainer import Trainer
    from ds_gpt2.training.hooks import Hook

T = TypeVar("T")


class Silent:
    """Replaces all components around training by calls that do nothing."""

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

    def add_evaluation(self, state: object, roles: object = ()) -> bool:
        return True

    def finish(self, state: object, complete: bool) -> bool:
        return True


class Timed:
    """Forwards calls to a target and sums up their time."""

    can_be_repeated = False  # of ``Health``
    name = "state of the machine"

    def __init__(self, target: Any, *names: str) -> None:
        self.seconds = self.busy = 0.0  # busy: processor time of this thread
        for name in names:
            setattr(self, name, self._timed(getattr(target, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start_time, busy = time.perf_counter(), time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start_time
                self.busy += time.thread_time() - busy

        return timed


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out", launched=True)
    parser.add_argument("--preset", default="7M")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="steps per block")
    parser.add_argument("--occasions", type=int, default=5)
    parser.add_argument("--one_of", type=int, default=1, metavar="RANKS", help="ranks that each rank represents")
    parser.add_argument("--hellaswag", type=Path, help="the file of items; without it, HellaSwag is not measured")
    options = parser.parse_args()
    torch_device = device.choose("auto")
    set_up_compiler(settings_of(options.data, options.preset), torch_device)
    from benchmarks.trainer import Trainer
    from ds_gpt2.engine.process_group import close_process_group, open_process_group

    open_process_group(torch_device)
    logging.getLogger("ds_gpt2").setLevel(logging.ERROR)
    folder = Path(collectives.broadcast_from_main(lambda: tempfile.mkdtemp(prefix="monitor-overhead-")))
    overrides = {"run.dir": str(folder / "runs"), "monitor.tensorboard": "true"}
    if options.hellaswag:
        overrides["hellaswag.path"] = str(options.hellaswag.absolute())
    trainer = Trainer(settings_of(options.data, options.preset, options.accumulation, **overrides), torch_device)
    trainer.steps(4)
    result = _scalars(trainer, options.rounds, options.steps)
    result["occasions"] = {
        name: _occasions(trainer, hook, every, options.occasions, result["step_ms"] * (options.one_of if shared else 1))
        for name, every, hook, shared in _hooks(trainer, bool(options.hellaswag))
    }
    if collectives.is_main():
        setting = f"{options.preset}, {collectives.world_size()} ranks on {torch_device.type}, {trainer.plan}"
        report_result(options.out, {"setting": setting, **result})
    collectives.barrier()
    if collectives.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    close_process_group()


def _scalars(trainer: Trainer, rounds: int, steps: int) -> dict[str, Any]:
    from ds_gpt2.config.interval import Every
    from ds_gpt2.model.gpt2 import flops_per_token
    from ds_gpt2.monitoring.monitor import Monitor
    from ds_gpt2.monitoring.pace import Cadence, Pace
    from ds_gpt2.monitoring.step_reporter import StepReporter
    from ds_gpt2.monitoring.step_timer import EarlierTime, StepTimer
    from ds_gpt2.run_dir.heartbeat import Heartbeat
    from ds_gpt2.training.evaluation_attempts import EvaluationAttempts
    from ds_gpt2.training.evaluator import Evaluator
    from ds_gpt2.training.guards import Guard
    from ds_gpt2.training.hooks import Health
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
    health.every = Every(1)  # type: ignore[attr-defined]  # it replaces the hook

    def block(hooks: list[Any], monitor: Any, meter: Any) -> float:
        collectives.barrier()
        trainer.wait_for_device()
        start_time = time.perf_counter()
        schedule = TrainingSchedule(trainer.state.step + steps, lambda _: 1e-4, Every(0))
        silent: Any = nothing
        reporter = StepReporter(heartbeat, meter, silent, monitor, schedule.steps)
        evaluator = Evaluator(hooks, EvaluationAttempts(settings.run_dir), lambda step, text: print(text))
        training = TrainingLoop(schedule, engine, trainer.data, guard, evaluator, silent, reporter, silent)
        training.train(trainer.state)
        trainer.wait_for_device()
        return time.perf_counter() - start_time

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
    """Return the cost of single calls after a warm-up call, and their share of the training time."""
    _occasion(trainer, hook)
    costs = [1000 * _occasion(trainer, hook) for _ in range(count)]
    share = statistics.median(costs) / (every * step_ms)
    return {"ms": [round(cost, 1) for cost in costs], "every": every, "share_of_the_time": round(share, 6)}


def _hooks(trainer: Trainer, with_hellaswag: bool) -> Iterator[tuple[str, int, Hook, bool]]:
    """Yield name, interval in steps in gpt2_124m.yaml, hook, and whether ranks share its work."""
    from ds_gpt2.data.sources import HeldOut, open_sources
    from ds_gpt2.training.hooks import Histograms, Samples, Validation, open_hellaswag

    reference = load_settings(PROJECT_DIR / "ds_configs" / "gpt2_124m.yaml")
    settings = trainer.settings
    context = settings.batch.sequence_length
    held_out = open_sources(settings.data).windows("val", context)
    validation = Validation(reference.validation, [HeldOut(held_out)], settings.batch.micro_batch)
    yield f"validation, {len(held_out)} windows", reference.validation.every, validation, True
    samples = Samples(reference.samples, settings.run.seed, settings.run_dir / "samples", context)
    yield "samples", reference.samples.every, samples, False
    yield "histograms", reference.histograms.every, Histograms(reference.histograms, trainer.engine.model), True
    if not with_hellaswag:
        return
    if (hellaswag := open_hellaswag(settings.hellaswag, trainer.engine.model, settings.run_dir)) is not None:
        yield "hellaswag", reference.hellaswag.every, hellaswag, True


def _occasion(trainer: Trainer, hook: Hook) -> float:
    """Return the seconds that ``hook`` adds to a step."""
    engine, state = trainer.engine, trainer.state
    assert engine.accumulate(trainer.data.micro_batches(state.step + 1)) is not None
    trainer.wait_for_device()
    start_time = time.perf_counter()
    hook.before_update(engine)
    trainer.wait_for_device()
    before = time.perf_counter() - start_time
    engine.apply(1e-4)
    state.advance(trainer.plan.tokens_per_step, True, b"")
    collectives.barrier()
    start_time = time.perf_counter()
    hook.observe(engine, state)
    collectives.barrier()
    return before + time.perf_counter() - start_time


if __name__ == "__main__":
    main()
    process_end.end_process(exit_codes.DONE)
