"""What is done to the run, one thing after another, and what must then hold."""

from __future__ import annotations

import math
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from ds_gpt2.checkpoint.catalog import Generation, candidates, open_generation, problem_of, scan
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.config.batch_plan import fit_ranks, format_batches, plan_batch
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.journal import Event
from ds_gpt2.run_dir.metrics import METRICS, UNWRITTEN, read_metrics
from ds_gpt2.supervision import rank_processes
from ds_gpt2.tools.drill import small_disk
from ds_gpt2.tools.drill.compare import (
    checkpoint_differences,
    curve_differences,
    expected_ledger,
    loss_by_step,
    update_differences,
)
from ds_gpt2.tools.drill.fault_injection import Fault
from ds_gpt2.tools.drill.run_process import Actor, FailedError, end_all
from ds_gpt2.tools.drill.shrink import EVERY

_ALONE_SECONDS = 120.0  # in which ranks without a supervisor must have ended
_SPIKES = 4  # losses too high, one after another, that make a divergence
_LONG_SPIKES, _LONG_EVERY = 12, 2  # the same of a divergence that lasts over several saves, and their interval in steps
_WAITING_SECONDS = 4.0  # in which a run that waits for its checkpoints is seen to do nothing
_STOP_SECONDS = 30.0  # in which a stop ends a read that is tried again
_LIMIT = 4096  # bytes: heartbeats are shorter, records of a run longer
# Mean losses on another number of ranks differ by rounding in bf16; dropout differs altogether.
_LOSS_TOLERANCE, _LOSS_TOLERANCE_WITH_DROPOUT = 0.02, 0.15


class NotDoneError(Exception):
    """This machine cannot be made to do it; the message says what it needs."""


@dataclass(frozen=True)
class Done:
    """A scene after which everything holds that must."""

    text: str
    lost_steps: int
    lost_seconds: float


@dataclass
class Stage:
    """What the scenes are played with."""

    run: Actor
    undisturbed: Actor
    generator: random.Random
    folder: Path  # for files that remember

    @property
    def steps(self) -> int:
        steps = self.run.settings.schedule.steps
        assert steps is not None
        return steps


@dataclass(frozen=True)
class Scene:
    name: str
    play: Callable[[Stage], Done]
    steps: int = EVERY + 3  # that the run gets on meanwhile, about


def wait_for_a_moment(stage: Stage) -> None:
    """Have the run going, to a random instant after it has saved something since its last start."""
    run = stage.run
    if not run.alive:
        run.start()
    run.wait_for("a checkpoint", lambda: _saved_since_start(run))
    until = run.done_steps() + stage.generator.randint(1, EVERY - 1)
    run.wait_for(f"step {until}", lambda: run.done_steps() >= until)
    time.sleep(stage.generator.uniform(0, 0.3))
    if not run.alive or run.done_steps() >= stage.steps:
        raise FailedError(f"the run was over, at step {run.done_steps()}, before anything could be done to it")


def _saved_since_start(run: Actor) -> bool:
    saved: list[int] = []
    begun = -1
    for event in run.events(run.started_at, "launch", "start", "save"):
        if event.kind == "save":
            saved.append(event.step or 0)
        else:
            saved, begun = [], event.step or 0
    return any(step > begun for step in saved)


def _stop(run: Actor) -> None:
    """As a person would, all saved."""
    if not run.alive:
        return
    run.interrupt()
    if (code := run.wait_end()) != exit_report.STOPPED:
        raise FailedError(f"Ctrl+C: exit code {code}, not {exit_report.STOPPED}")


def _recover(run: Actor, since: int, reached: int) -> tuple[int, float]:
    """(the step that the run has gone on from, when it had come further than ``reached``).

    Raises:
        FailedError: it does not, or goes back further than to the last checkpoint but one.
    """
    run.wait_for("a new start", lambda: run.events(since, "start"))
    origin = run.events(since, "start")[-1].step or 0
    if origin < reached - 2 * EVERY:
        raise FailedError(f"went on from step {origin}, though {reached} was reached and every {EVERY} is saved")
    when = run.wait_for("a new step", lambda: run.done_steps() > max(reached, origin))
    return origin, when


