"""``eval``: the figures and their standard errors equal those of an independent implementation."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import SEQUENCE, hellaswag_item

from ds_gpt2.checkpoint import manifest
from ds_gpt2.checkpoint.naming import MANIFEST
from ds_gpt2.commands import eval as command
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import ValidationSettings
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import Windows, open_dataset
from ds_gpt2.data.evaluation_files import load_items as task_items
from ds_gpt2.data.hellaswag import load_items
from ds_gpt2.data.items import Item
from ds_gpt2.data.sources import HeldOut
from ds_gpt2.evaluation import loss as evaluation
from ds_gpt2.evaluation.loss import Estimate, count_windows, difference, mean, right_answers, share, window_losses
from ds_gpt2.evaluation.scoring import MEASURES, score_one
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.pretrained import torch_file as exported
from ds_gpt2.pretrained.huggingface import CONFIG, WEIGHTS, config_of, write_weights
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.models import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = 20
TAGS = ("rolling_step_000006", "rolling_step_000012")


@pytest.fixture(autouse=True)
def _use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # otherwise the command uses all cores


def make_model(seed: int, sequence_length: int = SEQUENCE) -> GPT2:
    """Return a model with weights five times the usual initial ones, so that its predictions differ."""
    torch.manual_seed(seed)
    model = GPT2(ModelShape(layers=2, heads=2, width=32, sequence_length=sequence_length)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model


def write_model(model: GPT2, directory: Path) -> Path:
    directory.mkdir(parents=True)
    write_weights(dict(model.state_dict()), directory / WEIGHTS, torch.float32)
    (directory / CONFIG).write_text(json.dumps(config_of(model.shape, 0.0, "float32")))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the paths of two models, and of a model with a shorter context."""
    folder = tmp_path_factory.mktemp("models")
    short = write_model(make_model(1, SEQUENCE // 2), folder / "short")
    return {"one": write_model(make_model(1), folder / "one"), "two": write_model(make_model(2), folder / "two")} | {
        "short": short
    }


@pytest.fixture(scope="module")
def items_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("items") / "items.jsonl"
    file.write_text("".join(json.dumps(hellaswag_item(number)) + "\n" for number in range(ITEMS)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def items(items_file: Path) -> list[Item]:
    return load_items(items_file, "original", items_file.parent)


def plain_losses(model: GPT2, directory: Path, count: int) -> torch.Tensor:
    """Return the losses (count,) of the first windows, computed independently."""
    dataset = open_dataset(directory)
    assert len(dataset.split("val")) == 1
    content = np.fromfile(directory / dataset.split("val")[0].file, np.uint16)
    tokens = torch.from_numpy(content[len(content) - dataset.tokens("val") :].astype(np.int64))
    losses = []
    for start in range(0, count * SEQUENCE, SEQUENCE):
        window = tokens[start : start + SEQUENCE + 1]
        losses.append(F.cross_entropy(model.logits(window[None, :-1])[0], window[1:]))
    return torch.stack(losses).detach().double()


def plain_right(model: GPT2, items: list[Item]) -> list[list[bool]]:
    """Return whether each item is right, by ``acc`` and ``acc_norm``, scored one item at a time."""
    rights = []
    for item in items:
        sums = score_one(model, item)
        lengths = np.array([len(ending) for ending in item.endings])
        rights.append([sums.argmax() == item.label, (sums / lengths).argmax() == item.label])
    return [list(row) for row in zip(*rights, strict=True)]


def run(*words: object) -> int:
    """Run the command with parsed arguments."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*map(str, words), "--device", "cpu"]))


def rows(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run(*words, "--json") == exit_codes.DONE
    content = json.loads(capsys.readouterr().out)
    assert list(content) == ["rows"]
    return content["rows"]


@pytest.mark.slow
def test_the_loss_equals_cross_entropy_of_pytorch(
    models: dict[str, Path], dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows(capsys, models["one"], "--data", dataset_dir, "--tokens", 40 * SEQUENCE + 5)
    expected = plain_losses(make_model(1), dataset_dir, 40)
    assert row["loss"]["value"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert row["loss"]["stderr"] == pytest.approx(float(expected.std(unbiased=True)) / math.sqrt(40), rel=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)
    assert (row["windows"], row["window_tokens"], row["items"]) == (40, SEQUENCE, 0)
    assert row["hellaswag"] is row["less_first"] is row["step"] is row["tokens"] is None


@pytest.mark.slow
def test_the_loss_equals_the_validation_loss_of_training(dataset_dir: Path) -> None:
    from ds_gpt2.training.hooks.validation import Validation

    model, windows = make_model(1), Windows(open_dataset(dataset_dir), "val", SEQUENCE)
    engine: Any = SimpleNamespace(model=model, device=torch.device("cpu"))  # the attributes that Validation uses
    for tokens in (10 * SEQUENCE + 1, 1, 10**9):
        trained = Validation(ValidationSettings(tokens=tokens), [HeldOut(windows)], 3).loss(engine)
        model.eval()
        done: list[int] = []
        found = window_losses(model, windows, count_windows(windows, tokens), done.append)
        assert float(found.mean()) == pytest.approx(trained, rel=1e-6)
        assert sum(done) == len(found)
    assert len(found) == len(windows)


def test_answers_equal_those_scored_one_at_a_time(items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(1)
    monkeypatch.setattr(evaluation, "_ITEMS_PER_CALL", 7)
    done: list[int] = []
    right = right_answers(model, items, done.append)
    assert right[:2].tolist() == plain_right(model, items)
    assert right.shape == (len(MEASURES), ITEMS)
    assert done == [7, 7, 6]
    assert 0 < right[0].sum() < ITEMS


def near(value: float) -> Any:
    return pytest.approx(value)


def test_standard_errors() -> None:
    assert mean(np.array([1.0, 2.0, 4.0])) == Estimate(near(7 / 3), near(math.sqrt(7 / 3 / 3)))
    assert mean(np.array([1.5])) == Estimate(1.5, None)
    assert share(np.array([True, False, False, False])) == Estimate(0.25, near(math.sqrt(0.1875 / 4)))
    hard, easy = np.array([9.0, 1.0]), np.array([8.5, 0.5])
    assert difference(easy, hard) == Estimate(-0.5, 0.0)  # different, but by a constant
    right, other = np.array([True, True, False]), np.array([False, True, False])
    assert difference(right, other) == Estimate(near(1 / 3), near(1 / 3))


@pytest.mark.slow
def test_models_are_compared_over_the_same_windows_and_items(
    models: dict[str, Path], dataset_dir: Path, items_file: Path, items: list[Item], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", dataset_dir, "--tokens", 30 * SEQUENCE, "--hellaswag", items_file)
    first, itself, other = rows(capsys, models["one"], models["one"], models["two"], *words)
    same = {"value": 0.0, "stderr": 0.0}
    no_difference = {"loss": same, "hellaswag": dict.fromkeys(MEASURES, same), "tasks": {}}
    assert first["less_first"] == itself["less_first"] == no_difference
    assert other["difference"] == other["less_first"]
    losses = [plain_losses(make_model(seed), dataset_dir, 30) for seed in (1, 2)]
    right = [np.array(plain_right(make_model(seed), items), np.float64) for seed in (1, 2)]
    by_window, by_item = losses[1] - losses[0], right[1] - right[0]
    loss, hellaswag = other["less_first"]["loss"], other["less_first"]["hellaswag"]
    assert loss["value"] == pytest.approx(float(by_window.mean()), rel=1e-4)
    assert loss["stderr"] == pytest.approx(float(by_window.std()) / math.sqrt(30), rel=1e-4)
    for measure, found, values in zip(MEASURES[:2], right[1], by_item, strict=True):
        assert other["hellaswag"][measure]["value"] == pytest.approx(found.mean())
        assert hellaswag[measure]["value"] == pytest.approx(values.mean())
        assert hellaswag[measure]["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(ITEMS))
    assert np.abs(by_item).sum() > 0


def test_the_table_has_the_figures_of_the_json(
    models: dict[str, Path], dataset_dir: Path, items_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", dataset_dir, "--tokens", 9 * SEQUENCE, "--hellaswag", items_file, "--items", 15)
    one, two = rows(capsys, models["one"], models["two"], *words)
    assert run(models["one"], models["two"], *words) == exit_codes.DONE
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""  # no progress bar: this is not a terminal
    assert lines[0] == f"loss: 9 validation windows of {SEQUENCE} tokens, {dataset_dir}"
    assert lines[1] == f"HellaSwag: 15 items, text original, {items_file}"
    assert lines[3].split() == [
        "model",
        "step",
        "tokens",
        "loss",
        "perplexity",
        "bits/byte",
        "acc",
        "acc_norm",
        "items",
    ]
    for line, row in zip(lines[4:6], (one, two), strict=True):
        of_loss, of_answers = row["loss"], row["hellaswag"]["acc"]
        assert line.startswith(f"{row['title']}  ")
        assert f"  {of_loss['value']:.4f} ± {of_loss['stderr']:.4f}  " in line
        bits = row["bits_per_byte"]["value"]
        assert f"  {row['perplexity']:,.2f}" in line and f"  {bits:.4f}  " in line
        assert f"  {of_answers['value']:.4f} ± {of_answers['stderr']:.4f}  " in line
        assert line.endswith("  15")
    less = two["less_first"]["loss"]
    assert lines[8].split()[0] == str(models["two"])
    assert f"  {less['value']:+.4f} ± {less['stderr']:.4f}  " in lines[8]
    assert lines[9:] == ["a difference below two standard errors may be due to chance"]


def test_bits_per_byte_are_the_nats_of_all_windows_per_byte_of_their_text(
    models: dict[str, Path], dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows(capsys, models["one"], "--data", dataset_dir, "--tokens", 9 * SEQUENCE)
    dataset = open_dataset(dataset_dir)
    windows = Windows(dataset, "val", SEQUENCE).read(np.arange(9))
    decode = tokenizer.gpt2().decode_tokens_bytes
    size = sum(len(b"".join(decode([token for token in window[1:].tolist() if token != 50256]))) for window in windows)
    nats = float(plain_losses(make_model(1), dataset_dir, 9).sum()) * SEQUENCE
    assert row["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert row["bits_per_byte"]["stderr"] is None


def test_tasks_are_measured_like_the_plain_loop_and_compared(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"mine": tmp_path / "own.jsonl", "lambada": tmp_path / "words.jsonl"}
    own = [{"context": f"{number} is", "endings": ["even", "an odd one"], "label": number % 2} for number in range(20)]
    files["mine"].write_text("".join(json.dumps(line) + "\n" for line in own))
    word = [{"context": f"count to {number}", "endings": ["now"], "label": 0} for number in range(20)]
    files["lambada"].write_text("".join(json.dumps(line) + "\n" for line in word))
    words = (models["one"], models["two"], "--tasks", ",".join(f"{name}={path}" for name, path in files.items()))
    first, second = rows(capsys, *words, "--items", 15)
    right = []
    for row, seed in ((first, 1), (second, 2)):
        sums = [score_one(make_model(seed), item) for item in task_items(files["mine"], "mine")[:15]]
        right.append([float(each.argmax() == number % 2) for number, each in enumerate(sums)])
        assert row["tasks"]["mine"]["acc"]["value"] == pytest.approx(np.mean(right[-1]))
        logs = [score_one(make_model(seed), item)[0] for item in task_items(files["lambada"], "lambada")[:15]]
        assert row["tasks"]["lambada"]["perplexity"]["value"] == pytest.approx(math.exp(-np.mean(logs)), rel=1e-4)
        assert row["loss"] is row["hellaswag"] is row["bits_per_byte"] is None
    less = second["difference"]["tasks"]["mine"]["acc"]
    paired = np.subtract(right[1], right[0])
    assert less["value"] == pytest.approx(paired.mean())
    assert less["stderr"] == pytest.approx(paired.std(ddof=1) / math.sqrt(15))
    assert run(*words) == exit_codes.DONE
    lines = capsys.readouterr().out.splitlines()
    assert f"mine: 20 items, {files['mine']}" in lines
    table = lines[next(at for at, line in enumerate(lines) if "evaluation" in line) :]
    assert table[0].split() == ["model", "evaluation", "acc", "acc_norm", "perplexity"]
    assert [line.split()[-1 if "lambada" in line else -4] != "" for line in table[1:5]] == [True] * 4
    assert "minus the first" in table[5]


def test_items_that_are_too_long_for_a_model_are_counted(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["short", "a" + " a" * 40, "a" + " a" * 100]
    lines = [{"context": text, "endings": ["even", "odd"], "label": 0} for text in texts]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(models["one"], models["short"], "--tasks", f"mine={path}") == exit_codes.DONE
    notes = [line for line in capsys.readouterr().out.splitlines() if "longer than" in line]
    assert notes == [
        "mine: 2 items longer than 32 tokens, cut at the start",
        "mine: 1 item longer than 64 tokens, cut at the start",
    ]


def test_all_models_are_measured_at_the_shortest_context(
    models: dict[str, Path], dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (models["one"], models["short"], "--data", dataset_dir, "--tokens", 10 * SEQUENCE)
    first, second = rows(capsys, *words)
    assert first["window_tokens"] == second["window_tokens"] == SEQUENCE // 2
    assert first["windows"] == second["windows"] == 20
    assert run(*words) == exit_codes.DONE
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("sequence lengths"))
    assert line == (
        "sequence lengths differ (32 and 64 tokens): losses at different lengths are not comparable; all models are"
        " measured on windows of 32"
    )


def test_an_exported_file_has_the_same_loss(
    models: dict[str, Path], dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(1)
    exported.write(dict(model.state_dict()), model.shape, {}, tmp_path / "one.pt")
    _, row = rows(capsys, models["one"], tmp_path / "one.pt", "--data", dataset_dir, "--tokens", 5 * SEQUENCE)
    assert row["less_first"] == {"loss": {"value": 0.0, "stderr": 0.0}, "hellaswag": None, "tasks": {}}


def test_a_broken_model_has_null_figures_in_valid_json(
    dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(1)
    model.ln_f.weight.data.fill_(3e38)  # finite, as a file's weights must be; the logits are not
    words = [write_model(model, tmp_path / "broken"), "--data", dataset_dir, "--tokens", 1, "--json"]
    assert run(*words) == exit_codes.CRASHED
    printed, errors = capsys.readouterr()
    assert "broken is not finite: the weights are broken" in errors
    (row,) = json.loads(printed)["rows"]
    assert row["loss"] == {"value": None, "stderr": None}
    assert row["perplexity"] is None


@pytest.mark.slow
def test_checkpoints_are_measured_on_the_data_of_their_run(
    four_ranks: tuple[object, Path], dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = four_ranks[1]
    run_dir = folder / "runs" / "test"
    assert run(run_dir, "--tag", TAGS[0], "--tag", "12") == exit_codes.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"loss: 40 validation windows of {SEQUENCE} tokens, {dataset_dir} (data.dir of the run)"
    assert lines[1] == f"HellaSwag: 30 items, text original, {folder / 'items.jsonl'} (hellaswag.path of the run)"
    found = rows(capsys, run_dir, "--tag", TAGS[0], "--tag", "12")
    for row, tag in zip(found, TAGS, strict=True):
        about = manifest.read(folder / "checkpoints" / "test" / tag)
        assert row["title"] == f"test, step {about.step} ({tag})"
        assert (row["path"], row["step"]) == (str(folder / "checkpoints" / "test" / tag), about.step)
        assert row["tokens"] == about.state["tokens"] == about.step * 16 * SEQUENCE
        assert row["loss"]["value"] == pytest.approx(about.val_loss, abs=0.01)  # measured in bf16
    assert found[1]["less_first"]["loss"]["value"] < -10 * found[1]["less_first"]["loss"]["stderr"]
    (newest,) = rows(capsys, run_dir, "--data", dataset_dir, "--tokens", 40 * SEQUENCE, "--items", 5)
    assert newest["loss"] == found[1]["loss"]
    assert newest["items"] == 5


def test_missing_data_is_reported(
    four_ranks: tuple[object, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / TAGS[1]
    shutil.copytree(four_ranks[1] / "checkpoints" / "test" / TAGS[1], moved)
    about = manifest.read(moved)
    settings = about.settings | {"data": {"dir": "/gone"}}
    (moved / MANIFEST).write_bytes(manifest.encode(about.model_copy(update={"settings": settings})))
    (row,) = rows(capsys, moved, "--hellaswag", four_ranks[1] / "items.jsonl", "--items", 5)
    assert row["loss"] is None and row["items"] == 5
    with pytest.raises(UserError, match=r"give --data DIR .*; the run's data.dir, /gone, does not exist"):
        run(moved, "--tokens", 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ONE"], "nothing to measure on: give --data DIR .* or --hellaswag FILE or --tasks NAMES"),
        (["ONE", "--tasks", "arc"], "--tasks arc: no such evaluation: give NAME=FILE .* arc_challenge, arc_easy"),
        (["ONE", "--tasks", ""], "--tasks: an empty name: give NAME=FILE"),
        (["ONE", "--tasks", "mine="], "--tasks mine=: no file: give mine=FILE"),
        (["ONE", "--tasks", "a=x,a=y"], "--tasks a: given twice, as .*/x and as .*/y"),
        (["ONE", "--tasks", "hellaswag"], "--tasks hellaswag: .* give --hellaswag FILE"),
        (["ONE", "--tasks", "Arc=ITEMS"], "--tasks Arc: a name has only lower-case letters"),
        (["ONE", "--tasks", "mine=nowhere"], "nowhere cannot be read"),
        (["ONE", "--tasks", "arc_easy"], "arc_easy.jsonl cannot be read .*`./launch.sh prepare evaluation arc_easy`"),
        (["ONE", "--tasks", "all"], "--tasks all: no evaluation is prepared"),
        (["ONE", "--items", "3", "--data", "DATA"], "--items 3: no HellaSwag file"),
        (["ONE", "--tokens", "3", "--hellaswag", "ITEMS"], "--tokens 3: no data"),
        (["ONE", "TWO", "--tag", "12", "--data", "DATA"], "--tag applies to one run"),
        (["ONE", "--tag", "12", "--data", "DATA"], "has no checkpoints"),
        (["ONE", "nowhere", "--data", "DATA"], "no run nowhere"),
        (["ONE", "--data", "nowhere"], "nowhere does not exist"),
        (["ONE", "--hellaswag", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_errors_are_one_line(
    models: dict[str, Path], dataset_dir: Path, items_file: Path, words: list[str], message: str
) -> None:
    paths = {"ONE": models["one"], "TWO": models["two"], "DATA": dataset_dir, "ITEMS": items_file}
    with pytest.raises(UserError, match=message) as caught:
        run(*(paths.get(word, word) for word in words))
    assert "\n" not in str(caught.value)


def test_a_missing_or_full_gpu_is_a_one_line_error(
    models: dict[str, Path], dataset_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: PyTorch .* finds no GPU"):
        command.run(parser.parse_args([str(models["one"]), "--device", "cuda"]))
    monkeypatch.setattr(evaluate, "window_losses", full)
    with pytest.raises(UserError, match="out of GPU memory, try --device cpu"):
        run(models["one"], "--data", dataset_dir)


def test_a_progress_bar_is_shown_on_a_terminal(
    models: dict[str, Path], dataset_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(models["one"], "--data", dataset_dir, "--tokens", SEQUENCE) == exit_codes.DONE
    printed = capsys.readouterr()
    assert f"{models['one']}: loss:" in printed.err and "window" in printed.err
    assert "loss:   0%" not in printed.out
