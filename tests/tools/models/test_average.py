"""Which checkpoints ``export --average`` takes, and what it refuses; tests/system/test_ema.py compares the means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import FILES, SHAPE, write_checkpoint

from ds_gpt2.checkpoint import commit, manifest, weights
from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import Weights
from ds_gpt2.checkpoint.manifest import read as read_manifest
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.common.errors import UserError
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.tools.models import average
from ds_gpt2.tools.models.average import choose_checkpoints, mean_model
from ds_gpt2.tools.resources.run_checkpoints import find_checkpoint

AVERAGED = {"ema": {"decay": 0.99}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Four rolling checkpoints of steps 100 to 400, the third without a moving average; links, and one superseded."""
    directory = tmp_path / "test"
    for step in (100, 200, 300, 400):
        write_checkpoint(directory, rolling_tag(step), step, settings={} if step == 300 else AVERAGED)
    commit.link(Disk(), directory / rolling_tag(400), directory, "epoch_00001")
    commit.link(Disk(), directory / rolling_tag(100), directory, "best_model")
    write_checkpoint(directory, "superseded_step_000500", 500)
    return directory


@pytest.fixture
def choose(directory: Path) -> Callable[..., tuple[list[int], list[str]]]:
    """Return a function that returns the steps of the chosen checkpoints, and the warnings."""

    def call(which: str, kind: Weights = "raw") -> tuple[list[int], list[str]]:
        warnings: list[str] = []
        return [one.step for one in choose_checkpoints(str(directory), which, kind, warnings.append)], warnings

    return call


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.pt"))
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.unlink()  # other tags are links to it
    file.write_bytes(content)


def test_a_number_takes_the_newest_full_checkpoints_of_the_history_once_each(
    choose: Callable[..., tuple[list[int], list[str]]],
) -> None:
    assert choose("2") == ([400, 300], [])
    assert choose("4") == ([400, 300, 200, 100], [])


def test_a_damaged_checkpoint_is_skipped_with_a_message(
    choose: Callable[..., tuple[list[int], list[str]]], directory: Path
) -> None:
    damage(directory / rolling_tag(300))
    steps, warnings = choose("3")
    assert steps == [400, 200, 100]
    (warning,) = warnings
    assert warning.startswith(f"{directory / rolling_tag(300)} is skipped: ") and warning.endswith("sha256 mismatch")


def test_a_checkpoint_without_a_moving_average_is_skipped(
    choose: Callable[..., tuple[list[int], list[str]]], directory: Path
) -> None:
    skipped = f"{directory / rolling_tag(300)} is skipped: it has no moving average of the weights"
    assert choose("3", "ema") == ([400, 200, 100], [skipped])


def test_names_are_taken_in_any_order(choose: Callable[..., tuple[list[int], list[str]]]) -> None:
    assert choose("best, 300,epoch_00001") == ([400, 300, 100], [])


@pytest.mark.parametrize(
    ("which", "kind", "expected"),
    [
        ("0", "raw", "--average 0: an average needs at least 2 checkpoints"),
        ("1", "raw", "--average 1: an average needs at least 2 checkpoints"),
        ("9", "raw", "has 4 usable full checkpoints (steps 400, 300, 200, 100): give --average 4"),
        ("9", "ema", "has 3 usable full checkpoints with averaged weights (steps 400, 200, 100): give --average 3"),
        ("best", "raw", "give a number of checkpoints, or two or more tags separated by commas"),
        ("100,", "raw", "give a number of checkpoints, or two or more tags separated by commas"),
        ("100,best_model", "raw", "--average: rolling_step_000100 and best_model are the same step: leave one out"),
        ("100,300", "ema", "rolling_step_000300 cannot be used (it has no moving average of the weights): leave it"),
        ("100,700", "raw", "no checkpoint '700' in"),
    ],
)
def test_what_cannot_be_averaged_is_refused_in_one_line(
    choose: Callable[..., tuple[list[int], list[str]]], which: str, kind: Weights, expected: str
) -> None:
    with pytest.raises(UserError) as error:
        choose(which, kind)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_checkpoint_that_is_named_is_refused(
    choose: Callable[..., tuple[list[int], list[str]]], directory: Path
) -> None:
    damage(directory / rolling_tag(300))
    with pytest.raises(UserError, match=r"rolling_step_000300 cannot be used \(.* sha256 mismatch\): leave it out"):
        choose("200,300")


def test_models_of_different_shapes_are_refused(
    choose: Callable[..., tuple[list[int], list[str]]], directory: Path
) -> None:
    write_checkpoint(directory, rolling_tag(600), 600, identity={**SHAPE, "model.layers": 2})
    with pytest.raises(UserError, match="--average 2: the checkpoints have models of different shapes"):
        choose("2")


def test_a_single_checkpoint_is_refused(directory: Path) -> None:
    with pytest.raises(UserError, match=r"--average 2: .*rolling_step_000100 is a single checkpoint: give its run"):
        choose_checkpoints(str(directory / rolling_tag(100)), "2", "raw", print)


def test_each_checkpoint_is_verified_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its weights are read: the tensors come from elsewhere here."""
    read: list[Path] = []
    real = manifest.problem_of
    monkeypatch.setattr(manifest, "problem_of", lambda path, name, entry: read.append(path) or real(path, name, entry))
    monkeypatch.setattr(weights, "fp32_weights", lambda path, kind: tensors(read_manifest(path).step))
    mean = mean_model(choose_checkpoints(str(directory), "100,300", "raw", print), "raw")
    assert mean.averaged_steps == (300, 100)
    assert all(bool((each == 200.0).all()) for each in mean.weights.values())
    assert len(read) == 2 * len(FILES)


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_step_is_never_in_the_mean_twice(directory: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The run replaces ``best_model``, chosen at step 100, by a checkpoint of step 400."""

    def read(path: Path, kind: str) -> dict[str, torch.Tensor]:
        if when == "while it is read" and path.name == "best_model":
            commit.link(Disk(), directory / rolling_tag(400), directory, "best_model")
        return tensors(1)

    monkeypatch.setattr(weights, "fp32_weights", read)
    chosen = choose_checkpoints(str(directory), "best,400", "raw", print)
    assert [one.step for one in chosen] == [400, 100]
    if when == "before it is read":
        commit.link(Disk(), directory / rolling_tag(400), directory, "best_model")
    with pytest.raises(UserError, match="best_model was replaced or deleted while it was read: repeat the command"):
        mean_model(chosen, "raw")


def test_a_checkpoint_that_is_replaced_while_it_is_verified_counts_with_its_new_step(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def find(run: str | None, tag: str) -> Generation:
        found = find_checkpoint(run, tag)
        if tag == "best":
            commit.link(Disk(), directory / rolling_tag(400), directory, "best_model")
        return found

    monkeypatch.setattr(average, "find_checkpoint", find)
    with pytest.raises(UserError, match="rolling_step_000400 and best_model are the same step: leave one out"):
        choose_checkpoints(str(directory), "400,best", "raw", print)


def tensors(value: int) -> dict[str, torch.Tensor]:
    """Return the weights of a model of ``SHAPE``, all of one value."""
    with torch.device("meta"):
        model = GPT2(ModelShape(1, 2, 8, 16))
    return {name: torch.full(each.shape, float(value)) for name, each in model.named_parameters()}