def _after_death(stage: Stage, since: int, struck: float, reached: int, text: str) -> Done:
    """The run is to be going again, by itself or started just now."""
    origin, when = _recover(stage.run, since, reached)
    return Done(text, max(0, reached - origin), when - struck)


def read_error(stage: Stage) -> Done:
    """A shard cannot be read at the first try: that is told, tried again, and changes nothing."""
    run = stage.run
    _stop(run)
    batch, rank = max(0, run.saved_step()) + EVERY + stage.generator.randint(1, EVERY - 1), _a_rank(stage)
    once, since = stage.folder / "read_error", run.now()
    run.start(faults_asked=[Fault("read_error", batch=batch, rank=rank, once=str(once))])
    run.wait_for("the step being made", lambda: run.done_steps() >= batch)
    told = run.events(since, "data_error")
    if not told or f"rank {rank}" not in told[0].text:
        raise FailedError("the journal does not tell of it")
    if run.events(since, "crash", "hang", "restart"):
        raise FailedError("the run did not go on without a restart")
    return Done(f"a shard could not be read by rank {rank} for step {batch}; told, read at the next try", 0, 0.0)


def exception(stage: Stage) -> Done:
    run = stage.run
    _stop(run)
    step, rank = max(0, run.saved_step()) + EVERY + stage.generator.randint(1, EVERY - 1), _a_rank(stage)
    once, since = stage.folder / "exception", run.now()
    run.start(faults_asked=[Fault("crash", step=step, rank=rank, once=str(once))])
    run.wait_for("the crash being noticed", lambda: run.events(since, "crash"))
    crash = run.events(since, "crash")[0]
    if f"rank {rank}" not in crash.text:
        raise FailedError(f"the journal does not say that it was rank {rank}: {crash.text}")
    text = f"an exception in rank {rank} at step {step}; named in the journal, restarted by itself"
    return _after_death(stage, run.now(), once.stat().st_mtime, step - 1, text)


def kill_rank(stage: Stage) -> Done:
    wait_for_a_moment(stage)
    run, rank = stage.run, _a_rank(stage)
    since, struck = run.now(), time.time()
    run.rank(rank).kill()
    run.wait_for("the death being noticed", lambda: run.events(since, "crash"))
    reached = run.done_steps()
    return _after_death(
        stage, since, struck, reached, f"SIGKILL to rank {rank} after step {reached}; restarted by itself"
    )


def freeze_rank(stage: Stage) -> Done:
    wait_for_a_moment(stage)
    run, rank = stage.run, _a_rank(stage)
    since, limit = run.now(), _longest_hang(stage)
    struck = _freeze_in_training(run, rank)
    reached = run.done_steps()
    run.wait_for("the hang being noticed", lambda: run.events(since, "hang"), limit)
    hang = run.events(since, "hang")[0]
    if f"rank {rank}" not in hang.text:
        raise FailedError(f"the journal does not say that it was rank {rank}: {hang.text}")
    stacks = Path(hang.facts["stacks"])
    silent = [number for number in range(run.place.ranks) if not _has_stacks(stacks / f"rank_{number:05d}.txt")]
    if silent:
        raise FailedError(f"no stacks of rank {', '.join(map(str, silent))} in {stacks}")
    text = f"SIGSTOP to rank {rank} after step {reached}; noticed after {hang.time - struck:.0f} s, stacks of all ranks"
    return _after_death(stage, since, struck, reached, f"{text}, restarted by itself")


def _freeze_in_training(run: Actor, rank: int) -> float:
    """Stop a rank in the middle of a step, where the watchdog's time is short; when that was."""
    process = run.rank(rank)
    while True:
        run.wait_for("a step", lambda: _is_training(run, rank))
        struck = time.time()
        process.suspend()
        time.sleep(0.1)
        if _is_training(run, rank):
            return struck
        process.resume()
        time.sleep(0.1)


