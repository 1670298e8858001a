"""Settings of a mixture: what is accepted, what is refused, and where its paths point."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import load_run_settings, stored_settings
from ds_gpt2.config.settings import PROJECT_DIR, Settings, load_settings

WEB, CODE = {"dir": "data/web", "weight": 0.7}, {"dir": "data/code", "weight": 0.3, "epochs": 2}


def loaded(tmp_path: Path, data: dict[str, object], *overrides: str) -> Settings:
    tree = {
        "model": {"preset": "7M"},
        "schedule": {"steps": 1000},
        "data": data,
        "run": {"dir": str(tmp_path / "runs")},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_settings(path, dict(each.split("=", 1) for each in overrides), cwd=tmp_path)


def test_sources_of_all_stages_are_listed_once(tmp_path: Path) -> None:
    books = {"dir": "data/books", "weight": 1, "name": "novels"}
    settings = loaded(tmp_path, {"mixture": [WEB, CODE], "stages": [{"from_step": 9, "mixture": [books, WEB]}]})
    assert [source.label for source in settings.data.sources] == ["web", "code", "novels"]
    assert settings.data.sources[0].dir == PROJECT_DIR / "data" / "web"
    assert settings.data.sources[2].dir == PROJECT_DIR / "data" / "books"


def test_a_null_means_no_limit(tmp_path: Path) -> None:
    settings = loaded(tmp_path, {"mixture": [WEB, {**CODE, "epochs": None}]})
    assert settings.data.sources[1].epochs is None


def test_an_override_replaces_the_directory_and_the_other_way_round(tmp_path: Path) -> None:
    settings = loaded(tmp_path, {"dir": "data/web"}, "data.mixture=[{dir: a, weight: 1}, {dir: b, weight: 2}]")
    assert [source.dir for source in settings.data.sources] == [tmp_path / "a", tmp_path / "b"]
    back = loaded(tmp_path, {"mixture": [WEB, CODE], "stages": [{"from_step": 9, "mixture": [WEB]}]}, "data.dir=c")
    assert [source.dir for source in back.data.sources] == [tmp_path / "c"] and back.data.stages == ()


def test_stored_paths_are_relative_to_the_project_and_move_with_it(tmp_path: Path) -> None:
    inside = {"dir": str(tmp_path / "data" / "own"), "weight": 1}
    settings = loaded(tmp_path, {"mixture": [WEB, inside]})
    settings.run_dir.mkdir(parents=True)
    text = stored_settings(settings)
    assert "dir: data/web" in text and f"dir: {tmp_path}" not in text
    (settings.run_dir / "config.yaml").write_text(text)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    found = load_run_settings(moved / "runs" / "mine").data.sources
    assert [source.dir for source in found] == [PROJECT_DIR / "data" / "web", moved / "data" / "own"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "give data.dir, the directory of a dataset, or data.mixture"),
        ({"dir": "data/web", "mixture": [WEB]}, "both are given"),
        ({"mixture": []}, "neither is given"),
        ({"dir": "data/web", "stages": [{"from_step": 2, "mixture": [WEB]}]}, "data.stages needs data.mixture"),
        ({"mixture": [WEB, WEB]}, "data.mixture has two sources named web"),
        ({"mixture": [WEB, {"dir": "other/web", "weight": 1}]}, "two sources named web"),
        ({"mixture": [WEB, {**CODE, "weight": 0}]}, "data.mixture[1].weight=0: must be at least 1e-12"),
        ({"mixture": [WEB], "stages": [{"from_step": 2, "mixture": []}]}, "too few entries: at least 1 must be given"),
        ({"mixture": [WEB, {**CODE, "weight": 0.0001}]}, "code has less than one window in 1,000"),
        ({"mixture": [WEB, {"dir": "data/code"}]}, "data.mixture[1].weight is not set"),
        ({"mixture": [{**WEB, "wieght": 3}]}, "unknown setting data.mixture[0].wieght"),
        ({"mixture": [{**WEB, "dir": "data/my web"}]}, "'my web' is not the name of a source: set name"),
        ({"mixture": [{**WEB, "dir": ""}]}, "data.mixture.dir is an empty path"),
        ({"mixture": "data/web"}, "data.mixture=data/web: must be a list"),
        ({"mixture": ["data/web"]}, "data.mixture"),
        ({"mixture": [WEB], "stages": [{"from_step": 1, "mixture": [CODE]}]}, "data.stages[0].from_step=1: "),
        (
            {"mixture": [WEB], "stages": [{"from_step": step, "mixture": [CODE]} for step in (9, 5)]},
            "data.stages must be in the order of from_step, which is 9, 5",
        ),
        (
            {"mixture": [WEB], "stages": [{"from_step": 9, "mixture": [{"dir": "new/web", "weight": 1}]}]},
            "data.stages: web is already another directory",
        ),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, data: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        loaded(tmp_path, data)
    assert "\n" not in str(error.value)
