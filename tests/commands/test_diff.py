"""``diff``, with runs of known metrics."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_gpt2.cli import main
from ds_gpt2.common.formatting import MISSING
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.fork_record import Fork, write_fork

Made = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path, write_config: Callable[..., Path]) -> Made:
    """Return a function that writes a run with loss 10 - log10(tokens) + ``above``, validated every tenth step."""

    def made(name: str, steps: int, tokens_per_step: int, above: float, **sections: Any) -> str:
        batch = {"tokens_per_step": tokens_per_step, "micro_batch": 1, "sequence_length": 64}
        config = write_config(tmp_path / name, batch=batch, run={"name": name, "dir": str(tmp_path)}, **sections)
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        shutil.copy(config, run_dir / "config.yaml")
        with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as file:
            for step in range(1, steps + 1):
                loss = 10 - math.log10(step * tokens_per_step) + above
                record = {"step": step, "time": float(step), "train/loss": loss, "perf/tokens_per_s": 5000.0}
                record |= {"val/loss": loss + 1} if step % 10 == 0 else {}
                file.write(json.dumps(record) + "\n")
        return str(run_dir)

    return made


def test_losses_are_compared_at_equal_tokens_not_steps(make: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run has twice the tokens per step, and a loss higher by 0.25 at the same tokens."""
    one, other = make("one", 400, 640, 0.0), make("other", 400, 1280, 0.25)
    assert main(["diff", one, other, "--json"]) == exit_codes.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["one", "other"]
    assert found["settings"] == {"batch.tokens_per_step": [640, 1280]}
    interval = 10 * 1280  # tokens between validations of the second run; the first has one there too
    points = [each["tokens"] for each in found["losses"]]
    assert len(points) == 8 and points[-1] == 256_000 and all(point % interval == 0 for point in points)
    for each in found["losses"]:
        assert each["validation"]["a"] == 11 - math.log10(each["tokens"])
        assert each["validation"]["b"] == 11.25 - math.log10(each["tokens"])
    last = found["losses"][-1]
    assert last["training"]["b"] - last["training"]["a"] == pytest.approx(0.25, abs=0.06)
    assert found["final_metrics"] == found["ends"]
    assert found["ends"]["steps"] == {"a": 400, "b": 400}
    assert found["ends"]["val/loss, lowest"]["b"] == pytest.approx(11.25 - math.log10(512_000))


def test_the_output_has_tables(make: Made, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = {"steps": 400, "warmup_steps": 3, "max_lr": 1e-3, "min_lr": 1e-4}
    one, other = make("one", 400, 640, 0.0), make("other", 100, 640, -0.5, schedule=schedule)
    assert main(["diff", one, other]) == exit_codes.DONE
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "schedule.max_lr 0.003 0.001" in lines
    assert "tokens train one train other train difference val one val other val difference" in lines
    (row,) = [line.split() for line in lines if line.startswith("64,000")]
    assert row[-3:] == [f"{11 - math.log10(64_000):.4f}", f"{10.5 - math.log10(64_000):.4f}", "-0.5000"]
    assert "steps 400 100 -300" in lines
    assert "perf/tokens_per_s, median of last 50 steps 5,000 5,000 +0" in lines


def test_a_validation_loss_is_shown_only_at_measured_points(make: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The first is validated every 6,400 tokens, the second every 7,040: never at the same point."""
    one, other = make("one", 100, 640, 0.0), make("other", 90, 704, 0.0)
    main(["diff", one, other, "--json"])
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert [each["tokens"] for each in losses] == [63_360 * number // 8 for number in range(1, 9)]
    measured = {side: {each["tokens"] for each in losses if each["validation"][side]} for side in "ab"}
    assert measured == {"a": set(), "b": {63_360}}
    assert all(each["training"][side] for each in losses for side in "ab")


def test_equal_settings_are_reported(make: Made, capsys: pytest.CaptureFixture[str]) -> None:
    main(["diff", make("one", 5, 640, 0.0), make("other", 0, 640, 0.0)])
    printed = capsys.readouterr().out
    assert printed.startswith("all settings are the same\n")
    assert "losses at equal tokens" not in printed, "the second run has no losses yet"
    (loss,) = [line for line in printed.splitlines() if line.startswith("  train/loss,")]
    assert loss.split()[-2:] == [MISSING, MISSING]


def test_an_unknown_run_is_an_error(make: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", make("one", 5, 640, 0.0), "unknown"]) == exit_codes.MISTAKE
    assert "no run unknown" in capsys.readouterr().err


def test_training_losses_that_are_not_finite_are_counted(make: Made, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = make("good", 20, 64, 0.0), make("bad", 20, 64, 0.0)
    with (Path(bad) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 21, "time": 21.0, "train/loss": None}) + "\n")
    assert main(["diff", good, bad]) == exit_codes.DONE
    (row,) = [row for row in capsys.readouterr().out.splitlines() if "training losses that are not finite" in row]
    assert row.split()[-3:] == ["0", "1", "+1"]
    assert main(["diff", good, good]) == exit_codes.DONE
    assert "not finite" not in capsys.readouterr().out


def test_equal_and_whole_values_have_all_decimals(make: Made, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make("one", 10, 100, 0.3), make("other", 10, 100, 0.1 + 0.2)
    for name, loss in ((one, 3.0), (other, 2.5)):
        with (Path(name) / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 11, "time": 11.0, "hellaswag/acc": loss}) + "\n")
    assert main(["diff", one, other]) == exit_codes.DONE
    rows = {row.split()[0]: row.split()[-1] for row in capsys.readouterr().out.splitlines() if row.strip()}
    assert rows["val/loss"] == "+0.0000"
    assert rows["hellaswag/acc"] == "-0.5000"
    assert main(["diff", other, one]) == exit_codes.DONE
    assert "-0.0000" not in capsys.readouterr().out


def test_a_fork_is_compared_with_its_parent_at_common_steps_only(
    make: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses are equal at equal steps: so are the medians, although the parent has earlier steps as well."""
    parent, fork = make("parent", 60, 640, 0.0), make("fork", 60, 640, 0.0)
    metrics = Path(fork) / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[40:]))
    write_fork(Path(fork), Fork("parent", parent, "rolling_step_000040", 40, ""))
    assert main(["diff", parent, fork, "--json"]) == exit_codes.DONE
    found = json.loads(capsys.readouterr().out)
    assert [each["tokens"] for each in found["losses"]] == [50 * 640, 60 * 640]
    pairs = [each["training"] for each in found["losses"]] + [found["final_metrics"]["train/loss"]]
    assert all(pair["a"] == pair["b"] is not None for pair in pairs)
    assert found["forked_from"][0] is None and found["forked_from"][1]["step"] == 40
    assert main(["diff", parent, fork]) == exit_codes.DONE
    assert capsys.readouterr().out.startswith("fork is forked from parent at step 40\n")
    metrics.write_text(metrics.read_text().replace("val/loss", "val/other"))
    assert main(["diff", parent, fork, "--json"]) == exit_codes.DONE
    found = json.loads(capsys.readouterr().out)
    assert [each["tokens"] for each in found["losses"]] == [40 * 640 + part * 1600 for part in range(1, 9)]