def _is_training(run: Actor, rank: int) -> bool:
    return any(beat.phase == "training" for beat in run.beats() if beat.pid == run.rank(rank).pid)


def _longest_hang(stage: Stage) -> float:
    """Seconds within which a hang must have been noticed."""
    settings = stage.run.settings.supervisor
    records = read_metrics(stage.run.run_dir / METRICS)
    step = statistics.median([record["perf/step_ms"] / 1000 for record in records if record.get("perf/step_ms")])
    return 1.5 * max(settings.hang_seconds, settings.hang_factor * step) + 10


def _has_stacks(file: Path) -> bool:
    return file.is_file() and "File " in file.read_text(encoding="utf-8", errors="replace")


def kill_launcher(stage: Stage) -> Done:
    wait_for_a_moment(stage)
    run = stage.run
    group, since, struck = run.group, run.now(), time.time()
    for process in run.launchers():
        process.kill()
    reached = run.done_steps()
    run.wait_for("a new launch", lambda: run.events(since, "launch"))
    if left := rank_processes.members(group):
        raise FailedError(f"processes of the start before are left: {[process.pid for process in left]}")
    text = f"SIGKILL to DeepSpeed's launcher after step {reached}; ranks ended, restarted by itself"
    return _after_death(stage, since, struck, reached, text)


def ctrl_c(stage: Stage) -> Done:
    wait_for_a_moment(stage)
    run = stage.run
    since, struck, reached = run.now(), time.time(), run.done_steps()
    _stop(run)
    saved = run.saved_step()
    if saved < reached:
        raise FailedError(f"step {reached} was done, the newest checkpoint is of step {saved}")
    run.start()
    return _after_death(stage, since, struck, saved, f"Ctrl+C: exit code 3 with step {saved} saved; resumed")


def kill_supervisor(stage: Stage) -> Done:
    wait_for_a_moment(stage)
    run = stage.run
    group, since, struck, reached = run.group, run.now(), time.time(), run.done_steps()
    run.kill_supervisor()
    deadline = time.monotonic() + _ALONE_SECONDS
    while rank_processes.members(group):
        if time.monotonic() > deadline:
            raise FailedError(f"the ranks still ran {_ALONE_SECONDS:.0f} s after their supervisor's death")
        time.sleep(0.1)
    saved = run.saved_step()
    if saved < reached:
        raise FailedError(f"step {reached} was done, the ranks left behind saved step {saved}")
    run.start()
    text = f"SIGKILL to the supervisor; the ranks saved step {saved} and ended by themselves; resumed"
    return _after_death(stage, since, struck, saved, text)


def kill_everything(stage: Stage) -> Done:
    wait_for_a_moment(stage)
    run = stage.run
    since, struck = run.now(), time.time()
    run.kill_everything()
    reached = run.done_steps()
    run.start()
    return _after_death(
        stage, since, struck, reached, f"SIGKILL to every process at once after step {reached}; resumed"
    )


def truncate(stage: Stage) -> Done:
    def cut(file: Path) -> str:
        os.truncate(file, file.stat().st_size // 2)
        return "cut in half"

    return _damage(stage, cut)


def flip_byte(stage: Stage) -> Done:
    def flip(file: Path) -> str:
        place = stage.generator.randrange(file.stat().st_size)
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 1 << stage.generator.randrange(8)]))
        return f"one bit of byte {place:,} flipped"

    return _damage(stage, flip)


