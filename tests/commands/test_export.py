"""``export`` and ``generate``: a real run's model taken out, and what others make of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import PROJECT, Launched, launch

from ds_gpt2.checkpoint import weights
from ds_gpt2.checkpoint.manifest import FileEntry, encode
from ds_gpt2.checkpoint.manifest import read as read_manifest
from ds_gpt2.checkpoint.weights import fp32_weights
from ds_gpt2.cli import main
from ds_gpt2.commands import export, models
from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.hellaswag import load_items
from ds_gpt2.data.shards import sha256
from ds_gpt2.evaluation.hellaswag_scoring import score, score_one
from ds_gpt2.evaluation.sampling import Sampling, generate
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY
from ds_gpt2.pretrained.load import as_model, read
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.metrics import METRICS, read_metrics

transformers = pytest.importorskip("transformers", reason="transformers 5 needs Python 3.10; of the extra dev")

TAG = "rolling_step_000012"
Exported = tuple[Path, Path]  # a run's folder, a Hugging Face directory made of it


@pytest.fixture(scope="module")
def exported(four_ranks: tuple[Launched, Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("export") / "hf"
    assert main(["export", str(four_ranks[1] / "runs" / "test"), "--out", str(out)]) == exit_report.DONE
    return four_ranks[1], out


@pytest.fixture(scope="module")
def model(exported: Exported) -> GPT2:
    """The run's own, from the engine's masters."""
    opened = models.open_model(str(exported[0] / "runs" / "test"), TAG)
    return as_model(opened.shape, opened.weights)


def _tokens(dataset_dir: Path) -> torch.Tensor:
    return torch.from_numpy(Windows(open_dataset(dataset_dir), "val", 64).read(np.arange(8)))


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a mistake."""
    assert main([str(word) for word in words]) == exit_report.MISTAKE
    said = capsys.readouterr().err.strip()
    *before, said = said.splitlines()
    assert said.startswith("error: ") and not [line for line in before if not line.endswith(" on cpu")]
    return said


def test_engine_file_and_transformers_have_the_same_logits(
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


def test_fifty_greedy_tokens_are_those_of_transformers(exported: Exported, model: GPT2) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported[1])
    prompt = torch.tensor([tokenizer.gpt2().encode_ordinary("The statement")])
    made = theirs.generate(prompt, max_new_tokens=50, do_sample=False)[0, prompt.shape[1] :]
    assert generate(model, "The statement", 50, Sampling(temperature=0))[0] == tokenizer.gpt2().decode(made.tolist())


def test_the_pipeline_of_transformers_runs_it(exported: Exported) -> None:
    made = transformers.pipeline("text-generation", model=str(exported[1]), device="cpu")
    (found,) = made("The statement", max_new_tokens=5, do_sample=False)
    assert found["generated_text"].startswith("The statement")


