"""Evaluations on items in a run of two ranks: the metrics are those of one rank, and a missing file costs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import launch

from benchmarks.evaluation_rows import rows_of
from ds_gpt2.data.prepare.evaluation_sets import PUBLISHED

NEVER = {"every": 0}
# So small that no bf16 weight changes: the weights are the same for any number of ranks.
SCHEDULE = {"steps": 2, "warmup_steps": 0, "max_lr": 1e-12, "min_lr": 0}


@pytest.mark.ranks
@pytest.mark.slow
def test_metrics_of_two_ranks_are_bitwise_those_of_one(
    tmp_path: Path, write_config: Callable[..., Path], dataset_dir: Path
) -> None:
    evaluations: dict[str, Any] = {"gone": {"every": 1, "path": str(tmp_path / "gone.jsonl")}}
    for name in ("arc_easy", "lambada", "winogrande"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(PUBLISHED[name].convert(row)) + "\n" for row in rows_of(name, 30)))
        evaluations[name] = {"every": 1, "path": str(path)}
    metrics = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        config = write_config(folder, schedule=SCHEDULE, samples=NEVER, evaluations=evaluations)
        done = launch(ranks, "--config", str(config))
        assert done.code == 0, done.output
        assert f"training continues without gone: {tmp_path / 'gone.jsonl'} cannot be read" in done.output
        lines = (folder / "runs" / "test" / "metrics.jsonl").read_text().splitlines()
        record = json.loads(lines[-1])
        metrics.append({tag: value for tag, value in record.items() if tag.startswith(("eval/", "val/"))})
    assert metrics[0] == metrics[1]
    expected = [f"eval/{name}/acc" for name in ("arc_easy", "lambada", "winogrande")]
    assert {*expected, "eval/lambada/perplexity", "eval/arc_easy/acc_norm", "val/bits_per_byte"} <= set(metrics[0])