def _damage(stage: Stage, damage: Callable[[Path], str]) -> Done:
    """Spoil a file of the newest checkpoint; the one before it must be taken, and the bad one named."""
    wait_for_a_moment(stage)
    run = stage.run
    struck = time.time()
    _stop(run)
    newest = candidates(run.checkpoint_dir, "latest")[0]
    assert newest.manifest is not None
    file = stage.generator.choice(sorted(newest.manifest.files))
    what = damage(newest.path / file)
    whole = next((found for found in candidates(run.checkpoint_dir, "latest") if problem_of(found) is None), None)
    if whole is None:
        raise FailedError("there was no older checkpoint to fall back to")
    log, since = run.run_dir / "train.log", run.now()
    said = log.stat().st_size
    run.start()
    origin, when = _recover(run, since, newest.step)
    if origin != whole.step:
        raise FailedError(f"went on from step {origin}; the newest whole checkpoint was {whole.tag}")
    with log.open("rb") as opened:
        opened.seek(said)
        lines = opened.read().decode(errors="replace").splitlines()
    if not any(newest.tag in line and file in line for line in lines):
        raise FailedError(f"{log} does not name {file} of {newest.tag}")
    text = f"{newest.tag}/{file}: {what}; it was named, {whole.tag} taken"
    return Done(text, newest.step - origin, when - struck)


def no_checkpoints(stage: Stage) -> Done:
    """The directory of checkpoints is away at a start: the run waits for it, and does not begin again."""
    wait_for_a_moment(stage)
    run = stage.run
    _stop(run)
    saved, records = run.saved_step(), (run.run_dir / METRICS).read_bytes()
    directory, aside = run.checkpoint_dir, run.checkpoint_dir.with_name(run.checkpoint_dir.name + ".aside")
    since, struck = run.now(), time.time()
    directory.rename(aside)
    empty = stage.generator.random() < 0.5  # what an unmounted disk leaves
    if empty:
        directory.mkdir()
    try:
        run.start()
        run.wait_for("a report of the missing checkpoints", lambda: run.events(since, "no_checkpoints", "launch"))
        time.sleep(_WAITING_SECONDS)
        if not run.alive or run.events(since, "launch", "start"):
            raise FailedError(f"the run did not wait for its checkpoints, the newest of step {saved}")
        if (run.run_dir / METRICS).read_bytes() != records:
            raise FailedError(f"{METRICS} was changed without the checkpoints")
        if directory.exists() and any(directory.iterdir()):
            raise FailedError(f"files were written where the checkpoints were: {sorted(directory.iterdir())[0]}")
    except FailedError:
        end_all(run.mark)  # it may be writing there
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    origin, when = _recover(run, since, saved)
    if origin != saved:
        raise FailedError(f"resumed from step {origin}, though {saved} was saved")
    where = "an empty directory in its place" if empty else "nothing in its place"
    text = f"the checkpoints were moved away, {where}: reported, waited for; resumed from step {saved} when back"
    return Done(text, 0, when - struck)


def disk_full(stage: Stage) -> Done:
    """The disk fills up in the middle of a save; once there is room again the next save must succeed."""
    run = stage.run
    if not run.alive and run.saved_step() < 0:
        wait_for_a_moment(stage)
    _stop(run)
    newest = candidates(run.checkpoint_dir, "latest")[0]
    assert newest.manifest is not None
    within, size = small_disk.namespace(), small_disk.size_for(newest.manifest.bytes)
    since = run.now()
    if within is not None and size is not None:
        run.start(room=size, within=within)
        directory = Path(f"/proc/{run.pid}/root{run.checkpoint_dir}")
        full, how = _filled(directory), f"a disk of {size / 1e6:.0f} MB ran full in a save"
    else:
        run.start()
        directory = run.checkpoint_dir
        # Half of the largest file: the write that comes there fails.
        limit = max(entry.bytes for entry in newest.manifest.files.values()) // 2
        full = _limited(rank_processes.ranks_of(run.group), limit)
        how = "a save's writes failed (a limit on file size: no small file system available)"
    run.wait_for("a checkpoint", lambda: _saved_since_start(run))
    with full as keep_full:
        run.wait_for("the save failing", lambda: keep_full() or run.events(since, "save_failed"))
        reached = run.done_steps()
        run.wait_for("training going on", lambda: run.done_steps() > reached)
        good = [found.step for found in scan(directory) if problem_of(found) is None]
        if not good:
            raise FailedError("no whole checkpoint is left")
    failed, freed = run.events(since, "save_failed")[-1].step or 0, run.now()
    run.wait_for("a save when there was room again", lambda: _newer(run.events(freed, "save"), failed))
    reached, outside = run.done_steps(), run.now()
    _stop(run)
    run.start()
    _recover(run, outside, reached)
    return Done(f"{how}: training went on, {rolling_tag(max(good))} stayed whole, the next save succeeded", 0, 0.0)


