"""Mixture, schedule, averages and dropout at once: a run that is killed at random steps equals one that is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import launch

from ds_gpt2.checkpoint.catalog import newest_step, scan
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.drill import fault_injection
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences
from ds_gpt2.tools.drill.fault_injection import Fault

pytestmark = [pytest.mark.ranks, pytest.mark.extended]

STEPS, VALIDATE_EVERY = 24, 6
PARTS = ((4, 8), (2, 16), (4, STEPS))  # ranks, and the step after whose save their number changes
MICRO_BATCHES = {4: 2, 2: 4}  # of a rank in a step, by the number of ranks


@pytest.fixture
def configure(sources: Path, write_config: Callable[..., Path]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        mixture = [
            {"dir": str(sources / name), "weight": weight} for name, weight in zip("abc", (5, 3, 2), strict=True)
        ]
        stage = {"from_step": 11, "mixture": [{"dir": str(sources / name), "weight": 1} for name in "bc"]}
        return write_config(
            folder,
            data={"mixture": mixture, "stages": [stage]},
            model={"layers": 2, "heads": 2, "width": 32, "dropout": 0.2},
            schedule={"steps": STEPS, "warmup_steps": 3, "shape": "wsd", "decay_steps": 10, "decay_shape": "sqrt"},
            ema={"decay": 0.9},
            validation={"every": VALIDATE_EVERY, "tokens": 40 * 64},
            checkpoint={"dir": str(folder / "checkpoints"), "every": 4, "async": False},
        )

    return write


def _train(config: Path, ranks: int, *faults: Fault) -> None:
    """Train from the newest checkpoint to the end, or until a rank is killed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fault_injection.request(faults).items():
            patch.setenv(name, value)
        done = launch(ranks, "--config", str(config), "--resume", "auto", script=fault_injection.SCRIPT)
    assert (done.code != 0) == bool(faults), done.output
    assert done.left_over == []


def _random_kill(chosen: random.Random, first: int, last: int, ranks: int) -> Fault:
    """Return a fault that kills a rank in one of the steps from ``first`` to ``last``, or in their evaluation."""
    if chosen.random() < 0.5:
        step = next(step for step in range(first, last + 1) if step % VALIDATE_EVERY == 0)
        return Fault("kill", step, rank=chosen.randrange(ranks), evaluating=True)
    micro_batch = chosen.randrange(MICRO_BATCHES[ranks])
    return Fault("kill", chosen.randint(first, last), rank=chosen.randrange(ranks), micro_batch=micro_batch)


def test_a_run_killed_at_random_steps_equals_one_that_is_not(configure: Callable[[Path], Path], tmp_path: Path) -> None:
    """Both change from 4 to 2 and back to 4 ranks at the same steps: with dropout, losses depend on their number."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chosen, folders = random.Random(seed), (tmp_path / "undisturbed", tmp_path / "killed")
    for folder in folders:
        config, first = configure(folder), 1
        for ranks, last in PARTS:
            if folder == folders[1]:
                _train(config, ranks, _random_kill(chosen, first, last, ranks))
            end = [Fault("kill", last + 1)] if last < STEPS else []
            _train(config, ranks, *end)
            assert newest_step(folder / "checkpoints" / "test") == last, seed
            first = last + 1
    runs = [folder / "runs" / "test" for folder in folders]
    assert curve_differences(*runs) == [], seed
    found = [scan(folder / "checkpoints" / "test") for folder in folders]
    assert [each.tag for each in found[0]] == [each.tag for each in found[1]], seed
    for one, other in zip(*found, strict=True):
        assert checkpoint_differences(one.path, other.path) == [], (seed, one.tag)
    records = {record["step"]: record for record in read_metrics(runs[0] / METRICS)}
    assert json.dumps(records[STEPS]).count('"val/') >= 5  # the loss, its perplexity, that of the averages, each source
    assert records[14]["train/lr"] == records[10]["train/lr"] > records[16]["train/lr"] > records[STEPS]["train/lr"]
    assert records[10]["data/a/tokens"] == records[STEPS]["data/a/tokens"] > 0
