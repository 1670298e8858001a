"""Experiment trackers: W&B and Comet, switched on in the DeepSpeed file.

They are opened here and not by DeepSpeed's own monitors. Those never finish a run, which loses its last rows, start
another W&B run at each resume, and give Comet only every hundredth step. Each tracker has a process of its own, see
``tracker_process``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import replace_file
from ds_gpt2.config.run_address import address_of, read_address
from ds_gpt2.monitoring import tracker_process

IDS = "trackers.json"  # in the run's directory: the ids under which the trackers know the run
_ADDRESS = "run"  # there: which run they belong to
FINISH_SECONDS = 30  # for all trackers together
_OPEN_SECONDS = 180.0  # W&B's library gives up after some 70 s, and then has to open an offline run
_CHECK_SECONDS = 60.0
_MOST_WAITING = 10_000  # flushes whose rows the process has not taken yet

log = logging.getLogger(__name__)

Event = tuple[str, float, int]  # tag, value, step


class Tracker:
    """A run at an experiment tracker, on rank 0. No method but ``wait_opened`` and ``wait_finished`` waits."""

    def __init__(self, name: str, request: dict[str, Any], every: int = 1) -> None:
        """Start the process and let it open the run.

        Args:
            name: for people.
            request: see ``tracker_process``.
            every: steps that lie at least between two values of a metric.
        """
        self.name = name
        self.location = ""  # once opened: where its data is on this machine, and how to upload it
        self._every = every
        self._logged: dict[str, int] = {}  # tag -> its newest step
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._problem = ""
        self._process = subprocess.Popen(
            [sys.executable, tracker_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        for work in (self._send, self._receive):
            threading.Thread(target=work, name=f"{name} {work.__name__}", daemon=True).start()
        self._put({**request, "finish_seconds": FINISH_SECONDS})

    def wait_opened(self) -> None:
        """
        Raises:
            UserError: the tracker refuses how it is set up.
            OSError: it cannot be opened for another reason.
        """
        answer = self._answer(_OPEN_SECONDS)
        if answer is None or "error" in answer:
            text = answer["error"] if answer else f"no answer within {_OPEN_SECONDS:g} s"
            self._lines.put(None)
            raise (UserError if answer and answer["mistake"] else OSError)(text)
        self.location = answer["opened"]

    def write_events(self, events: Sequence[Event]) -> None:
        """Hand over scalars.

        Raises:
            OSError: the process has ended, or does not keep up.
        """
        rows: dict[int, dict[str, float]] = {}
        for tag, value, step in events:
            if step - self._logged.get(tag, step - self._every) >= self._every:
                self._logged[tag] = step
                rows.setdefault(step, {})[tag] = value
        if rows:
            self._put({"rows": rows})

    def begin_to_finish(self, failed: bool) -> None:
        """Let it write the rest and end the run; the process ends after ``FINISH_SECONDS`` at the latest."""
        with contextlib.suppress(OSError):
            self._put({"failed": failed})
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)

    def wait_finished(self, seconds: float) -> str | None:
        """What went wrong; None if the run is finished."""
        answer = self._answer(seconds)
        if answer is None:
            return "did not finish in time"
        return None if "finished" in answer else str(answer["error"])

    def _put(self, message: dict[str, Any]) -> None:
        if self._problem:
            raise OSError(self._problem)
        try:
            self._lines.put_nowait(json.dumps(message))
        except queue.Full:
            raise OSError("it does not keep up") from None

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        try:
            return self._answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def _send(self) -> None:
        """In a thread: a pipe may be full."""
        assert self._process.stdin is not None
        try:
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            self._process.stdin.close()
        except OSError:
            self._problem = "its process has ended"

    def _receive(self) -> None:
        """In a thread: what the process answers, until it ends."""
        assert self._process.stdout is not None
        self._process.wait()  # it has left a child that goes on: no zombie stays
        for line in self._process.stdout:
            try:
                answer = safe_json.parse(line)
            except ValueError:  # a library of the process has printed it
                continue
            if "warning" in answer:
                log.warning(f"{self.name} {answer['warning']}")
            else:
                self._answers.put(answer)
        self._problem = "its process has ended"
        self._answers.put({"error": self._problem, "mistake": False})


class WandbBlock(BaseModel):
    """``wandb`` in the DeepSpeed file, with DeepSpeed's defaults."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CometBlock(BaseModel):
    """``comet`` in the DeepSpeed file, with DeepSpeed's defaults, but for the interval: every step."""

    enabled: bool = False
    samples_log_interval: int = 1
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None


