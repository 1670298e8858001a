"""Runs that keep a moving average of the weights: resumes, metrics, exports, means of checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_model import refused
from launched import Launched, Run, launch
from small_run import MODEL

from ds_gpt2.checkpoint.catalog import problem_of, scan
from ds_gpt2.checkpoint.manifest import Weights
from ds_gpt2.checkpoint.manifest import read as read_manifest
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.checkpoint.verify import deep_problem
from ds_gpt2.checkpoint.weights import EMA_FILE, fp32_weights
from ds_gpt2.cli import main
from ds_gpt2.pretrained.load import read
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.metrics import read_metrics
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences
from ds_gpt2.tools.plan.estimate import inputs_of
from ds_gpt2.tools.resources import requirements

STEPS, DECAY = 12, 0.9


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Run:
    """A run on two ranks that saves and validates every three steps; its best checkpoint has weights only."""
    folder = tmp_path_factory.mktemp("averaged")
    config = write_config(
        folder,
        model=MODEL,
        ema={"decay": DECAY},
        checkpoint={"dir": str(folder / "checkpoints"), "every": 3, "best_as": "weights"},
        validation={"every": 3, "tokens": 40 * 64},
        samples={"every": 0},
    )
    launched = launch(2, "--config", str(config))
    assert launched.code == 0, launched.output
    return launched, folder


@pytest.fixture(scope="module")
def resume_from(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Launched, Path]]:
    """Return a function that resumes a copy of a run as if it had been killed after a step."""

    def resume(step: int, ranks: int, *changes: str, run: Path = trained[1]) -> tuple[Launched, Path]:
        folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("resumed") / "copy"))
        for found in scan(folder / "checkpoints" / "test"):
            if found.step > step:
                shutil.rmtree(found.path)
        directories = [f"run.dir={folder / 'runs'}", f"checkpoint.dir={folder / 'checkpoints'}"]
        words = ["--config", str(folder / "run.yaml"), "--resume", "latest", *directories, *changes]
        launched = launch(ranks, *words)
        assert launched.code == 0, launched.output
        return launched, folder

    return resume


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / "test" / rolling_tag(step)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def curve(folder: Path, tag: str) -> dict[int, float]:
    records = read_metrics(folder / "runs" / "test" / "metrics.jsonl")
    return {record["step"]: record[tag] for record in records if tag in record}


def next_average(before: Path, after: Path) -> bool:
    """Return whether the average in ``after`` is that in ``before``, moved by one update."""
    old, new, masters = fp32_weights(before, "ema"), fp32_weights(after, "ema"), fp32_weights(after)
    expected = {name: DECAY * old[name].double() + (1 - DECAY) * masters[name].double() for name in masters}
    return all(float((new[name].double() - expected[name]).abs().max()) < 1e-7 for name in expected)


def test_the_averaged_weights_are_evaluated_whenever_validation_is_due(trained: Run) -> None:
    averaged, raw = curve(trained[1], "val/loss_ema"), curve(trained[1], "val/loss")
    assert list(averaged) == list(raw) == [3, 6, 9, 12]
    assert all(math.isfinite(loss) for loss in averaged.values())
    assert averaged[12] > raw[12], "the average lags behind while the loss falls quickly"
    best = min(raw, key=lambda step: raw[step])
    assert read_manifest(trained[1] / "checkpoints" / "test" / "best_model").step == best


def test_a_resume_continues_bitwise(trained: Run, resume_from: Callable[..., tuple[Launched, Path]]) -> None:
    launched, folder = resume_from(6, 2)
    assert "the moving average of the weights continues from rolling_step_000006 (ema.decay 0.9)" in launched.output
    assert checkpoint_differences(checkpoint(trained[1], 12), checkpoint(folder, 12)) == []
    assert curve_differences(trained[1] / "runs" / "test", folder / "runs" / "test") == []


def test_the_average_survives_other_numbers_of_ranks(
    trained: Run, resume_from: Callable[..., tuple[Launched, Path]]
) -> None:
    one_step = ("checkpoint.every=1", "validation.every=1")
    launched, alone = resume_from(6, 1, "schedule.steps=7", *one_step)
    assert "the moving average of the weights continues from rolling_step_000006 (ema.decay 0.9)" in launched.output
    assert next_average(checkpoint(alone, 6), checkpoint(alone, 7))
    assert curve(alone, "val/loss_ema")[7] == pytest.approx(curve(trained[1], "val/loss_ema")[6], abs=0.3)
    assert curve(alone, "val/loss_ema")[7] != curve(alone, "val/loss")[7]
    _, two = resume_from(7, 2, "schedule.steps=8", *one_step, run=alone)
    assert next_average(checkpoint(two, 7), checkpoint(two, 8))


def test_switching_the_average_off_and_on_is_logged(
    resume_from: Callable[..., tuple[Launched, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    one_step = ("checkpoint.every=1", "validation.every=0", "run.seed=1337")
    launched, off = resume_from(6, 1, "ema.decay=null", "schedule.steps=7", *one_step)
    (warning,) = [line for line in launched.output.splitlines() if "which this run drops" in line]
    assert "rolling_step_000006 has a moving average" in warning and "ema.decay=0.9" in warning
    assert "changed since then: ema.decay 0.9 -> None" in launched.output
    assert not read_manifest(checkpoint(off, 7)).has_ema
    error = refused(capsys, "export", off / "runs" / "test", "--weights", "ema", "--out", off / "out")
    assert error.endswith("has no moving average of the weights: its run had no ema.decay")
    launched, on = resume_from(7, 1, "ema.decay=0.5", "schedule.steps=8", *one_step, run=off)
    started = "rolling_step_000007 has no moving average of the weights: it starts from its weights (ema.decay 0.5)"
    assert started in launched.output
    raw, averaged = fp32_weights(checkpoint(on, 7)), fp32_weights(checkpoint(on, 8), "ema")
    expected = (raw["wpe.weight"].double() + fp32_weights(checkpoint(on, 8))["wpe.weight"].double()) / 2
    assert float((averaged["wpe.weight"] - expected).abs().max()) < 1e-7


def test_checkpoints_verify_and_weights_alone_have_both_kinds(trained: Run) -> None:
    found = scan(trained[1] / "checkpoints" / "test")
    assert [problem_of(one) or deep_problem(one) for one in found] == [None] * len(found)
    best = next(one for one in found if one.role == "best")
    assert (best.path / EMA_FILE).is_file()
    full = checkpoint(trained[1], best.step)
    kinds: tuple[Weights, ...] = ("raw", "ema")
    assert all(same_weights(fp32_weights(best.path, kind), fp32_weights(full, kind)) for kind in kinds)
    assert not same_weights(fp32_weights(full), fp32_weights(full, "ema"))


def test_a_partition_whose_average_was_removed_is_damaged(trained: Run, tmp_path: Path) -> None:
    from ds_gpt2.checkpoint.content_checks import problem_of_partition
    from ds_gpt2.engine.checkpoint_io import partition_file, unpickle

    path = checkpoint(trained[1], 12)
    known, content = read_manifest(path), unpickle(path / partition_file(0))
    assert problem_of_partition(content, known) is None
    del content["ema"]
    assert "has 0 elements of the moving average" in str(problem_of_partition(content, known))


def test_deepspeeds_zero_to_fp32_still_reads_the_checkpoint(trained: Run, tmp_path: Path) -> None:
    checkpoints = trained[1] / "checkpoints" / "test"
    command = [sys.executable, str(checkpoints / "zero_to_fp32.py"), str(checkpoints), str(tmp_path / "out")]
    ran = subprocess.run([*command, "--tag", rolling_tag(12)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert same_weights(found, fp32_weights(checkpoints / rolling_tag(12)))


@pytest.mark.parametrize("form", ["hf", "bf16", "fp32"])
def test_the_averaged_weights_are_exported_in_every_format(trained: Run, tmp_path: Path, form: str) -> None:
    out = tmp_path / ("model.pt" if form == "fp32" else "model")
    words = ["export", str(trained[1] / "runs" / "test"), "--weights", "ema", "--format", form, "--out", str(out)]
    assert main(words) == exit_codes.DONE
    expected = fp32_weights(checkpoint(trained[1], 12), "ema")
    for name, weight in read(out).weights.items():
        whole = expected[name][: len(weight)]
        assert torch.equal(weight, whole.bfloat16().float() if form == "bf16" else whole), name
    if form == "fp32":
        about = torch.load(out, weights_only=True)["about"]
        assert (about["weights"], about["averaged_steps"]) == ("ema", [])
    else:
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "# test, step 12 (rolling_step_000012), averaged weights" in card
        assert "| weights | moving average of the weights, ema.decay 0.9 |" in card
        assert f"| validation loss | {curve(trained[1], 'val/loss_ema')[12]:.4f} |" in card and "HellaSwag" not in card


def test_eval_of_the_averaged_weights_agrees_with_training(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training evaluates in bf16, ``eval`` in fp32."""
    run, out = str(trained[1] / "runs" / "test"), str(tmp_path / "model")
    assert main(["export", run, "--weights", "ema", "--out", out]) == exit_codes.DONE
    capsys.readouterr()
    losses = []
    for words in ([run, "--weights", "ema"], [run], [out, "--data", str(trained_data(trained))]):
        assert main(["eval", *words, "--tokens", str(40 * 64), "--device", "cpu", "--json"]) == exit_codes.DONE
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        losses.append(row["loss"]["value"])
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0] == pytest.approx(curve(trained[1], "val/loss_ema")[12], abs=2e-3)
    assert losses[1] == pytest.approx(curve(trained[1], "val/loss")[12], abs=2e-3)
    assert abs(losses[0] - losses[1]) > 0.02, "otherwise the test proves nothing"
    error = refused(capsys, "eval", run, out, "--weights", "ema", "--device", "cpu")
    assert f"--weights ema: {out} is not a checkpoint of a run" in error
    assert main(["generate", run, "--weights", "ema", "--tokens", "3", "--device", "cpu"]) == exit_codes.DONE
    assert "averaged weights on cpu" in capsys.readouterr().err
    assert "is not a checkpoint of a run" in refused(capsys, "generate", out, "--weights", "ema", "--device", "cpu")