@contextmanager
def _filled(directory: Path) -> Iterator[Callable[[], None]]:
    """Gives what is to be called again and again: checkpoints that are deleted make room."""
    try:
        yield lambda: _fill(directory)
    finally:
        (directory / small_disk.FILLER).unlink(missing_ok=True)


def _fill(directory: Path) -> None:
    with suppress(OSError):  # a save has just taken the rest
        small_disk.fill(directory)


@contextmanager
def _limited(processes: Sequence[psutil.Process], size: int) -> Iterator[Callable[[], None]]:
    """Files that ``processes`` write must not grow beyond ``size`` bytes."""
    before = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
    for process, (_, hard) in zip(processes, before, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (size, hard))
    try:
        yield lambda: None
    finally:
        for process, limits in zip(processes, before, strict=True):
            with suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, limits)


def _newer(saves: Sequence[Event], step: int) -> bool:
    return any((event.step or 0) > step for event in saves)


def run_dir_full(stage: Stage) -> Done:
    """The disk of the run's own directory is full: the run trains, saves and stops; its records are complete later."""
    run = stage.run
    if not run.alive and run.saved_step() < 0:
        wait_for_a_moment(stage)
    _stop(run)
    within, size = small_disk.namespace(), small_disk.size_for_run(run.run_dir)
    since = run.now()
    if within is not None and size is not None:
        run.start(run_room=size, within=within)
        run.wait_for("a checkpoint", lambda: _saved_since_start(run))
        before, how = _pids(run), f"a disk of {size / 1e6:.0f} MB below the run's directory ran full"
        _train_with_full_run_dir(run)
    else:
        run.start()
        run.wait_for("a checkpoint", lambda: _saved_since_start(run))
        before, how = (
            _pids(run),
            "the run's files could not grow (a limit on file size: no small file system available)",
        )
        reached = run.done_steps()
        with _limited([*rank_processes.ranks_of(run.group), psutil.Process(run.pid)], _LIMIT):
            run.wait_for("training continuing", lambda: run.done_steps() >= reached + EVERY)
    if _pids(run) != before or (ended := run.events(since, "crash", "hang", "restart")):
        raise FailedError(f"the ranks were restarted{f': {ended[0].text}' if ended else ''}")
    _stop(run)
    saved, resumed, struck = run.saved_step(), run.now(), time.time()
    run.start()
    origin, when = _recover(run, resumed, saved)
    run.wait_for("a checkpoint", lambda: _saved_since_start(run))
    steps = [record["step"] for record in read_metrics(run.run_dir / METRICS)]
    if origin != saved or steps != list(range(1, len(steps) + 1)) or len(steps) <= saved:
        raise FailedError(
            f"resumed from step {origin} of {saved}; {METRICS} has {len(steps)} records, not each step once"
        )
    return Done(f"{how}: trained, saved, exit code 3; after the resume {METRICS} has every step once", 0, when - struck)


def _train_with_full_run_dir(run: Actor) -> None:
    directory, reserve = run.run_dir, run.checkpoint_dir / UNWRITTEN

    def is_kept() -> bool:
        with suppress(OSError):  # the run has just taken the rest
            small_disk.fill_up(directory)
        return reserve.exists()

    run.wait_for(f"records that {METRICS} cannot take being kept in {reserve}", is_kept)
    reached = run.done_steps()
    run.wait_for("a save while the run's directory is full", lambda: run.saved_step() > reached)


def _pids(run: Actor) -> list[int]:
    return [run.rank(rank).pid for rank in range(run.place.ranks)]


