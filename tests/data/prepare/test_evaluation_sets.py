"""Published evaluations: from rows of the hub to our format, by the command, with a local hub server."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow
import pytest
from hub_server import COMMIT, Hub
from pyarrow import parquet

from benchmarks.evaluation_rows import rows_of
from ds_gpt2 import cli
from ds_gpt2.common.files import sha256
from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES
from ds_gpt2.data.evaluation_files import load_items
from ds_gpt2.data.prepare import hub_download
from ds_gpt2.data.prepare.evaluation_sets import PUBLISHED
from ds_gpt2.run_dir import exit_codes

ITEMS = 12
# Rows, and the line of our format, from the definitions of lm-evaluation-harness 0.4.13.
LINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "arc_easy": (
        {"question": "Why?", "choices": {"text": ["a", "b c", "d"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"context": "Question: Why?\nAnswer:", "endings": ["a", "b c", "d"], "label": 1},
    ),
    "openbookqa": (
        {"question_stem": "The sun", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": " B"},
        {"context": "The sun", "endings": ["x", "y"], "label": 1},
    ),
    "piqa": (
        {"goal": "cut it", "sol1": "Saw.", "sol2": "Sing.", "label": 0},
        {"context": "Question: cut it\nAnswer:", "endings": ["Saw.", "Sing."], "label": 0},
    ),
    "winogrande": (
        {"sentence": "Ann paid, so _ left.  ", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"contexts": ["Ann paid, so Ann", "Ann paid, so Bea"], "ending": "left.", "label": 1},
    ),
    "boolq": (
        {"passage": "It is.", "question": "is it", "label": 1},
        {"context": "It is.\nQuestion: is it?\nAnswer:", "endings": ["no", "yes"], "label": 1},
    ),
    "copa": (
        {"premise": "He fell. ", "choice1": "It was icy.", "choice2": "She sang.", "question": "cause", "label": 0},
        {"context": "He fell because", "endings": [" it was icy.", " she sang."], "label": 0},
    ),
    "sciq": (
        {"support": " S.", "question": "Q?", "distractor1": "a", "distractor2": "b", "distractor3": "c"}
        | {"correct_answer": "d"},
        {"context": "S.\nQuestion: Q?\nAnswer:", "endings": ["a", "b", "c", "d"], "label": 3},
    ),
    "lambada": ({"text": "a  b c"}, {"context": "a  b", "endings": ["c"], "label": 0}),
}


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    content = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


def prepare(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert cli.main(["prepare", "evaluation", *map(str, words)]) == code
    seen = capsys.readouterr()
    return seen.err if code else seen.out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve all evaluations, each with other splits and configs beside the one that is evaluated."""
    datasets: dict[str, dict[str, bytes]] = {}
    for name, published in PUBLISHED.items():
        folder = published.config or "data"
        wrong = as_parquet([{"wrong": 1}])
        datasets.setdefault(published.repository, {}).update(
            {
                f"{folder}/{published.split}-00000-of-00002.parquet": as_parquet(rows_of(name, ITEMS)[:7]),
                f"{folder}/{published.split}-00001-of-00002.parquet": as_parquet(rows_of(name, ITEMS)[7:]),
                f"{folder}/train-00000-of-00001.parquet": wrong,
                f"other/{published.split}-00000-of-00001.parquet": wrong,
                "README.md": b"#",
            }
        )
    monkeypatch.setattr(hub_download, "_LIST_ATTEMPTS", 1)
    with Hub(datasets) as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield served


@pytest.mark.parametrize("name", LINES)
def test_a_row_becomes_the_text_that_the_harness_scores(name: str) -> None:
    row, line = LINES[name]
    assert PUBLISHED[name].convert(row) == line


def test_every_name_of_the_settings_can_be_prepared() -> None:
    assert tuple(PUBLISHED) == EVALUATION_NAMES


