"""Settings of evaluations: names, paths, overrides, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES
from ds_gpt2.config.run_location import load_run_settings, public_tree, stored_settings
from ds_gpt2.config.settings import PROJECT_DIR, Settings, dump_settings, load_settings
from ds_gpt2.monitoring.pace import Cadence, evaluation_intervals

PUBLISHED_DIR = PROJECT_DIR / "data" / "evaluations"


def loaded(tmp_path: Path, evaluations: object, *overrides: str) -> Settings:
    tree = {
        "model": {"preset": "7M"},
        "schedule": {"steps": 1000},
        "data": {"dir": "data/web"},
        "run": {"dir": str(tmp_path / "runs")},
        "evaluations": evaluations,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_settings(path, dict(each.split("=", 1) for each in overrides), cwd=tmp_path)


def test_a_published_evaluation_has_the_path_of_its_preparation(tmp_path: Path) -> None:
    found = loaded(tmp_path, {name: {"every": 100} for name in EVALUATION_NAMES}).evaluations
    assert {name: each.path for name, each in found.items()} == {
        name: PUBLISHED_DIR / f"{name}.jsonl" for name in EVALUATION_NAMES
    }
    assert {each.items for each in found.values()} == {None}


def test_paths_in_the_file_are_relative_to_the_project_and_in_overrides_to_the_working_directory(
    tmp_path: Path,
) -> None:
    evaluations = {"mine": {"every": 5, "path": "my.jsonl"}}
    words = ("evaluations.other.path=a: b.jsonl", "evaluations.other.every=3")
    found = loaded(tmp_path, evaluations, *words).evaluations
    assert (found["mine"].path, found["other"].path) == (PROJECT_DIR / "my.jsonl", tmp_path / "a: b.jsonl")


def test_an_override_changes_one_evaluation_or_adds_one(tmp_path: Path) -> None:
    evaluations = {"arc_easy": {"every": 1000, "items": None}, "boolq": {"every": 7}}
    found = loaded(tmp_path, evaluations, "evaluations.arc_easy.every=500", "evaluations.copa.every=9").evaluations
    assert {name: each.every for name, each in found.items()} == {"arc_easy": 500, "boolq": 7, "copa": 9}
    whole = loaded(tmp_path, None, "evaluations={arc_easy: {every: 3, items: 10}}").evaluations
    assert (whole["arc_easy"].every, whole["arc_easy"].items) == (3, 10)
    assert loaded(tmp_path, {}).evaluations == {}


def test_stored_settings_are_read_back_and_move_with_the_run(tmp_path: Path) -> None:
    own = {"every": 5, "path": str(tmp_path / "data" / "own.jsonl")}
    settings = loaded(tmp_path, {"mine": own, "arc_easy": {"every": 100}})
    settings.run_dir.mkdir(parents=True)
    text = stored_settings(settings)
    assert "path: data/evaluations/arc_easy.jsonl" in text and f"path: {tmp_path}" not in text
    (settings.run_dir / "config.yaml").write_text(text)
    assert load_run_settings(settings.run_dir) == settings
    (tmp_path / "again.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "again.yaml") == settings
    moved = tmp_path.rename(tmp_path.with_name("moved_evaluations"))
    found = load_run_settings(moved / "runs" / "mine").evaluations
    assert found["mine"].path == moved / "data" / "own.jsonl"


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        ({"foo": {"every": 3}}, "evaluations.foo: no such evaluation: set its path, a file of items of your own, or"),
        ({"Foo": {"every": 3, "path": "x"}}, "evaluations.Foo: a name has only lower-case letters, digits and '_'"),
        ({"a" * 51: {"every": 3, "path": "x"}}, "a name has only"),
        ({"hellaswag": {"every": 3}}, "evaluations.hellaswag: HellaSwag has a section of its own: set hellaswag.every"),
        ({"mine": {"path": "x"}}, "evaluations.mine.every is not set"),
        ({"arc_easy": {"every": -1}}, "evaluations.arc_easy.every=-1: "),
        ({"arc_easy": {"every": 3, "items": 0}}, "evaluations.arc_easy.items=0: "),
        ({"arc_easy": {"evry": 3, "every": 3}}, "unknown setting evaluations.arc_easy.evry: an evaluation has every"),
        ({"mine": {"every": 3, "path": ""}}, "evaluations.path is an empty path"),
        ({"arc_easy": 3}, "evaluations.arc_easy=3: must be a section of settings, not a value"),
        ([1], "evaluations=['1']: must be a mapping of names to sections"),
    ],
)
def test_a_mistake_is_refused_in_one_line(tmp_path: Path, evaluations: object, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        loaded(tmp_path, evaluations)
    assert "\n" not in str(error.value)


def test_a_checkpoint_has_the_current_path_of_each_evaluation_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {name: {"every": 5, "path": str(tmp_path / f"{name}.jsonl")} for name in ("b", "a", "c")}
    settings = loaded(tmp_path, named, f"checkpoint.dir={tmp_path / 'checkpoints'}")
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "config.yaml").write_text(stored_settings(settings))
    monkeypatch.setattr(run_location, "run_of", lambda directory: settings.run_dir)
    in_manifest = public_tree(settings)
    in_manifest["evaluations"] = {name: {"every": 5, "path": "old"} for name in ("a", "b", "c", "gone")}
    found = run_location.current_settings(settings.checkpoint_dir / "rolling_step_000001", in_manifest)["evaluations"]
    paths = {name: entry["path"] for name, entry in found.items()}
    assert paths == {name: str(tmp_path / f"{name}.jsonl") for name in "abc"} | {"gone": None}


def test_evaluations_with_equal_intervals_are_one_kind_of_the_pace(tmp_path: Path) -> None:
    every = dict(zip(EVALUATION_NAMES, (100, 100, 50, 0, 100, 50, 7, 8, 9), strict=True))
    settings = loaded(tmp_path, {name: {"every": each} for name, each in every.items()})
    expected = {f"evaluations.{name}": each for name, each in every.items()}
    assert expected.items() <= evaluation_intervals(settings).items()
    kinds = {name: each for name, each in Cadence.of(settings).evaluations.items() if name.startswith("evaluations")}
    assert kinds == {f"evaluations every {each}": each for each in (7, 8, 9, 50)}
