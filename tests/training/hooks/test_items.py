"""Items of evaluations: all ranks have the same ones, or the evaluation is omitted; items that are cut are logged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist
from torch.multiprocessing.spawn import spawn

from ds_gpt2.common.host import free_port
from ds_gpt2.config.settings import EvaluationSettings, HellaswagSettings
from ds_gpt2.distributed import collectives
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.training.hooks.evaluations import open_evaluations
from ds_gpt2.training.hooks.hellaswag import open_hellaswag

OWN = {"context": "Five is", "endings": ["even", "an odd number"], "label": 1}
HELLASWAG = {"activity_label": "A", "ctx": "a b", "ctx_a": "a b", "ctx_b": "", "endings": ["c", "d", "e", "f"]}


def model(sequence_length: int = 64) -> GPT2:
    return GPT2(ModelShape(layers=1, heads=1, width=16, sequence_length=sequence_length))


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"label": 0, **line}) + "\n" for line in lines), encoding="utf-8")
    return path


def open_on_rank(rank: int, port: int, folder: Path) -> None:
    """Open evaluations as one of two ranks, each with files of its own; write the names of those that are open."""
    monkeypatch = pytest.MonkeyPatch()
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    logging.getLogger("ds_gpt2").addHandler(logging.FileHandler(folder / f"log{rank}"))
    torch_dist.init_process_group("gloo", rank=rank, world_size=2)
    collectives.open_cpu_group()
    own = folder / str(rank)
    evaluations = {
        name: EvaluationSettings.model_validate({"every": 1, "path": own / f"{name}.jsonl"})
        for name in ("same", "longer", "other")
    }
    hooks = open_evaluations(evaluations, model(), own / "cache")
    items = [len(hook._items) for hook in hooks]
    opened = [
        open_hellaswag(HellaswagSettings(every=1, path=own / f"{name}.jsonl"), model(), own / "cache") is not None
        for name in ("hellaswag_same", "hellaswag_other")
    ]
    (folder / f"result{rank}").write_text(json.dumps([items, opened]))
    torch_dist.destroy_process_group()


@pytest.mark.ranks
def test_an_evaluation_whose_items_differ_between_ranks_is_omitted_on_all(tmp_path: Path) -> None:
    for rank in range(2):
        own = tmp_path / str(rank)
        write(own / "same.jsonl", OWN, OWN)
        write(own / "longer.jsonl", *[OWN] * (1 + rank))
        write(own / "other.jsonl", {**OWN, "label": rank})
        write(own / "hellaswag_same.jsonl", HELLASWAG)
        write(own / "hellaswag_other.jsonl", {**HELLASWAG, "label": rank})
    spawn(open_on_rank, (free_port(), tmp_path), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"result{rank}").read_text()) == [[2], [True, False]]
        warnings = (tmp_path / f"log{rank}").read_text().splitlines()
        starts = ("longer", "other", "HellaSwag")
        assert len(warnings) == 3
        for start, line in zip(starts, warnings, strict=True):
            assert (
                line.startswith(f"training continues without {start}: ") and "differs between rank 0 on host " in line
            )
        assert "(1 item, sha256 " in warnings[0] and "(2 items, sha256 " in warnings[0]


@pytest.mark.parametrize("limit", [None, 1])
def test_items_that_are_cut_are_logged(limit: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "mine.jsonl", OWN, {**OWN, "context": "a" + " a" * 20})
    settings = EvaluationSettings.model_validate({"every": 1, "path": path, "items": limit})
    with caplog.at_level(logging.INFO, "ds_gpt2"):
        open_evaluations({"mine": settings}, model(10), tmp_path)
    assert caplog.messages == ([] if limit else ["mine: 1 item longer than 10 tokens, cut at the start"])


def test_hellaswag_items_that_are_cut_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "items.jsonl", HELLASWAG, {**HELLASWAG, "ctx": "a" + " a" * 20})
    with caplog.at_level(logging.INFO, "ds_gpt2"):
        open_hellaswag(HellaswagSettings(every=1, path=path), model(10), tmp_path)
    assert caplog.messages == ["HellaSwag: 1 item longer than 10 tokens, cut at the start"]
