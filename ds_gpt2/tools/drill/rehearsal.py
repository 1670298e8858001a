"""The drill from its first process to its last: the undisturbed run, the disturbed one, and nothing left of either."""

from __future__ import annotations

import contextlib
import json
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import yaml

from ds_gpt2 import __version__
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.common import files, host
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.deepspeed_config import load_deepspeed_file, without_trackers
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.tools.drill import shrink
from ds_gpt2.tools.drill.plan import CHANGING, EXACT, DrillPlan
from ds_gpt2.tools.drill.record import Record, SceneResult
from ds_gpt2.tools.drill.run_process import Actor, FailedError, end_all
from ds_gpt2.tools.drill.scenarios import FINISH, SCENES, NotDoneError, Scene, Stage
from ds_gpt2.tools.resources.requirements import checkpoint_bytes

_LEAST_STEPS = 8 * shrink.EVERY  # as many losses as a guard wants to have seen
_PATIENCE_SECONDS = {False: 300.0, True: 1200.0}  # whole or not: for a start, a stop, or a few steps
_CHECKPOINTS = 14  # of both runs together, on the disk at one time


def rehearse(plan: DrillPlan, tell: Callable[[SceneResult], None]) -> tuple[Record, Path]:
    """Play it; returns the record, and the directory below the run's where it lies.

    Args:
        tell: is given each row when it is there.

    Raises:
        UserError: the disk has no room for the drill, or the undisturbed run does not work at all.
    """
    begun = time.time()
    exact = [SCENES[name] for name in EXACT if name in plan.names]
    changing = [SCENES[name] for name in CHANGING if name in plan.names]
    steps = max(_LEAST_STEPS, sum(scene.steps for scene in (*exact, FINISH)))
    folder = plan.settings.run_dir / "drill" / time.strftime("%Y-%m-%dT%H-%M-%S")
    checkpoints = plan.settings.checkpoint.dir / f".drill-{folder.name}"
    mark = str(checkpoints)
    with _cleaned_up(mark, checkpoints, plan.keep):
        folder.mkdir(parents=True)
        undisturbed, disturbed = (
            _actor(plan, name, steps, folder, checkpoints, mark) for name in (shrink.UNDISTURBED, shrink.DISTURBED)
        )
        _check_room(disturbed.settings, plan.settings)
        record = _record(plan, disturbed.settings)

        def note(row: SceneResult) -> None:
            record.rows.append(row)
            record.seconds = round(time.time() - begun, 1)
            record.write(folder)
            tell(row)

        note(_play_undisturbed(undisturbed))
        stage = Stage(disturbed, undisturbed, random.Random(plan.seed), folder)
        for scene in (*exact, FINISH, *changing):
            note(_play(scene, stage))
            if record.rows[-1].verdict == "FAIL":
                end_all(mark)
        note(_nothing_left(mark))
    return record, folder


def _play_undisturbed(run: Actor) -> SceneResult:
    """The run that nobody disturbs.

    Raises:
        UserError: it does not come to its end: there is nothing to rehearse.
    """
    begun = time.time()
    run.start()
    try:
        run.wait_done()
    except FailedError as error:
        raise UserError(f"undisturbed, {error}: see {run.output}, fix the config, then run the drill again") from None
    if troubles := run.events(0, "crash", "hang", "rollback", "save_failed"):
        raise UserError(f"the run is in trouble even if nobody disturbs it ({troubles[0].text}): see {run.output}")
    text = f"{run.settings.schedule.steps} steps that nobody disturbs, in {time.time() - begun:.0f} s"
    return SceneResult("undisturbed", "pass", text)


def _play(scene: Scene, stage: Stage) -> SceneResult:
    try:
        done = scene.play(stage)
    except NotDoneError as error:
        return SceneResult(scene.name, "not done", str(error))
    except (FailedError, DamagedError, UserError) as error:
        return SceneResult(scene.name, "FAIL", str(error))
    except Exception as error:  # whatever it is, the scenes after it are worth playing
        return SceneResult(scene.name, "FAIL", f"{type(error).__name__}: {error}")
    return SceneResult(scene.name, "pass", done.text, done.lost_steps, round(done.lost_seconds, 1))


def _nothing_left(mark: str) -> SceneResult:
    left = end_all(mark)
    if left:
        return SceneResult("no_process_left", "FAIL", f"{len(left)} processes were left: {left[0]}")
    return SceneResult("no_process_left", "pass", "no process of the drill is left")


@contextlib.contextmanager
def _cleaned_up(mark: str, checkpoints: Path, keep: bool) -> Iterator[None]:
    """Whatever happens: what was started is ended, what takes room is removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    asked = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in asked}
    try:
        yield
    finally:
        impatient = signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_all(mark)
        if not keep:
            shutil.rmtree(checkpoints, ignore_errors=True)
        signal.signal(signal.SIGINT, impatient)
        for number, handler in before.items():
            signal.signal(number, handler)


def _actor(plan: DrillPlan, name: str, steps: int, folder: Path, checkpoints: Path, mark: str) -> Actor:
    """A run of its own, with its config in the drill's directory."""
    tree = shrink.tree_for(plan.settings, plan.place.ranks, steps, plan.whole)
    tree["run"] |= {"name": name, "dir": str(folder)}
    tree["checkpoint"]["dir"] = str(checkpoints)
    tree["deepspeed"] = str(_deepspeed_file(plan.settings, folder))
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    settings = load_settings(config)
    for directory in settings.output_dirs:
        files.check_writable(directory)
    return Actor(config, settings, plan.place, folder / f"{name}.log", mark, _PATIENCE_SECONDS[plan.whole])


def _deepspeed_file(settings: Settings, folder: Path) -> Path:
    """The user's DeepSpeed file without what writes outside the drill's directories: W&B, Comet and CSV files."""
    content = without_trackers(load_deepspeed_file(settings.deepspeed))
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({**content, "csv_monitor": {"enabled": False}}), encoding="utf-8")
    return file


def _check_room(drill: Settings, users: Settings) -> None:
    """
    Raises:
        UserError: the disk would run short, which is the one thing that must not happen for real.
    """
    free = shutil.disk_usage(drill.checkpoint.dir).free
    needed = _CHECKPOINTS * checkpoint_bytes(drill) + int(users.checkpoint.min_free_gb * 1e9)
    if free < needed:
        raise UserError(
            f"{users.checkpoint.dir} has {free / 1e9:.1f} GB free; the drill needs {needed / 1e9:.1f} GB for a while:"
            " make room, leave out --whole, or set checkpoint.dir"
        )


def _record(plan: DrillPlan, settings: Settings) -> Record:
    versions = {"ds_gpt2": __version__, "torch": version("torch"), "deepspeed": version("deepspeed")}
    return Record(
        run=plan.settings.run.name,
        ranks=plan.place.ranks,
        accelerator=plan.place.accelerator,
        whole=plan.whole,
        seed=plan.seed,
        begun=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=sys.argv[1:],
        machine={"cores": str(host.usable_cores()), "python": platform.python_version(), **versions},
        settings=settings.model_dump(mode="json"),
    )