def check(content: dict[str, Any]) -> None:
    """Check that the trackers that are switched on can be used; nothing is started and nothing is sent.

    Takes no time if none is, and some seconds otherwise: the packages are loaded in a child process.

    Args:
        content: of the DeepSpeed file.

    Raises:
        UserError: a block is wrong, a package is missing or broken, or there is no API key.
    """
    check_packages(content)
    wandb, comet = _read(content)
    if wandb.enabled:
        _ask("wandb", _WANDB_LOGIN, {}, "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
    if comet.enabled:
        fix = 'set COMET_API_KEY, or "online": false in the comet block'
        _ask("comet", _COMET_KEY, comet.model_dump(include={"api_key", "online"}), fix)


def check_packages(content: dict[str, Any]) -> None:
    """Check only that the packages are installed, which takes milliseconds.

    Raises:
        UserError: a block is wrong or a package is missing.
    """
    wandb, comet = _read(content)
    if wandb.enabled:
        _check_package("wandb", "wandb")
    if comet.enabled:
        _check_package("comet", "comet_ml")


def open_trackers(
    content: dict[str, Any], run_dir: Path, run_name: str, start_step: int, windows_per_step: int
) -> dict[str, Tracker]:
    """Open the trackers that are switched on, on rank 0. A service that is away is logged, and costs no run.

    Args:
        content: of the DeepSpeed file.
        start_step: a run that resumes keeps its ids; one that starts at step 0 gets new ones, and so does a copy.

    Returns:
        By the name of the DeepSpeed monitor that it replaces.

    Raises:
        UserError: a block is wrong, or a tracker refuses how it is set up and the run starts at step 0.
    """
    wandb, comet = _read(content)
    ids = _Ids(run_dir, resumes=start_step > 0)
    started = {}
    if wandb.enabled:
        arguments: dict[str, Any] = {"project": wandb.project, "group": wandb.group, "entity": wandb.team}
        request = {"tracker": "wandb", "id": ids.of("wandb"), "name": run_name, "arguments": arguments}
        request["directory"] = str(run_dir)
        started["wandb_monitor"] = Tracker("W&B", request)
    if comet.enabled:
        arguments = comet.model_dump(exclude={"enabled", "samples_log_interval", "experiment_name"})
        name = comet.experiment_name or os.environ.get("COMET_EXPERIMENT_NAME") or run_name
        request = {"tracker": "comet", "id": ids.of("comet"), "name": name, "arguments": arguments}
        request["directory"] = str(run_dir / "comet")
        every = max(1, -(-comet.samples_log_interval // windows_per_step))
        started["comet_monitor"] = Tracker("Comet", request, every)
    try:
        return {name: tracker for name, tracker in started.items() if _is_open(tracker, fatal=start_step == 0)}
    except UserError:
        finish(started.values(), failed=True)
        raise


def _is_open(tracker: Tracker, fatal: bool) -> bool:
    try:
        tracker.wait_opened()
    except (UserError, OSError) as error:
        text = f"{tracker.name} cannot be opened: {error}"
        if fatal and isinstance(error, UserError):
            raise UserError(f"{text}; fix it, or disable it in the DeepSpeed file") from None
        log.warning(f"{text}; training continues without it")
        return False
    return True


def finish(trackers: Iterable[Tracker], failed: bool, seconds: float = FINISH_SECONDS + 5) -> None:
    """Finish all ``trackers`` at once, in ``seconds`` at most. What could not be finished is logged."""
    trackers = list(trackers)
    for tracker in trackers:
        tracker.begin_to_finish(failed)
    deadline = time.monotonic() + seconds
    for tracker in trackers:
        if (problem := tracker.wait_finished(max(0.0, deadline - time.monotonic()))) is not None:
            log.warning(f"{tracker.name}: {problem}; {tracker.location}")


class _Ids:
    """The ids of a run at its trackers, kept in a file over resumes."""

    def __init__(self, run_dir: Path, resumes: bool) -> None:
        self._file = run_dir / IDS
        self._address = address_of(run_dir)
        self._known: dict[str, Any] = {_ADDRESS: self._address.to_dict()}
        self._written: dict[str, Any] = {}
        if resumes:
            self._read()

    def of(self, tracker: str) -> str:
        """The id the run has there, or a new one."""
        known = self._known.setdefault(tracker, uuid.uuid4().hex)
        if self._known != self._written:
            self._written = dict(self._known)
            try:
                replace_file(self._file, json.dumps(self._known))
            except OSError as error:
                log.warning(f"{self._file} cannot be written ({error}): a resume starts another run at {tracker}")
        return str(known)

    def _read(self) -> None:
        try:
            written = safe_json.read(self._file)
            address = read_address(written.get(_ADDRESS))
        except (OSError, ValueError, AttributeError):
            return
        if address is not None and not address.is_of(self._file.parent) and address.is_in_use():
            log.warning(f"this is a copy of {address}: it is another run at its trackers")
            return
        self._written = written
        self._known = {**written, **self._known}


def _read(content: dict[str, Any]) -> tuple[WandbBlock, CometBlock]:
    try:
        return WandbBlock.model_validate(content.get("wandb", {})), CometBlock.model_validate(content.get("comet", {}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([error.title.removesuffix("Block").lower(), *map(str, first["loc"])])
        raise UserError(f"DeepSpeed file: {place}: {first['msg']}") from None


def _check_package(block: str, package: str) -> None:
    """A directory of that name, such as the one that W&B writes into, is not the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        install = f"{sys.executable} -m pip install {package}"
        raise UserError(f'the DeepSpeed file enables "{block}", but {package} is not installed: {install}')


def _ask(block: str, program: str, request: dict[str, Any], fix: str) -> None:
    """Run ``program`` in a child process; what it prints before an exit code of 2 or 3 is a mistake of the user's.

    Args:
        fix: what to do after an exit code of 2; after 3 what it prints says that itself.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_CHECK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning(f"{block} could not be checked: {_one_line(error)}")
        return
    if child.returncode in (2, 3):
        hint = f": {fix}" if child.returncode == 2 else ""
        raise UserError(f'the DeepSpeed file enables "{block}", but {_last_line(child.stdout)}{hint}')


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it cannot be used"])[-1]


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


# The messages that W&B prints for a key that is missing or malformed do not contain it. A service that is away is no
# mistake. W&B reads its settings from the environment: each is named WANDB_ and its name in capitals.
_WANDB_LOGIN = """
import os, re, sys

def refuse_setting(name, reason):
    variable = "WANDB_" + name.upper()
    given = "" if re.search("key|token|secret|password", name) else "=" + os.environ.get(variable, "")
    what = f"the environment variable {variable}{given}" if variable in os.environ else f"W&B's setting {name}"
    print(f"{what} is not valid ({' '.join(reason.split())[:200]}): correct it or remove it")
    sys.exit(3)

try:
    import wandb
    from pydantic import ValidationError
    wandb.login(verify=True)
except ImportError as error:
    print(f"wandb cannot be imported ({error})")
    sys.exit(2)
except ValidationError as error:
    first = error.errors()[0]
    refuse_setting(str((*first["loc"], "?")[0]), first["msg"])
except (wandb.errors.UsageError, ValueError) as error:
    for name in ("run_id", "project", "entity"):
        if name.replace("_", " ") in str(error).lower() and "API key" not in str(error):
            refuse_setting(name, str(error))
    print("W&B has no valid API key")
    sys.exit(2)
except wandb.errors.AuthenticationError as error:
    if re.search(r"invalid|error 40[13]", str(error)):
        print("W&B refuses the API key")
        sys.exit(2)
"""
_COMET_KEY = """
import json, sys
request = json.load(sys.stdin)
try:
    import comet_ml
    from comet_ml.config import get_config
except ImportError as error:
    print(f"comet_ml cannot be imported ({error})")
    sys.exit(2)
config = get_config()
try:
    online = request["online"] if request["online"] is not None else config["comet.start.online"]
except Exception:  # the library's own
    print("COMET_START_ONLINE, or online in ~/.comet.config, is not valid: set it to true or false")
    sys.exit(3)
if online is not False and not (request["api_key"] or config["comet.api_key"]):
    print("Comet has no API key")
    sys.exit(2)
"""