def trained_data(run: Run) -> Path:
    settings = read_manifest(checkpoint(run[1], 12)).settings
    return Path(settings["data"]["dir"])


@pytest.mark.parametrize(
    ("which", "kind", "steps"), [("3", "raw", [12, 9, 6]), ("4", "ema", [12, 9, 6, 3]), ("best,6,3", "raw", [12, 6, 3])]
)
def test_the_mean_of_checkpoints_equals_numpys(
    trained: Run, tmp_path: Path, which: str, kind: Weights, steps: list[int]
) -> None:
    run, out = str(trained[1] / "runs" / "test"), tmp_path / "mean.pt"
    words = ["export", run, "--average", which, "--weights", kind, "--format", "fp32", "--out", str(out)]
    assert main(words) == exit_codes.DONE
    all_weights = [fp32_weights(checkpoint(trained[1], step), kind) for step in steps]
    content = torch.load(out, weights_only=True)
    for name, weight in content["model"].items():
        expected = np.mean([weights[name].numpy().astype(np.float64) for weights in all_weights], axis=0)
        np.testing.assert_array_equal(weight.numpy(), expected.astype(np.float32), err_msg=name)
    assert (content["about"]["weights"], content["about"]["averaged_steps"]) == (kind, steps)


def test_an_average_is_exported_for_transformers_with_its_steps_in_the_card(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained[1] / "runs" / "test"
    assert main(["export", str(run), "--average", "2", "--weights", "ema"]) == exit_codes.DONE
    out = run / "exports" / "rolling_step_000012-ema-average2-hf"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# test, mean of the averaged weights of checkpoints at steps 12, 9" in card
    assert "| moving average of the weights, ema.decay 0.9; mean of the checkpoints at steps 12, 9 |" in card
    assert "validation loss" not in card, "it was not measured with these weights"
    assert (out / "model.safetensors").is_file()
    shutil.rmtree(run / "exports")
    error = refused(capsys, "export", run, "--average", "2", "--tag", "6", "--out", tmp_path / "out")
    assert error.endswith("--tag 6: --average names the checkpoints, omit --tag")
    assert "the memory" not in error and list(tmp_path.iterdir()) == []


def test_the_estimates_of_memory_and_disk_agree_with_the_files(trained: Run) -> None:
    from ds_gpt2.config.settings import load_settings
    from ds_gpt2.tools.resources import memory_model

    settings = load_settings(trained[1] / "run.yaml")
    without = settings.model_copy(update={"ema": settings.ema.model_copy(update={"decay": None})})
    size = requirements.checkpoint_bytes(settings)
    assert 1.0 < read_manifest(checkpoint(trained[1], 12)).bytes / size < 1.01
    best = read_manifest(trained[1] / "checkpoints" / "test" / "best_model")
    inputs, plain = (inputs_of(each, 2, None, disk_free=10**9) for each in (settings, without))
    parameters = inputs.model.parameters
    assert 1.0 < best.bytes / (8 * parameters) < 1.01
    assert size - requirements.checkpoint_bytes(without) == 4 * parameters
    persistent = [memory_model.peak(each.model, each.batch, each.zero, "cpu").persistent for each in (inputs, plain)]
    assert persistent[0] - persistent[1] == pytest.approx(4 * parameters / 2, rel=1e-3)