def test_all_evaluations_are_downloaded_and_recorded(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluations"
    text = prepare(capsys, "all", "--out", out)
    for name, published in PUBLISHED.items():
        path = out / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert lines == [published.convert(row) for row in rows_of(name, ITEMS)]
        record = json.loads((out / f"{name}.json").read_text())
        assert (record["source"], record["revision"]) == (published.repository, COMMIT)
        assert (record["items"], record["sha256"]) == (ITEMS, sha256(path))
        folder = published.config or "data"
        assert [file["path"] for file in record["files"]] == [
            f"{folder}/{published.split}-0000{part}-of-00002.parquet" for part in (0, 1)
        ]
        assert f"{name}: {ITEMS} items in {path}, from {published.repository} at {COMMIT[:12]}" in text
        assert len(load_items(path, name)) == ITEMS
    visible = [path.name for path in out.iterdir() if path.suffix != ".npz"]
    assert sorted(visible) == sorted(f"{name}.{end}" for name in PUBLISHED for end in ("json", "jsonl"))
    requests = sum(hub.requests.values())
    prepare(capsys, "all", "--out", out)  # exists: nothing is downloaded again
    assert sum(hub.requests.values()) == requests
    listed = prepare(capsys, "--list", "--out", out)
    assert listed.count(COMMIT[:12]) == len(PUBLISHED)


def test_a_local_file_of_the_hub_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("piqa", 5)
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in ("a.parquet", "a.jsonl"):
        assert "piqa: 5 items" in prepare(capsys, "piqa", "--from", tmp_path / source, "--out", tmp_path / "out")
        lines = (tmp_path / "out" / "piqa.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [PUBLISHED["piqa"].convert(row) for row in rows]
    (tmp_path / "own.jsonl").write_bytes((tmp_path / "out" / "piqa.jsonl").read_bytes())  # already in our format
    prepare(capsys, "piqa", "--from", tmp_path / "own.jsonl", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "piqa.jsonl").read_bytes() == (tmp_path / "own.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["piqa", "winogrande"])
def test_only_the_fields_of_our_format_are_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = PUBLISHED[name].convert(rows_of(name, 1)[0])
    more = {"raw": b"\xff", "day": datetime.date(2026, 1, 1)}
    (tmp_path / "own.parquet").write_bytes(as_parquet([{**line, **more}]))
    prepare(capsys, name, "--from", tmp_path / "own.parquet", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / f"{name}.jsonl").read_text()) == line


def test_all_may_stand_beside_names(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    text = prepare(capsys, "piqa", "all", "--out", tmp_path / "out")
    assert text.count(" items in ") == len(PUBLISHED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all", "arc"], "no such evaluation: arc; known are"),
        (["arc"], "no such evaluation: arc; known are arc_challenge, "),
        ([], "give one of arc_challenge, "),
        (["all", "--from", "x"], "--from gives one file, not those of 9 evaluations"),
        (["piqa", "--from", "gone.jsonl"], "gone.jsonl cannot be read: No such file"),
        (["piqa", "--from", "BAD"], "bad.jsonl, line 2: not a JSON object"),
        (["sciq", "--from", "OTHER"], "other.jsonl, row 1: no field 'support' of sciq in goal, sol1, sol2, label"),
        (["piqa", "--from", "LABEL"], 'label.jsonl, row 1: not an item of piqa: "label" is not'),
        (["piqa"], "cannot be downloaded"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_download, "_LIST_ATTEMPTS", 1)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    row = json.dumps(rows_of("piqa", 1)[0])
    files = {"BAD": f"{row}\nx\n", "OTHER": f"{row}\n", "LABEL": json.dumps({**json.loads(row), "label": 5})}
    for name, content in files.items():
        (tmp_path / f"{name.lower()}.jsonl").write_text(content)
    words = [str(tmp_path / f"{word.lower()}.jsonl") if word in files else word for word in words]
    text = prepare(capsys, *words, "--out", tmp_path / "out", code=exit_codes.MISTAKE)
    assert message in text and text.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_missing_on_the_hub_is_an_error(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.datasets["allenai/sciq"] = {"data/test.csv": b""}
    text = prepare(capsys, "sciq", "--out", tmp_path / "out", code=exit_codes.MISTAKE)
    assert "no parquet file of the split test" in text and "--from FILE" in text


def test_a_prepared_file_that_was_changed_is_prepared_again(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(capsys, "copa", "--out", tmp_path)
    before = (tmp_path / "copa.jsonl").read_bytes()
    (tmp_path / "copa.jsonl").write_bytes(before[:-5])
    prepare(capsys, "copa", "--out", tmp_path)
    assert (tmp_path / "copa.jsonl").read_bytes() == before
