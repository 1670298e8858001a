"""Fixtures that many tests share: a small dataset of real text, log messages, and a run on real ranks."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from launched import Launched, launch
from small_run import MODEL, SEQUENCE, hellaswag_item

from ds_gpt2.data.prepare.holdout import EveryPiece
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import Listed, Source, python_documents

pytest_plugins = ["alert_service"]

# A slow machine must not fail a property.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
# Shells start background jobs with SIGINT ignored, and child processes inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; commands then wrap their output
_HANDLERS = {
    number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
}


# The first use of one of these fixtures starts real ranks.
_RANK_FIXTURES = {
    "by_deepspeed",
    "drilled",
    "four_ranks",
    "planned",
    "resumed",
    "seen",
    "trained",
    "trained_run",
}
_EXTENDED_FIXTURES = {"drilled"}  # some of these take minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & _RANK_FIXTURES:
            item.add_marker("ranks")
        if fixtures & _EXTENDED_FIXTURES:
            item.add_marker("extended")
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="requires a CUDA device"))
    files = Counter(item.path for item in items if "ranks" in item.keywords)
    items.sort(key=lambda item: -files[item.path])  # long files first, so that all workers end at the same time


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Give whole files to workers, and all files that use the run on four ranks to one: each worker would train it."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):  # type: ignore[misc]  # pytest-xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "four_ranks" if _uses_four_ranks(config.rootpath / file) else file

    return ByFile(config, log)


@functools.cache
def _uses_four_ranks(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return "four_ranks" in text or "exported" in text  # a fixture that needs the other


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Undo changes of the environment: a rank that runs in this process sets RANK, WORLD_SIZE and others."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _usual_signals() -> Iterator[None]:
    """Restore the signal handlers: a supervisor that has run in this process ignores the signals afterwards."""
    _restore_handlers()
    yield
    _restore_handlers()


def _restore_handlers() -> None:
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    """Reset the logger of the package to its initial state: earlier tests may have configured it."""
    log = logging.getLogger("ds_gpt2")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: for small matrices on a busy machine, synchronization of threads takes most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def log_messages(_fresh_log: None) -> list[str]:
    """Collect the messages that the package logs at level INFO or above."""
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]  # of one object
    log = logging.getLogger("ds_gpt2")
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    return messages


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a dataset of about 150,000 tokens from the documentation of Python's standard library."""
    out = tmp_path_factory.mktemp("data") / "manual"
    source = Source("test", [Listed("manual", lambda: itertools.islice(python_documents(), 75))])
    prepare(source, out, Recipe(EveryPiece(20)), workers=1)
    return out


def _pages(first: int, last: int) -> Iterator[str]:
    return itertools.islice(python_documents(), first, last)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the datasets a, b and c of different pages and sizes; return the directory that has them."""
    folder = tmp_path_factory.mktemp("sources")
    for name, (first, last) in {"a": (0, 12), "b": (12, 18), "c": (18, 30)}.items():
        pages = functools.partial(_pages, first, last)
        prepare(
            Source(name, [Listed("manual", pages)]), folder / name, Recipe(EveryPiece(10)), workers=1, progress=False
        )
    return folder


@pytest.fixture(scope="session")
def write_config(dataset_dir: Path) -> Callable[..., Path]:
    """Return a function that writes the YAML settings of a small run; keyword arguments replace whole sections."""

    def write(folder: Path, **sections: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        settings: dict[str, object] = {
            "run": {"name": "test", "dir": str(folder / "runs"), "device": "cpu"},
            "model": {"layers": 2, "heads": 2, "width": 32},
            "data": {"dir": str(dataset_dir)},
            "batch": {"tokens_per_step": 16 * SEQUENCE, "micro_batch": 2, "sequence_length": SEQUENCE},
            "schedule": {"steps": 12, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 3e-4},
            "checkpoint": {"dir": str(folder / "checkpoints"), "every": 6},
            "validation": {"every": 6, "tokens": 40 * SEQUENCE},
            "samples": {"every": 6, "prompts": ["The statement"], "tokens": 8},
        }
        settings.update(sections)
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> tuple[Launched, Path]:
    """Train a run on four ranks with DeepSpeed's launcher; return its output and its folder."""
    folder = tmp_path_factory.mktemp("four ranks")  # paths with spaces must work
    items = folder / "items.jsonl"
    items.write_text("".join(json.dumps(hellaswag_item(number)) + "\n" for number in range(30)), encoding="utf-8")
    hellaswag = {"every": 6, "path": str(items)}
    config = write_config(folder, model=MODEL, histograms={"every": 6}, hellaswag=hellaswag)
    return launch(4, "--config", str(config)), folder
