"""Run a drill: train the undisturbed run, play the scenes on a second run, and clean up."""

from __future__ import annotations

import contextlib
import json
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import yaml

from ds_gpt2 import __version__
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.checkpoint.space import reserved_bytes
from ds_gpt2.common import files, host
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import size
from ds_gpt2.config.deepspeed_config import load_deepspeed_file, without_trackers
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import LostHostError
from ds_gpt2.tools.drill import shrink
from ds_gpt2.tools.drill.plan import CHANGING, EXACT, DrillPlan
from ds_gpt2.tools.drill.record import Record, SceneResult
from ds_gpt2.tools.drill.run_hosts import RunHosts
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess, end_all
from ds_gpt2.tools.drill.scenes.registry import FINISH, SCENES
from ds_gpt2.tools.drill.scenes.scene import NotDoneError, Scene, SceneContext
from ds_gpt2.tools.resources.requirements import checkpoint_bytes

_LEAST_STEPS = 8 * shrink.EVERY  # the guards need this many losses before they can detect a divergence
_TIMEOUT = {False: 300.0, True: 1200.0}  # seconds for a start, a stop, or a few steps; True: the whole model
_CHECKPOINTS = 14  # at most, of both runs together, on the disk at the same time


def run_drill(plan: DrillPlan, report: Callable[[SceneResult], None]) -> tuple[Record, Path]:
    """Run a drill; return its record, and the directory that contains it.

    Args:
        report: called with each result as soon as it is available.

    Raises:
        UserError: there is not enough disk space, or the undisturbed run fails.
    """
    start_time = time.time()
    exact = [SCENES[name] for name in EXACT if name in plan.names]
    changing = [SCENES[name] for name in CHANGING if name in plan.names]
    steps = max(_LEAST_STEPS, sum(scene.steps for scene in (*exact, FINISH)))
    folder = plan.settings.run_dir / "drill" / time.strftime("%Y-%m-%dT%H-%M-%S")
    checkpoints = plan.settings.checkpoint.dir / f".drill-{folder.name}"
    mark = str(checkpoints)
    hosts = RunHosts(plan.hosts, plan.settings.cluster.launch, folder)
    run_dirs = [folder / name for name in (shrink.UNDISTURBED, shrink.DISTURBED)]

    def end_processes() -> list[str]:
        return [*end_all(mark), *hosts.end_all(run_dirs)]

    with _cleaned_up(end_processes, checkpoints, plan.keep):
        folder.mkdir(parents=True)
        directories = (folder, checkpoints)
        undisturbed, disturbed = (
            _run_process(plan, name, steps, directories) for name in (shrink.UNDISTURBED, shrink.DISTURBED)
        )
        _check_space(disturbed.settings, plan.settings)
        record = _record(plan, disturbed.settings)

        def add(row: SceneResult) -> None:
            record.rows.append(row)
            record.seconds = round(time.time() - start_time, 1)
            record.write(folder)
            report(row)

        add(_train_undisturbed(undisturbed))
        context = SceneContext(disturbed, undisturbed, random.Random(plan.seed), folder)
        for scene in (*exact, FINISH, *changing):
            add(_play(scene, context))
            if record.rows[-1].verdict == "FAIL":
                end_processes()
        add(_check_no_process_left(end_processes))
    return record, folder


def _train_undisturbed(run: RunProcess) -> SceneResult:
    """Train the run without faults.

    Raises:
        UserError: it fails, so the drill would be meaningless.
    """
    start_time = time.time()
    run.start()
    try:
        run.wait_done()
    except FailedError as error:
        raise UserError(
            f"without faults, {error}: see {run.output}, fix the config, then run the drill again"
        ) from None
    if troubles := run.events(0, "crash", "hang", "rollback", "save_failed"):
        raise UserError(f"the run fails even without injected faults ({troubles[0].text}): see {run.output}")
    text = f"{run.settings.schedule.steps} steps without faults, in {time.time() - start_time:.0f} s"
    return SceneResult("undisturbed", "pass", text)


