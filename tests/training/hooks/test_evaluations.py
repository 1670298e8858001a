"""Evaluations during training: metrics, the same for any number of ranks; failures do not cost the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.evaluation_rows import rows_of
from ds_gpt2.config.settings import EvaluationSettings
from ds_gpt2.data.evaluation_files import load_items, measures_of
from ds_gpt2.data.prepare.evaluation_sets import PUBLISHED
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.rng_state import get_rng_state
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation import row_batches, tasks
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.training.hooks.evaluations import TaskEvaluation, open_evaluations
from ds_gpt2.training.hooks.hook import HookFailedError, Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = 20
OWN = [{"context": f"{number} is", "endings": ["even", "an odd number"], "label": number % 2} for number in range(9)]


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(ModelShape(layers=2, heads=2, width=32, sequence_length=128), dropout=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model.to(torch.bfloat16).train()


def write(folder: Path, name: str, **settings: Any) -> dict[str, EvaluationSettings]:
    path = folder / f"{name}.jsonl"
    lines = map(PUBLISHED[name].convert, rows_of(name, ITEMS)) if name in PUBLISHED else OWN
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {name: EvaluationSettings.model_validate({"every": 10, "path": path, **settings})}


def opened(folder: Path, name: str, model: GPT2, **settings: Any) -> TaskEvaluation:
    (hook,) = open_evaluations(write(folder, name, **settings), model, folder / "run")
    return hook


def observe(hook: TaskEvaluation, model: GPT2) -> dict[str, Any]:
    engine: Any = SimpleNamespace(model=model, device=torch.device("cpu"))  # the attributes that the hook uses
    return hook.observe(engine, TrainState(step=10))


@pytest.mark.parametrize("name", ["arc_easy", "winogrande", "lambada", "mine"])
def test_the_hook_reports_the_measures_and_changes_nothing(
    name: str, tmp_path: Path, model: GPT2, caplog: pytest.LogCaptureFixture
) -> None:
    hook = opened(tmp_path, name, model)
    assert hook.every.due(20, 25) and not hook.every.due(21, 25)
    before = get_rng_state()
    with caplog.at_level(logging.INFO, "ds_gpt2"):
        seen = observe(hook, model)
    assert repr(get_rng_state()) == repr(before) and model.training
    measures, items = measures_of(name), load_items(tmp_path / f"{name}.jsonl", name)
    model.eval()
    expected = tasks.estimates(tasks.results(model, items, measures, lambda done: None), measures)
    model.train()
    assert list(seen) == [f"eval/{name}/{measure}{end}" for measure in measures for end in ("", "_stderr")]
    for measure, estimate in expected.items():
        assert seen[f"eval/{name}/{measure}"] == estimate.value
        assert seen[f"eval/{name}/{measure}_stderr"] == estimate.stderr
    assert caplog.messages[-1].startswith(f"step 10: {name} acc {seen[f'eval/{name}/acc']:.4f}")


@pytest.mark.parametrize("name", ["arc_easy", "lambada"])
def test_metrics_are_bitwise_equal_for_any_number_of_ranks(
    name: str, tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(row_batches._BATCH_TOKENS, "cpu", 150)  # several batches
    settings = write(tmp_path, name)
    (alone,) = open_evaluations(settings, model, tmp_path)
    expected = observe(alone, model)
    for ranks in (2, 3):
        tables = []
        monkeypatch.setattr(collectives, "world_size", lambda ranks=ranks: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
            hook = TaskEvaluation(name, settings[name], load_items(settings[name].path, name), model)
            engine: Any = SimpleNamespace(model=model, device=torch.device("cpu"))
            tables.append(hook._results(engine))
        monkeypatch.setattr(collectives, "sum_over_ranks", lambda table, tables=tables: sum(tables))
        monkeypatch.setattr(collectives, "world_size", lambda: 1)
        monkeypatch.setattr(collectives, "rank", lambda: 0)
        assert all(table[0].any() or table[1].any() for table in tables)
        assert observe(alone, model) == expected


def test_only_the_first_items_are_scored(tmp_path: Path, model: GPT2, caplog: pytest.LogCaptureFixture) -> None:
    hook = opened(tmp_path, "piqa", model, items=7)
    with caplog.at_level(logging.INFO, "ds_gpt2"):
        accuracy = observe(hook, model)["eval/piqa/acc"]
    assert "(7 items, " in caplog.text and round(accuracy * 7, 9).is_integer()


def test_an_evaluation_that_is_off_is_not_opened(tmp_path: Path, model: GPT2) -> None:
    assert open_evaluations(write(tmp_path, "mine", every=0), model, tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file"),
        ("", "has no items"),
        ('{"context": 3}\n', 'line 1: no text in "context"'),
    ],
)
def test_a_file_without_valid_items_is_omitted_with_one_warning(
    tmp_path: Path, model: GPT2, caplog: pytest.LogCaptureFixture, content: str | None, message: str
) -> None:
    settings = write(tmp_path, "mine") | write(tmp_path, "copa")
    path = settings["mine"].path
    path.unlink() if content is None else path.write_text(content)
    assert len(open_evaluations(settings, model, tmp_path)) == 1
    (line,) = caplog.messages
    assert line.startswith(f"training continues without mine: {path}") and message in line


@pytest.mark.parametrize("error", [RuntimeError, OSError, MemoryError, torch.OutOfMemoryError])
def test_a_failure_of_a_rank_is_reported(
    error: type[Exception], tmp_path: Path, model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = opened(tmp_path, "mine", model)

    def fail(*_: object) -> None:
        raise error("no memory.\nTried to allocate")

    monkeypatch.setattr(tasks, "batch_results", fail)
    with pytest.raises(HookFailedError, match=r"^rank 0: no memory\. Tried to allocate$"):
        observe(hook, model)
    assert model.training


def test_a_stop_interrupts_the_evaluation(tmp_path: Path, model: GPT2) -> None:
    hook = opened(tmp_path, "mine", model)

    def stop() -> None:
        raise Interrupted

    hook.progress = stop
    with pytest.raises(Interrupted):
        observe(hook, model)
    assert model.training
