"""``export``: the exported model of a real run, loaded by transformers and plain PyTorch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from exported_model import TAG, Exported, refused
from launched import PROJECT, launch

from ds_gpt2.checkpoint.weights import fp32_weights
from ds_gpt2.cli import main
from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.hellaswag import load_items
from ds_gpt2.evaluation.sampling import Sampling, generate
from ds_gpt2.evaluation.scoring import score, score_one
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.pretrained import huggingface
from ds_gpt2.pretrained.load import as_model, read
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.models import export, export_output
from ds_gpt2.tools.models.open import open_model

transformers = pytest.importorskip("transformers", reason="transformers 5 needs Python 3.10; of the extra dev")


def _tokens(dataset_dir: Path) -> torch.Tensor:
    return torch.from_numpy(Windows(open_dataset(dataset_dir), "val", 64).read(np.arange(8)))


@pytest.mark.ranks
def test_engine_file_and_transformers_compute_the_same_logits(
    exported: Exported, model: GPT2, dataset_dir: Path, tmp_path: Path
) -> None:
    folder, directory = exported
    assert main(["export", str(folder / "runs" / "test"), "--format", "fp32", "--out", str(tmp_path / "x.pt")]) == 0
    plain = GPT2(model.shape)
    plain.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True)["model"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokens = _tokens(dataset_dir)[:, :-1]
    with torch.no_grad():
        ours = model.logits(tokens)
        assert torch.equal(plain.eval().logits(tokens), ours)
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-4, rtol=0)


def test_fifty_greedy_tokens_equal_those_of_transformers(exported: Exported, model: GPT2) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported[1])
    prompt = torch.tensor([tokenizer.gpt2().encode_ordinary("The statement")])
    generated = theirs.generate(prompt, max_new_tokens=50, do_sample=False)[0, prompt.shape[1] :]
    assert generate(model, "The statement", 50, Sampling(temperature=0))[0] == tokenizer.gpt2().decode(
        generated.tolist()
    )


def test_a_transformers_pipeline_loads_the_export(exported: Exported) -> None:
    pipeline = transformers.pipeline("text-generation", model=str(exported[1]), device="cpu")
    (found,) = pipeline("The statement", max_new_tokens=5, do_sample=False)
    assert found["generated_text"].startswith("The statement")


def test_losses_and_hellaswag_answers_equal_those_of_transformers(
    exported: Exported, model: GPT2, dataset_dir: Path, tmp_path: Path
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported[1])
    found = read(exported[1])
    ours = as_model(found.shape, found.weights)
    rows = _tokens(dataset_dir)[:, :-1]
    with torch.no_grad():
        loss = theirs(rows, labels=rows).loss
        assert float(ours(rows[:, :-1], rows[:, 1:])) == pytest.approx(float(loss), abs=1e-5)
    items = load_items(exported[0] / "items.jsonl", "cleaned", tmp_path)
    assert (score(ours, items).answers() == score(model, items).answers()).all()
    np.testing.assert_allclose(score_one(ours, items[0]), score_one(model, items[0]), atol=1e-4)


def test_bf16_halves_the_size(exported: Exported, tmp_path: Path) -> None:
    folder, directory = exported
    assert main(["export", str(folder / "runs" / "test"), "--format", "bf16", "--out", str(tmp_path / "half")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert theirs.dtype == torch.bfloat16
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter.bfloat16(), theirs.get_parameter(name)), name
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", directory)]
    assert sizes[0] < 0.51 * sizes[1]


@pytest.mark.ranks
def test_zero_to_fp32_works_in_the_checkpoint_directory(exported: Exported, tmp_path: Path) -> None:
    checkpoints = exported[0] / "checkpoints" / "test"
    script = checkpoints / "zero_to_fp32.py"
    if not script.exists():
        script = checkpoints / TAG / "zero_to_fp32.py"
    command = [sys.executable, str(script), str(checkpoints), str(tmp_path / "out"), "--tag", TAG]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert ran.returncode == 0, ran.stderr
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    expected = fp32_weights(checkpoints / TAG)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_card_has_the_facts_of_the_run(exported: Exported) -> None:
    folder, directory = exported
    card = (directory / "README.md").read_text(encoding="utf-8")
    last = list(read_metrics(folder / "runs" / "test" / METRICS))[-1]
    for text in (
        "1.6 M parameters (2 layers, 2 heads, width 32, context 64)",
        "| steps | 12 |",
        f"| training loss | {last['train/loss']:.4f} |",
        f"| validation loss | {last['val/loss']:.4f} |",
        f"| HellaSwag, acc | {last['hellaswag/acc']:.4f} |",
        "| schedule.max_lr | 0.003 |",
        "deepspeed",
    ):
        assert text in card, text
    assert str(folder) not in card.replace(f"export {folder}", "").split("exported by")[0], "no path of this machine"


def test_unreadable_metrics_are_named_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path / METRICS} cannot be read: Is a directory; move it away"):
        export._last_values(tmp_path / METRICS, 40)


@pytest.mark.ranks
def test_a_run_starts_from_an_export_exactly(
    exported: Exported, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """After one step with a tiny learning rate the fp32 weights equal the exported ones, far below bf16 rounding."""
    schedule = {"steps": 1, "warmup_steps": 0, "max_lr": 1e-9, "min_lr": 0.0}
    config = write_config(tmp_path, schedule=schedule, samples={"every": 0}, validation={"every": 0})
    launched = launch(2, "--config", str(config), f"model.init_from={exported[1]}")
    assert launched.code == 0, launched.output
    assert f"initial weights from {exported[1]}" in launched.output
    started = fp32_weights(tmp_path / "checkpoints" / "test" / "rolling_step_000001")
    for name, weight in read(exported[1]).weights.items():
        assert (started[name][: len(weight)] - weight).abs().max() < 1e-8, name
    rounded = read(exported[1]).weights["wte.weight"]
    assert (rounded - rounded.bfloat16()).abs().max() > 1e-6, "otherwise the test proves nothing"


@pytest.mark.ranks
def test_a_model_of_another_shape_is_refused_on_all_ranks(
    exported: Exported, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    launched = launch(2, "--config", str(config), f"model.init_from={exported[1]}", "model.layers=3")
    assert launched.code != 0 and launched.left_over == []
    lines = [line for line in launched.output.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: model.init_from {exported[1]} has layers 2, heads 2, width 32;"
        " this run has layers 3, heads 2, width 32: set model.layers=2 model.heads=2 model.width=32"
    ]
    assert "Traceback" not in launched.output


@pytest.mark.ranks
def test_force_replaces_exports_only(exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, out = str(exported[0] / "runs" / "test"), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("of a previous export")
    assert "exists: give another --out PATH, or --force" in refused(capsys, "export", run, "--out", out)
    assert main(["export", run, "--out", str(out), "--force"]) == exit_codes.DONE
    assert (out / "README.md").read_text() != "of a previous export" and (out / "model.safetensors").exists()
    (out / "thesis.txt").write_text("mine")
    for kind in ("hf", "bf16", "fp32"):
        words: tuple[str | Path, ...] = ("export", run, "--format", kind, "--out", out, "--force")
        assert "contains thesis.txt, which is not part of an export" in refused(capsys, *words)
    checkpoints = exported[0] / "checkpoints" / "test"
    before = sorted(checkpoints.rglob("*"))
    for directory in (checkpoints, next(checkpoints.glob("rolling_*")), exported[0] / "runs" / "test"):
        assert "which is not part of an export" in refused(capsys, "export", run, "--out", directory, "--force")
    assert sorted(checkpoints.rglob("*")) == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(capsys, "export", run, "--out", tmp_path / "link", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_failed_export_leaves_the_previous_one(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    run, out = str(exported[0] / "runs" / "test"), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    monkeypatch.setattr(huggingface, "write_weights", full)
    assert "No space left on device" in refused(capsys, "export", run, "--out", out, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "README.md").read_text() == "mine"


def test_weights_that_are_not_finite_are_not_exported(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a checkpoint with valid checksums that was saved with such weights."""
    run = str(exported[0] / "runs" / "test")
    opened = open_model(run, TAG)
    opened.weights["ln_f.weight"][3] = float("nan")
    monkeypatch.setattr(export, "open_model", lambda *_: opened)
    for form in ("hf", "bf16", "fp32"):
        error = refused(capsys, "export", run, "--format", form, "--out", tmp_path / "out")
        assert "ln_f.weight has values that are Inf or NaN" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks
def test_the_next_export_cleans_up_after_a_killed_one(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, out = str(exported[0] / "runs" / "test"), tmp_path / "out.pt"
    program = "import os, signal; from ds_gpt2.tools.models import export_output\n"
    program += "export_output.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
    program += "import sys; from ds_gpt2.cli import main; sys.exit(main())"
    words = ["export", run, "--format", "fp32", "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", program, *words], cwd=PROJECT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    left.with_name(left.name.replace("unfinished", "replaced")).write_text("an earlier export, moved aside")
    other = tmp_path / ".out.pt.unfinished-elsewhere-1"
    for path in (export_output.temporary_paths(out, os.getppid())[0], other):
        path.write_text("being written")
    with pytest.raises(UserError), export_output.atomic_output(out, 0):
        raise OSError(28, "No space left on device")
    assert out.read_text() == "an earlier export, moved aside"
    assert len(list(tmp_path.iterdir())) == 3  # the export, and the files of other processes
    out.unlink()
    assert main(words) == exit_codes.DONE
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["hf", "fp32"])
def test_a_full_disk_is_a_one_line_error(exported: Exported, tmp_path: Path, kind: str) -> None:
    """A limit on the file size simulates a disk that becomes full during the export."""
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({3_000_000}, {3_000_000}))"
    program += "; import sys; sys.path.insert(0, sys.argv.pop(1)); from ds_gpt2.cli import main; sys.exit(main())"
    words = ["export", str(exported[0] / "runs" / "test"), "--format", kind, "--out", str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-c", program, str(PROJECT), *words], capture_output=True, text=True)
    assert ran.returncode == exit_codes.MISTAKE and ran.stderr.startswith("error: ")
    assert "could not be written completely (is the disk full?)" in ran.stderr and ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_or_memory_is_an_error_before_writing(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = str(exported[0] / "runs" / "test")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        assert "has 0.0 MB free" in refused(capsys, "export", run, "--out", tmp_path / "out")
    memory = psutil.virtual_memory()._replace(available=100_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert "of memory, 100.0 MB are free" in refused(capsys, "export", run, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_default_directory_is_in_the_run(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported[0] / "runs" / "test"
    assert main(["export", str(run), "--tag", "best_model", "--format", "bf16"]) == exit_codes.DONE
    assert (run / "exports" / "best_model-bf16" / "config.json").is_file()
    assert f"{run / 'exports' / 'best_model-bf16'}" in capsys.readouterr().out
    shutil.rmtree(run / "exports")


def test_force_does_not_replace_a_file_that_is_no_export(
    history: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("thesis.txt", "README.md"):
        out = tmp_path / name
        out.write_text("mine")
        error = refused(capsys, "export", "test", "--out", out, "--force")
        assert f"{out} is a file, but not an export: --force replaces exports only, give another --out PATH" in error
        assert out.read_text() == "mine"