def _play(scene: Scene, context: SceneContext) -> SceneResult:
    try:
        recovery = scene.play(context)
    except NotDoneError as error:
        return SceneResult(scene.name, "not done", str(error))
    except (FailedError, DamagedError, LostHostError, UserError) as error:
        return SceneResult(scene.name, "FAIL", str(error))
    except Exception as error:  # the following scenes are still useful after any error
        return SceneResult(scene.name, "FAIL", f"{type(error).__name__}: {error}")
    return SceneResult(scene.name, "pass", recovery.text, recovery.lost_steps, round(recovery.lost_seconds, 1))


def _check_no_process_left(end_processes: Callable[[], list[str]]) -> SceneResult:
    if left := end_processes():
        return SceneResult("no_process_left", "FAIL", f"{len(left)} processes were left: {left[0]}")
    return SceneResult("no_process_left", "pass", "no process of the drill is left")


@contextlib.contextmanager
def _cleaned_up(end_processes: Callable[[], object], checkpoints: Path, keep: bool) -> Iterator[None]:
    """Kill the processes of the drill and remove its checkpoints when the block ends, also after signals."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        interrupt_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl+C must not stop the clean-up
        end_processes()
        if not keep:
            shutil.rmtree(checkpoints, ignore_errors=True)
        signal.signal(signal.SIGINT, interrupt_handler)
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_process(plan: DrillPlan, name: str, steps: int, directories: tuple[Path, Path]) -> RunProcess:
    """Prepare a run of the drill: write its config and check that its directories are writable.

    Args:
        directories: of the drill's files, and of its checkpoints; the latter also marks the processes.
    """
    folder, checkpoints = directories
    tree = shrink.tree_for(plan.settings, plan.layout.ranks, steps, plan.whole)
    tree["run"] |= {"name": name, "dir": str(folder)}
    tree["checkpoint"]["dir"] = str(checkpoints)
    if plan.hosts:
        tree["cluster"] |= {"hostfile": str(_hostfile(plan.hosts, folder)), "min_nodes": 1}
    tree["deepspeed"] = str(_deepspeed_file(plan.settings, folder))
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    settings = load_settings(config)
    for directory in settings.output_dirs:
        files.check_writable(directory)
    return RunProcess(
        config,
        settings,
        plan.layout,
        folder / f"{name}.log",
        mark=str(checkpoints),
        timeout=_TIMEOUT[plan.whole],
        hosts=RunHosts(plan.hosts, settings.cluster.launch, folder),
    )


def _hostfile(hosts: Sequence[Host], folder: Path) -> Path:
    """Write the hosts of the run, which may come from Slurm."""
    file = folder / "hosts"
    file.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")
    return file


def _deepspeed_file(settings: Settings, folder: Path) -> Path:
    """Write the user's DeepSpeed file without W&B, Comet and CSV files, which write outside the drill's directories."""
    content = without_trackers(load_deepspeed_file(settings.deepspeed))
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({**content, "csv_monitor": {"enabled": False}}), encoding="utf-8")
    return file


def _check_space(drill: Settings, user_settings: Settings) -> None:
    """Check that the disk has space for the drill; a really full disk could affect the user's own run.

    Raises:
        UserError: there is not enough space.
    """
    free = shutil.disk_usage(drill.checkpoint.dir).free
    needed = _CHECKPOINTS * checkpoint_bytes(drill) + reserved_bytes(user_settings.checkpoint)
    if free < needed:
        raise UserError(
            f"{user_settings.checkpoint.dir} has {size(free)} free; the drill temporarily needs {size(needed)}:"
            f" free some space, omit --whole, or set checkpoint.dir"
        )


def _record(plan: DrillPlan, settings: Settings) -> Record:
    versions = {"ds_gpt2": __version__, "torch": version("torch"), "deepspeed": version("deepspeed")}
    return Record(
        run=plan.settings.run.name,
        ranks=plan.layout.ranks,
        accelerator=plan.layout.accelerator,
        whole=plan.whole,
        seed=plan.seed,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=sys.argv[1:],
        machine={"cores": str(host.usable_cores()), "python": platform.python_version(), **versions},
        settings=settings.model_dump(mode="json"),
    )
