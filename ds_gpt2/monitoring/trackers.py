"""Experiment trackers: W&B and Comet, enabled in the DeepSpeed file.

They replace DeepSpeed's own monitors, which never finish a run and therefore lose its last rows, start another W&B run
at each resume, and send only every hundredth step to Comet. Each tracker has a separate process, see
``tracker_process``.
"""

from __future__ import annotations

import contextlib
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

from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import replace_file
from ds_gpt2.config.run_address import address_of, read_address
from ds_gpt2.monitoring import tracker_process
from ds_gpt2.monitoring.tracker_checks import read_blocks
from ds_gpt2.run_dir import stop_request

IDS = "trackers.json"  # in the run's directory: the run's ids at the trackers
_ADDRESS = "run"  # a key in it: the run that the ids belong to
FINISH_SECONDS = 30  # for all trackers together
_OPEN_SECONDS = 180.0  # W&B's library gives up after about 70 s and then opens an offline run
_MAX_WAITING = 10_000  # flushes whose rows the process has not read yet

log = logging.getLogger(__name__)

Event = tuple[str, float, int]  # tag, value, step


class Tracker:
    """A run at an experiment tracker, on rank 0. Only ``wait_opened`` and ``wait_finished`` block."""

    def __init__(self, name: str, request: dict[str, Any], every: int = 1) -> None:
        """Start the process, which opens the run.

        Args:
            name: for messages.
            request: see ``tracker_process``.
            every: minimum number of steps between two values of a metric.
        """
        self.name = name
        self.location = ""  # after opening: where the data is on this machine, and how to upload it
        self._every = every
        self._logged: dict[str, int] = {}  # tag -> its newest step
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING)
        self._problem = ""
        self._process = subprocess.Popen(
            [sys.executable, tracker_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=stop_request.without_supervisor(os.environ),
            start_new_session=True,
        )
        for work in (self._send, self._receive):
            threading.Thread(target=work, name=f"{name} {work.__name__}", daemon=True).start()
        self._put({**request, "finish_seconds": FINISH_SECONDS})

    def wait_opened(self) -> None:
        """Wait until the tracker has opened its run.

        Raises:
            UserError: the tracker rejects its settings.
            OSError: it cannot be opened for another reason.
        """
        answer = self._answer(_OPEN_SECONDS)
        if answer is None or "error" in answer:
            text = answer["error"] if answer else f"no answer within {_OPEN_SECONDS:g} s"
            self._lines.put(None)
            raise (UserError if answer and answer["mistake"] else OSError)(text)
        self.location = answer["opened"]

    def write_events(self, events: Sequence[Event]) -> None:
        """Send scalars to the process.

        Raises:
            OSError: the process has ended or does not keep up.
        """
        rows: dict[int, dict[str, float]] = {}
        for tag, value, step in events:
            if step - self._logged.get(tag, step - self._every) >= self._every:
                self._logged[tag] = step
                rows.setdefault(step, {})[tag] = value
        if rows:
            self._put({"rows": rows})

    def start_finishing(self, failed: bool) -> None:
        """Have the process write the rest and end the run; it exits within ``FINISH_SECONDS``."""
        with contextlib.suppress(OSError):
            self._put({"failed": failed})
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)

    def wait_finished(self, seconds: float) -> str | None:
        """Return what went wrong; None if the run is finished."""
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
        """Write lines to the process, in a thread: the pipe may be full."""
        assert self._process.stdin is not None
        try:
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            self._process.stdin.close()
        except OSError:
            self._problem = "its process has ended"

    def _receive(self) -> None:
        """Read the answers of the process, in a thread, until it exits."""
        assert self._process.stdout is not None
        self._process.wait()  # it forks and exits immediately; this removes the zombie
        for line in self._process.stdout:
            answer = safe_json.parse_object(line)
            if answer is None:  # printed by a library in the process
                continue
            if "warning" in answer:
                log.warning(f"{self.name} {answer['warning']}")
            else:
                self._answers.put(answer)
        self._problem = "its process has ended"
        self._answers.put({"error": self._problem, "mistake": False})


def open_trackers(
    content: dict[str, Any], run_dir: Path, run_name: str, start_step: int, windows_per_step: int
) -> dict[str, Tracker]:
    """Open the enabled trackers, on rank 0. An unavailable service is logged and does not end the run.

    Args:
        content: of the DeepSpeed file.
        start_step: a resumed run keeps its ids; a run that starts at step 0, or a copy of a run, gets new ones.

    Returns:
        Trackers by the name of the DeepSpeed monitor that each replaces.

    Raises:
        UserError: a block is wrong, or a tracker rejects its settings and the run starts at step 0.
    """
    wandb, comet = read_blocks(content)
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
    """Finish all ``trackers`` in parallel, within ``seconds``; log those that could not be finished."""
    trackers = list(trackers)
    for tracker in trackers:
        tracker.start_finishing(failed)
    deadline = time.monotonic() + seconds
    for tracker in trackers:
        if (problem := tracker.wait_finished(max(0.0, deadline - time.monotonic()))) is not None:
            log.warning(f"{tracker.name}: {problem}; {tracker.location}")


class _Ids:
    """The ids of a run at its trackers, stored in a file so that a resume finds them."""

    def __init__(self, run_dir: Path, resumes: bool) -> None:
        self._file = run_dir / IDS
        self._address = address_of(run_dir)
        self._known: dict[str, Any] = {_ADDRESS: self._address.to_dict()}
        self._written: dict[str, Any] = {}
        if resumes:
            self._read()

    def of(self, tracker: str) -> str:
        """Return the run's id at ``tracker``, or a new one."""
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
            log.warning(f"this run is a copy of {address}: its trackers start a new run")
            return
        self._written = written
        self._known = {**written, **self._known}