def unreadable_data(stage: Stage) -> Done:
    """A shard cannot be read for long, and a stop is requested: the whole steps are saved at once."""
    run = stage.run
    _stop(run)
    batch, rank = max(0, run.saved_step()) + EVERY + stage.generator.randint(1, EVERY - 1), _a_rank(stage)
    during, since = stage.folder / "unreadable_data", run.now()
    during.touch()
    try:
        run.start(faults_asked=[Fault("read_error", batch=batch, rank=rank, during=str(during))])
        run.wait_for("a second failed read", lambda: len(run.events(since, "data_error")) > 1)
        run.wait_for("the step before it", lambda: run.done_steps() >= batch - 1)
        struck = time.time()
        run.interrupt()
        ending = ("saving", "finishing")
        run.wait_for(
            "the end of the reading",
            lambda: not run.alive or all(beat.phase in ending for beat in run.beats()),
            _STOP_SECONDS,
        )
        if (code := run.wait_end()) != exit_report.STOPPED:
            raise FailedError(f"Ctrl+C: exit code {code}, not {exit_report.STOPPED}")
        seconds = time.time() - struck
    finally:
        during.unlink()
    if ended := run.events(since, "crash", "hang", "restart"):
        raise FailedError(f"the run did not just stop: {ended[0].text}")
    if (saved := run.saved_step()) != batch - 1:
        raise FailedError(f"step {batch - 1} was done, the newest checkpoint is of step {saved}")
    text = f"a shard could not be read by rank {rank} for step {batch}; Ctrl+C: exit code 3 after {seconds:.0f} s with"
    resumed = run.now()
    run.start()
    return _after_death(stage, resumed, struck, saved, f"{text} step {saved} saved; resumed")


def finish(stage: Stage) -> Done:
    """To the last step; then the run must be, bit for bit, what the undisturbed one is."""
    run = stage.run
    if not run.alive:
        run.start()
    run.wait_done()
    tag = rolling_tag(stage.steps)
    found = curve_differences(stage.undisturbed.run_dir, run.run_dir)
    found += checkpoint_differences(stage.undisturbed.checkpoint_dir / tag, run.checkpoint_dir / tag)
    ledger = expected_ledger(run.settings, run.place.ranks, range(1, stage.steps + 1))
    if _state(run.checkpoint_dir / tag).ledger != ledger:
        found.append("the ledger of windows is not that of batches 1, 2, 3, ...")
    if found:
        raise FailedError(f"{len(found)} differences from the undisturbed run: {'; '.join(found[:3])}")
    text = f"after {stage.steps} steps: curves, weights, moments, random states, ledger equal to the undisturbed run's"
    return Done(text, 0, 0.0)


def nan(stage: Stage) -> Done:
    """One NaN in one micro-batch of one rank: that update is skipped on all ranks and changes nothing."""
    run, rank = stage.run, _a_rank(stage)
    before = _newest_of_a_run_at_rest(run)
    step, state = before.step + 1, _state(before.path)
    since = run.now()
    micro_batch = stage.generator.randrange(_accumulation(run))
    run.start(f"schedule.steps={step}", faults_asked=[Fault("nan", step=step, rank=rank, micro_batch=micro_batch)])
    run.wait_done()
    after = _state(run.checkpoint_dir / rolling_tag(step))
    if not any(event.step == step for event in run.events(since, "not_finite")):
        raise FailedError("the journal does not tell of it")
    if after.skipped_steps != state.skipped_steps + 1 or after.batch != state.batch + 1:
        raise FailedError(f"{after.skipped_steps - state.skipped_steps} updates are counted as skipped")
    if found := update_differences(before.path, run.checkpoint_dir / rolling_tag(step)):
        raise FailedError(f"the skipped update has changed something: {'; '.join(found[:3])}")
    text = (
        f"NaN in micro-batch {micro_batch} of rank {rank} at step {step}: update skipped and counted, weights, masters"
    )
    return Done(f"{text}, moments as before, bit for bit", 1, 0.0)