def test_losses_and_hellaswag_answers_are_ours_item_by_item(
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


def test_half_the_size_in_bf16(exported: Exported, tmp_path: Path) -> None:
    folder, directory = exported
    assert main(["export", str(folder / "runs" / "test"), "--format", "bf16", "--out", str(tmp_path / "half")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert theirs.dtype == torch.bfloat16
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter.bfloat16(), theirs.get_parameter(name)), name
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", directory)]
    assert sizes[0] < 0.51 * sizes[1]


def test_deepspeeds_own_script_works_in_the_checkpoints(exported: Exported, tmp_path: Path) -> None:
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


def test_the_card_tells_what_it_is(exported: Exported) -> None:
    folder, directory = exported
    card = (directory / "README.md").read_text(encoding="utf-8")
    last = list(read_metrics(folder / "runs" / "test" / METRICS))[-1]
    for said in (
        "1.6 M parameters (2 layers, 2 heads, width 32, context 64)",
        "| steps | 12 |",
        f"| training loss | {last['train/loss']:.4f} |",
        f"| validation loss | {last['val/loss']:.4f} |",
        f"| HellaSwag, acc | {last['hellaswag/acc']:.4f} |",
        "| schedule.max_lr | 0.003 |",
        "deepspeed",
    ):
        assert said in card, said
    assert str(folder) not in card.replace(f"export {folder}", "").split("exported by")[0], "no paths of this machine"


def test_a_run_begins_from_an_export_exactly(
    exported: Exported, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """After one step at hardly any learning rate the masters are the exported weights, far below bf16's rounding."""
    schedule = {"steps": 1, "warmup_steps": 0, "max_lr": 1e-9, "min_lr": 0.0}
    config = write_config(tmp_path, schedule=schedule, samples={"every": 0}, validation={"every": 0})
    launched = launch(2, "--config", str(config), f"model.init_from={exported[1]}")
    assert launched.code == 0, launched.output
    assert f"initial weights from {exported[1]}" in launched.output
    begun = fp32_weights(tmp_path / "checkpoints" / "test" / "rolling_step_000001")
    for name, weight in read(exported[1]).weights.items():
        assert (begun[name][: len(weight)] - weight).abs().max() < 1e-8, name
    rounded = read(exported[1]).weights["wte.weight"]
    assert (rounded - rounded.bfloat16()).abs().max() > 1e-6, "else the test shows nothing"


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


def test_force_replaces_an_export_and_nothing_else(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, out = str(exported[0] / "runs" / "test"), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("of an export before this one")
    assert "exists: give another --out PATH, or --force" in _refused(capsys, "export", run, "--out", out)
    assert main(["export", run, "--out", str(out), "--force"]) == exit_report.DONE
    assert (out / "README.md").read_text() != "of an export before this one" and (out / "model.safetensors").exists()
    (out / "thesis.txt").write_text("mine")
    for kind in ("hf", "bf16", "fp32"):
        words = ("export", run, "--format", kind, "--out", out, "--force")
        assert "holds thesis.txt, which no export has written" in _refused(capsys, *words)
    checkpoints = exported[0] / "checkpoints" / "test"
    before = sorted(checkpoints.rglob("*"))
    for place in (checkpoints, next(checkpoints.glob("rolling_*")), exported[0] / "runs" / "test"):
        assert "which no export has written" in _refused(capsys, "export", run, "--out", place, "--force")
    assert sorted(checkpoints.rglob("*")) == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in _refused(capsys, "export", run, "--out", tmp_path / "link", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_failure_leaves_nothing_and_what_was_there(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    run, out = str(exported[0] / "runs" / "test"), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    monkeypatch.setattr(export.huggingface, "write_weights", full)
    assert "No space left on device" in _refused(capsys, "export", run, "--out", out, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "README.md").read_text() == "mine"


def test_weights_that_are_not_finite_are_not_exported(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where a checkpoint was saved so, and every checksum is right."""
    run = str(exported[0] / "runs" / "test")
    opened = models.open_model(run, TAG)
    opened.weights["ln_f.weight"][3] = float("nan")
    monkeypatch.setattr(export, "open_model", lambda *_: opened)
    for form in ("hf", "bf16", "fp32"):
        said = _refused(capsys, "export", run, "--format", form, "--out", tmp_path / "out")
        assert "ln_f.weight has values that are Inf or NaN" in said
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_has_left_is_cleaned_up_by_the_next(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, out = str(exported[0] / "runs" / "test"), tmp_path / "out.pt"
    program = "import os, signal; from ds_gpt2.commands import export\n"
    program += "export._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
    program += "import sys; from ds_gpt2.cli import main; sys.exit(main())"
    words = ["export", run, "--format", "fp32", "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", program, *words], cwd=PROJECT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    left.with_name(left.name.replace("unfinished", "replaced")).write_text("an earlier export, moved aside")
    other = tmp_path / ".out.pt.unfinished-elsewhere-1"
    for path in (export._beside(out, os.getppid())[0], other):
        path.write_text("being written")
    with pytest.raises(UserError), export._appearing(out, 0):
        raise OSError(28, "No space left on device")
    assert out.read_text() == "an earlier export, moved aside"
    assert len(list(tmp_path.iterdir())) == 3  # the export, and what belongs to others
    out.unlink()
    assert main(words) == exit_report.DONE
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kind", ["hf", "fp32"])
def test_a_file_that_cannot_grow_is_one_line(exported: Exported, tmp_path: Path, kind: str) -> None:
    """A limit on file size stands for a disk that fills up on the way."""
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({3_000_000}, {3_000_000}))"
    program += "; import sys; sys.path.insert(0, sys.argv.pop(1)); from ds_gpt2.cli import main; sys.exit(main())"
    words = ["export", str(exported[0] / "runs" / "test"), "--format", kind, "--out", str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-c", program, str(PROJECT), *words], capture_output=True, text=True)
    assert ran.returncode == exit_report.MISTAKE and ran.stderr.startswith("error: ")
    assert "could not be written whole (is the disk full?)" in ran.stderr and ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = str(exported[0] / "runs" / "test")
    with monkeypatch.context() as patch:
        patch.setattr(export.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        assert "has 0.0 MB free" in _refused(capsys, "export", run, "--out", tmp_path / "out")
    memory = models.psutil.virtual_memory()._replace(available=100_000_000)
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: memory)
    assert "of memory, 100.0 MB are free" in _refused(capsys, "export", run, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_named_and_not_exported(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, tmp_path / "copy" / TAG))
    file = next(damaged.glob("bf16_zero_pp_rank_2*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = _refused(capsys, "export", damaged, "--out", tmp_path / "out")
    assert f"{damaged} is damaged ({file.name}" in said and "--tag" in said
    assert not (tmp_path / "out").exists()


def test_files_of_two_checkpoints_are_never_mixed(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A training run puts a new best in the place of the one that is being read: then it is read again."""
    best = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / "best_model", tmp_path / "copy" / "best_model"))
    newer = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, tmp_path / "newer"))
    read, replaced = weights.fp32_weights, []

    def replacing(path: Path) -> dict[str, torch.Tensor]:
        found = read(path)
        if len(replaced) < often:
            replaced.append(best.rename(tmp_path / f"old_{often}_{len(replaced)}"))
            shutil.copytree(newer, best)
        return found

    monkeypatch.setattr(weights, "fp32_weights", replacing)
    often = 1
    opened = models.open_model(str(best), None)
    assert opened.manifest is not None and opened.manifest.step == 12 and len(replaced) == 1
    assert all(torch.equal(opened.weights[name], each) for name, each in read(newer).items())
    replaced.clear()
    often = 99
    assert "was replaced again and again" in _refused(capsys, "generate", best)


def test_a_forged_checkpoint_is_one_line_and_nothing_in_it_is_run(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its hashes are right: whoever forges a file can write a manifest, too."""
    forged = Path(shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, tmp_path / "copy" / TAG))
    file = next(forged.glob("bf16_zero_pp_rank_0*"))
    torch.save({"optimizer_state_dict": Harmful(tmp_path / "harm was done")}, file)
    entry = FileEntry(bytes=file.stat().st_size, sha256=sha256(file))
    honest = read_manifest(exported[0] / "checkpoints" / "test" / TAG)
    (forged / "manifest.json").write_bytes(
        encode(honest.model_copy(update={"files": honest.files | {file.name: entry}}))
    )
    assert f"{forged} cannot be read: " in _refused(capsys, "export", forged, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_being_written_is_none(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unfinished = tmp_path / "checkpoints" / "rolling_step_000012.tmp"
    shutil.copytree(exported[0] / "checkpoints" / "test" / TAG, unfinished)
    (unfinished / "manifest.json").unlink()
    said = _refused(capsys, "export", unfinished.parent, "--out", tmp_path / "out")
    assert "no checkpoints" in said


@pytest.mark.parametrize("tag", ["rolling_step_000099", "epoch_00009"])
def test_a_tag_that_is_not_there(exported: Exported, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    assert f"no checkpoint '{tag}'" in _refused(capsys, "export", exported[0] / "runs" / "test", "--tag", tag)


def test_by_default_it_lies_with_the_run(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported[0] / "runs" / "test"
    assert main(["export", str(run), "--tag", "best_model", "--format", "bf16"]) == exit_report.DONE
    assert (run / "exports" / "best_model-bf16" / "config.json").is_file()
    assert f"{run / 'exports' / 'best_model-bf16'}" in capsys.readouterr().out
    shutil.rmtree(run / "exports")


def test_text_from_a_run_and_from_its_export_is_the_same(
    exported: Exported, model: GPT2, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, directory = exported
    words = ["--prompt", "The statement", "--tokens", "30", "--temperature", "0"]
    texts = []
    for what in (folder / "runs" / "test", folder / "checkpoints" / "test" / TAG, directory):
        assert main(["generate", str(what), *words]) == exit_report.DONE
        texts.append(capsys.readouterr().out)
    greedy = generate(model, "The statement", 30, Sampling(temperature=0))[0]
    assert texts == [f"The statement{greedy}\n"] * 3


def test_samples_differ_and_a_seed_gives_them_again(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(exported[1]), "--tokens", "20", "--samples", "2", "--top-k", "500", "--top-p", "0.99"]
    texts = []
    for seed in ("5", "5", "6"):
        main([*words, "--seed", seed])
        texts.append(capsys.readouterr().out)
    one, two = texts[0].split("--------")
    assert one.strip() != two.strip()
    assert texts[0] == texts[1] != texts[2]


def test_prompts_are_read_until_there_is_none(exported: Exported) -> None:
    command = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "generate", str(exported[1])]
    words = ["--interactive", "--tokens", "3", "--temperature", "0", "--device", "cpu"]
    ran = subprocess.run([*command, *words], input="First\nSecond é\n", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()[:1] + ran.stdout.splitlines()[-1:]
    assert first.startswith("First") and second.startswith("Second é")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "-1"], "temperature -1.0: give 0"),
        (["--top-k", "0"], "top-k 0: give at least 1"),
        (["--tag", "best"], "is one model and has no checkpoints"),
    ],
)
def test_mistakes_in_what_is_asked_for(
    exported: Exported, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in _refused(capsys, "generate", exported[1], *words)


def test_weights_that_are_not_finite_are_refused_by_name(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spoiled = Path(shutil.copytree(exported[1], tmp_path / "spoiled"))
    found = read(spoiled)
    found.weights["ln_f.weight"][0] = float("nan")
    export.huggingface.write_weights(found.weights, spoiled / "model.safetensors", torch.float32)
    assert f"{spoiled}: ln_f.weight has values that are Inf or NaN" in _refused(capsys, "generate", spoiled)


def test_scores_that_overflow_are_reported(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spoiled = Path(shutil.copytree(exported[1], tmp_path / "spoiled"))
    found = read(spoiled)
    found.weights["ln_f.weight"].fill_(3e38)
    export.huggingface.write_weights(found.weights, spoiled / "model.safetensors", torch.float32)
    assert "scores are not finite" in _refused(capsys, "generate", spoiled)


def test_a_vocabulary_that_is_not_gpt2s(exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(exported[1], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY - 1}))
    assert "vocab_size is 50,256; GPT-2's vocabulary has 50,257 tokens" in _refused(capsys, "generate", other)
