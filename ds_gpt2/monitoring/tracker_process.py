"""The process that sends a run's metrics to W&B or Comet, and finishes the run there, however the rank ends.

A rank ends by ``os._exit``, by an error, or by SIGKILL: the libraries would lose their last rows, and W&B's own service
process dies with the rank that started it. This process leaves the rank's session and process tree, reads lines of
JSON from stdin, and finishes the run when stdin ends. It imports nothing of the project and not torch.

Lines in: the request, then ``{"rows": {step: {tag: value}}}``, finally ``{"failed": bool}``.
Lines out: ``{"opened": text}`` or ``{"error": text, "mistake": bool}``; ``{"warning": text}``; ``{"finished": true}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, Protocol

_COMET_DIRECTORY = ".cometml-runs"  # Comet's default, in the working directory
_INIT_SECONDS = 60.0  # time limit for W&B's server to answer


class TrackerRun(Protocol):
    """A run at one tracker."""

    def log(self, step: int, row: Mapping[str, float]) -> None: ...

    def finish(self, failed: bool) -> None: ...

    def location(self) -> str:
        """Return where the data is on this machine, and how to upload it."""


class WandbRun:
    """A W&B run. x is the metric ``step``; W&B's own ``_step`` is the same until a resume repeats steps.

    W&B ignores rows whose ``_step`` is not above the newest one: after a resume ``_step`` increases by one per row
    until the steps have caught up.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        import wandb

        arguments = dict(request["arguments"])
        if "WANDB_RUN_ID" not in os.environ:
            arguments |= {"id": request["id"], "resume": "allow"}
        if "WANDB_NAME" not in os.environ:
            arguments["name"] = request["name"]
        if "WANDB_DIR" not in os.environ:
            arguments["dir"] = request["directory"]
        try:
            self._run = wandb.init(**arguments, settings=wandb.Settings(init_timeout=_INIT_SECONDS))
        except wandb.errors.UsageError:
            raise
        except Exception as error:
            answer(warning=f"cannot be reached ({one_line(error)}); this start is recorded offline")
            wandb.teardown()  # its service process still holds the run's id
            self._run = wandb.init(**arguments, mode="offline")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._next_row = int(self._run.step)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        number = max(step, self._next_row)
        self._run.log({**row, "step": step}, step=number)
        self._next_row = number + 1

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def location(self) -> str:
        directory = self._run.settings.sync_dir
        return f"its rows are in {directory}; upload them with `wandb sync {directory}`"


class CometRun:
    """A Comet experiment. x is the step."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import comet_ml
        from comet_ml.config import get_config

        if get_config()["comet.offline_directory"] == _COMET_DIRECTORY:
            os.environ["COMET_OFFLINE_DIRECTORY"] = request["directory"]
        arguments = dict(request["arguments"])
        chosen = arguments["experiment_key"] or arguments["mode"] or os.environ.get("COMET_EXPERIMENT_KEY")
        if not chosen:
            arguments |= {"experiment_key": request["id"], "mode": "get_or_create"}
        try:
            self._experiment = comet_ml.start(**arguments)
            problem = "" if self._experiment.alive else "no connection, or the API key is rejected"
        except ValueError:  # no API key
            raise
        except Exception as error:
            problem = one_line(error)
        if problem:
            answer(warning=f"cannot be reached ({problem}); this start is recorded offline")
            self._experiment = comet_ml.start(**{**arguments, "online": False})
        self._experiment.set_name(request["name"])

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._experiment.log_metrics(dict(row), step=step)

    def finish(self, failed: bool) -> None:
        self._experiment.end()

    def location(self) -> str:
        return "metrics.jsonl has every value"


_KINDS: dict[str, type[WandbRun] | type[CometRun]] = {"wandb": WandbRun, "comet": CometRun}
_answers = sys.stdout
_secrets = [os.environ[name] for name in ("WANDB_API_KEY", "COMET_API_KEY") if os.environ.get(name)]


def main() -> None:
    """Serve one tracker until stdin ends."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of the libraries must not mix with the answers
    request = json.loads(sys.stdin.readline())
    _secrets.extend(filter(None, [request["arguments"].get("api_key")]))
    try:
        run: TrackerRun = _KINDS[request["tracker"]](request)
    except Exception as error:  # the libraries raise exceptions of many types
        mistake = isinstance(error, ImportError | ValueError) or type(error).__name__ == "UsageError"
        answer(error=one_line(error), mistake=mistake)
        return
    answer(opened=run.location())
    failed = _log_rows(run)
    signal.alarm(request["finish_seconds"])  # the default action ends this process
    try:
        run.finish(failed)
        answer(finished=True)
    except Exception as error:
        answer(error=one_line(error), mistake=False)


def _log_rows(run: TrackerRun) -> bool:
    """Log every row until stdin ends; return whether the run failed, as it has if it did not report its end."""
    has_warned = False
    for line in sys.stdin:
        with contextlib.suppress(ValueError):  # an incomplete line: the rank was killed
            message = json.loads(line)
            if "failed" in message:
                return bool(message["failed"])
            try:
                for step, row in message["rows"].items():
                    run.log(int(step), row)
            except Exception as error:
                if not has_warned:
                    answer(warning=f"rejects a row: {one_line(error)}; further failures are not logged")
                has_warned = True
    return True


def answer(**message: object) -> None:
    with contextlib.suppress(OSError):  # the rank has exited
        _answers.write(json.dumps(message) + "\n")
        _answers.flush()


def one_line(error: BaseException) -> str:
    """Return an exception as one line for the log, without API keys."""
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in _secrets:
        text = text.replace(secret, "***")
    return text[:300]


def _leave() -> None:
    """Leave the rank's process tree: DeepSpeed's launcher sends SIGTERM to all of it."""
    if os.fork():
        os._exit(0)


if __name__ == "__main__":
    del sys.path[0]  # this directory: the libraries' own imports must not find its names
    _leave()
    main()