def other_ranks(stage: Stage) -> Done:
    """The same batches on another number of ranks, and back."""
    run, steps = stage.run, stage.steps
    ranks, micro_batch = _another_number_of_ranks(run)
    _newest_of_a_run_at_rest(run)
    older = next((found for found in candidates(run.checkpoint_dir, f"before:{steps}") if not problem_of(found)), None)
    if older is None or older.step >= steps:
        raise FailedError("there is no older checkpoint to go on from")
    since, begun = run.now(), time.time()
    run.start(f"batch.micro_batch={micro_batch}", f"schedule.steps={steps}", resume=older.tag, ranks=ranks)
    run.wait_for("a new start", lambda: run.events(since, "start"))
    seconds = time.time() - begun
    run.wait_done()
    there = open_generation(run.checkpoint_dir / rolling_tag(steps)).manifest
    if there is None or there.world_size != ranks:
        raise FailedError(f"{rolling_tag(steps)} is not of {ranks} ranks")
    _expect_ledger(stage, steps, range(1, steps + 1))
    apart = _losses_apart(stage, older.step)
    run.start(f"schedule.steps={steps + 1}")
    run.wait_done()
    _expect_ledger(stage, steps + 1, range(1, steps + 2))
    text = f"{run.place.ranks} -> {ranks} -> {run.place.ranks} ranks at step {older.step}: the same windows a step"
    return Done(f"{text}, losses within {100 * apart:.2f}%", 0, seconds)


def _another_number_of_ranks(run: Actor) -> tuple[int, int]:
    """(ranks, micro-batch) that share the same token budget."""
    batch, now = run.settings.batch, run.place.ranks
    if now == 1 and run.place.accelerator == "cuda":
        raise NotDoneError("needs a second GPU")
    ranks, micro_batch = fit_ranks(
        batch.tokens_per_step, batch.micro_batch, batch.sequence_length, now - 1 if now > 1 else 2
    )
    if ranks == now:
        raise NotDoneError("needs a token budget of more than one window a step")
    return ranks, micro_batch


def _losses_apart(stage: Stage, after: int) -> float:
    """The largest relative difference of a step's loss from the undisturbed run's."""
    mine, theirs = (loss_by_step(actor.run_dir) for actor in (stage.run, stage.undisturbed))
    apart = max(abs(mine[step] / theirs[step] - 1) for step in range(after + 1, stage.steps + 1))
    dropout = stage.run.settings.model.dropout
    tolerance = _LOSS_TOLERANCE_WITH_DROPOUT if dropout else _LOSS_TOLERANCE
    if not apart <= tolerance:
        raise FailedError(f"a loss is {100 * apart:.1f}% from the undisturbed run's")
    return apart


def divergence(stage: Stage) -> Done:
    """Losses that jump and stay: the guard must go back to before them, and leave their batches out."""
    return _diverge(stage, _SPIKES, EVERY)


