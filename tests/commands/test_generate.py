"""``generate``, with the model of a real run and its export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exported_model import TAG, Exported, refused
from launched import PROJECT

from ds_gpt2.cli import main
from ds_gpt2.evaluation.sampling import Sampling, generate
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY
from ds_gpt2.pretrained import huggingface
from ds_gpt2.pretrained.load import read
from ds_gpt2.run_dir import exit_codes


def test_a_run_and_its_export_generate_the_same_text(
    exported: Exported, model: GPT2, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, directory = exported
    words = ["--prompt", "The statement", "--tokens", "30", "--temperature", "0"]
    texts = []
    for model_name in (folder / "runs" / "test", folder / "checkpoints" / "test" / TAG, directory):
        assert main(["generate", str(model_name), *words]) == exit_codes.DONE
        texts.append(capsys.readouterr().out)
    greedy = generate(model, "The statement", 30, Sampling(temperature=0))[0]
    assert texts == [f"The statement{greedy}\n"] * 3


@pytest.mark.slow
def test_samples_differ_and_are_reproducible_with_a_seed(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(exported[1]), "--tokens", "20", "--samples", "2", "--top-k", "500", "--top-p", "0.99"]
    texts = []
    for seed in ("5", "5", "6"):
        main([*words, "--seed", seed])
        texts.append(capsys.readouterr().out)
    one, two = texts[0].split("--------")
    assert one.strip() != two.strip()
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_interactive_reads_prompts_until_the_end_of_input(exported: Exported) -> None:
    command = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "generate", str(exported[1])]
    words = ["--interactive", "--tokens", "3", "--temperature", "0", "--device", "cpu"]
    ran = subprocess.run([*command, *words], input="First\nSecond é\n", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()[:1] + ran.stdout.splitlines()[-1:]
    assert first.startswith("First") and second.startswith("Second é")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0: give 0"),
        (["--top-k", "0"], "top-k 0: give at least 1"),
        (["--tag", "best"], "is one model and has no checkpoints"),
    ],
)
def test_invalid_arguments_are_one_line_errors(
    exported: Exported, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert message in refused(capsys, "generate", exported[1], *words)


def test_weights_that_are_not_finite_are_named(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(exported[1], tmp_path / "damaged"))
    found = read(damaged)
    found.weights["ln_f.weight"][0] = float("nan")
    huggingface.write_weights(found.weights, damaged / "model.safetensors", torch.float32)
    assert f"{damaged}: ln_f.weight has values that are Inf or NaN" in refused(capsys, "generate", damaged)


def test_scores_that_overflow_are_reported(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(exported[1], tmp_path / "damaged"))
    found = read(damaged)
    found.weights["ln_f.weight"].fill_(3e38)
    huggingface.write_weights(found.weights, damaged / "model.safetensors", torch.float32)
    assert "scores are not finite" in refused(capsys, "generate", damaged)


def test_another_vocabulary_is_refused(exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(exported[1], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY - 1}))
    assert "vocab_size is 50,256; GPT-2's vocabulary has 50,257 tokens" in refused(capsys, "generate", other)


@pytest.mark.parametrize(
    ("manifest", "fix"),
    [
        (object(), ", `./launch.sh verify '/my runs/tag' --deep` shows which; choose another with --tag"),
        (None, ": use another model"),
    ],
)
def test_an_error_of_weights_that_are_not_finite_gives_the_fix(
    manifest: object, fix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FloatingPointError("scores are not finite")

    opened = SimpleNamespace(title="x", note=None, shape=None, weights={}, path=Path("/my runs/tag"), manifest=manifest)
    monkeypatch.setattr("ds_gpt2.commands.generate.open_model", lambda *_: opened)
    monkeypatch.setattr("ds_gpt2.commands.generate.as_model", lambda *_: torch.nn.Identity())
    monkeypatch.setattr("ds_gpt2.commands.generate.stream", fail)
    error = refused(capsys, "generate", "x", "--device", "cpu")
    assert error == f"error: scores are not finite: some weights are Inf or NaN{fix}"