def long_divergence(stage: Stage) -> Done:
    """The same over several saves, with ``keep_last=1`` and a crash within: a checkpoint of before must be left."""
    return _diverge(stage, _LONG_SPIKES, _LONG_EVERY, _LONG_SPIKES // 2)


def _diverge(stage: Stage, spikes: int, every: int, crash_at: int | None = None) -> Done:
    run = stage.run
    newest = _newest_of_a_run_at_rest(run)
    state = _state(newest.path)
    batches = tuple(range(state.next_batch + 2, state.next_batch + 2 + spikes))
    steps, since = newest.step + 2 + spikes + EVERY, run.now()
    overrides, rank = [f"schedule.steps={steps}"], _a_rank(stage)
    faults = [Fault("spike", batch=batch, rank=rank) for batch in batches]
    if crash_at is not None:
        overrides += [f"checkpoint.every={every}", "checkpoint.keep_last=1"]
        once = stage.folder / "crash_in_divergence"
        faults.append(Fault("crash", batch=batches[crash_at], rank=rank, once=str(once)))
    run.start(
        *overrides,
        "guards.spike=alert",
        "guards.divergence=rollback",
        f"guards.divergence_steps={spikes}",
        faults_asked=faults,
    )
    run.wait_done()
    told = run.events(since, "divergence")
    if [event.facts["batches"] for event in told] != [list(batches)]:
        raise FailedError(f"told was {[event.text for event in told]}, not one divergence in batches {batches}")
    origin = run.events(since, "start")[-1]
    healthy = max(newest.step, (newest.step + 2) // every * every)  # the last save before the losses jump
    if origin.step != healthy:
        raise FailedError(
            f"rolled back to step {origin.step}, not to {healthy}, the last save before the losses jumped"
        )
    left_out = [*state.left_out, *batches]
    final = _state(run.checkpoint_dir / rolling_tag(steps))
    if final.left_out != left_out:
        raise FailedError(f"left out are {final.left_out}, not {left_out}")
    last = steps + len(left_out)
    _expect_ledger(stage, steps, [batch for batch in range(1, last + 1) if batch not in left_out])
    losses = loss_by_step(run.run_dir)
    highest = max(loss for step, loss in losses.items() if step <= newest.step and math.isfinite(loss))
    if not all(loss <= highest + 1 for step, loss in losses.items() if step > newest.step):
        raise FailedError("the losses have not come down again")
    again = next(record["time"] for record in read_metrics(run.run_dir / METRICS) if record["step"] == told[0].step)
    crash = "" if crash_at is None else f", over {spikes // every} saves with keep_last=1 and a crash"
    text = (
        f"losses jumped at batches {format_batches(batches)}{crash}: rolled back to step {healthy}, those batches left"
    )
    return Done(f"{text} out, losses as before", (told[0].step or 0) - healthy, again - told[0].time)


def _newest_of_a_run_at_rest(run: Actor) -> Generation:
    _stop(run)
    found = candidates(run.checkpoint_dir, "latest")
    if not found:
        raise FailedError("there is no checkpoint to go on from")
    return found[0]


def _expect_ledger(stage: Stage, step: int, batches: Sequence[int]) -> None:
    run = stage.run
    if _state(run.checkpoint_dir / rolling_tag(step)).ledger != expected_ledger(run.settings, run.place.ranks, batches):
        raise FailedError(f"the ledger of windows at step {step} is not the one expected")


def _state(checkpoint: Path) -> TrainState:
    manifest = open_generation(checkpoint).manifest
    if manifest is None:
        raise FailedError(f"{checkpoint.name} is not there, or damaged")
    return TrainState.from_dict(manifest.state)


def _accumulation(run: Actor) -> int:
    batch = run.settings.batch
    return plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, run.place.ranks).accumulation


def _a_rank(stage: Stage) -> int:
    return stage.generator.randrange(stage.run.place.ranks)


SCENES = {
    "read_error": Scene("read_error", read_error),
    "exception": Scene("exception", exception),
    "kill_rank": Scene("kill_rank", kill_rank),
    "freeze_rank": Scene("freeze_rank", freeze_rank),
    "kill_launcher": Scene("kill_launcher", kill_launcher),
    "ctrl_c": Scene("ctrl_c", ctrl_c),
    "kill_supervisor": Scene("kill_supervisor", kill_supervisor),
    "kill_all": Scene("kill_all", kill_everything),
    "truncate": Scene("truncate", truncate),
    "flip_byte": Scene("flip_byte", flip_byte),
    "no_checkpoints": Scene("no_checkpoints", no_checkpoints),
    "disk_full": Scene("disk_full", disk_full, 4 * EVERY),
    "run_dir_full": Scene("run_dir_full", run_dir_full, 8 * EVERY),
    "unreadable_data": Scene("unreadable_data", unreadable_data),
    "nan": Scene("nan", nan),
    "other_ranks": Scene("other_ranks", other_ranks),
    "divergence": Scene("divergence", divergence),
    "long_divergence": Scene("long_divergence", long_divergence),
}
FINISH = Scene("bit_for_bit", finish)
