"""HellaSwag's file: atomic download, checks of every line, text as other implementations form it."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ds_gpt2.commands import prepare
from ds_gpt2.common.errors import UserError
from ds_gpt2.data import hellaswag, tokenizer
from ds_gpt2.data.hellaswag import Question, TextStyle, fetch, load_items, prompt, read_questions, to_item
from ds_gpt2.data.items import Item
from ds_gpt2.run_dir import exit_codes

TEA = {
    "activity_label": "Making tea",
    "ctx_a": "[header] How to make tea [title] Boil the water.",
    "ctx_b": "then She",
    "ctx": "[header] How to make tea [title] Boil the water. then She",
    "endings": ["waits.", "[title] Pours [step] it.", "drinks the café's own.", "[substeps] Leave [title] Come back."],
    "label": 3,
}
BOAT = {**TEA, "activity_label": "Rowing", "ctx": "Two men row. the boat", "label": 0}


def question(**changes: object) -> Question:
    fields = TEA | changes
    return Question(*(fields[key] for key in ("activity_label", "ctx", "ctx_a", "ctx_b", "endings", "label")))  # type: ignore[arg-type]


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def decoded(item: Item) -> list[str]:
    decode = tokenizer.gpt2().decode
    return [decode(part.tolist()) for part in (item.context, *item.endings)]


def flat(item: Item) -> list[list[int]]:
    arrays: list[np.ndarray] = [item.context, *item.endings, item.characters, item.bytes]
    return [[item.label], *(array.tolist() for array in arrays)]


def test_original_text_is_unchanged() -> None:
    item = to_item(question(), "original")
    assert decoded(item) == [TEA["ctx"], *(f" {ending}" for ending in TEA["endings"])]  # type: ignore[attr-defined]
    assert item.label == 3
    assert item.characters.tolist() == [6, 24, 22, 35]
    assert item.bytes.tolist() == [6, 24, 23, 35]  # é has two bytes


def test_original_context_and_endings_are_tokenized_separately() -> None:
    encode = tokenizer.gpt2().encode_ordinary
    item = to_item(question(ctx="He said ", endings=["no", "yes", "what", "this"]), "original")
    assert item.context.tolist() == encode("He said ")
    assert [ending.tolist() for ending in item.endings] == [
        encode(" no"),
        encode(" yes"),
        encode(" what"),
        encode(" this"),
    ]


def test_cleaned_text_equals_that_of_lm_evaluation_harness() -> None:
    context, endings = prompt(question(), "cleaned")
    assert context == "Making tea: How to make tea. Boil the water. Then she"
    assert endings == ["waits.", " Pours it.", "drinks the café's own.", " Leave. Come back."]
    item = to_item(question(), "cleaned")
    assert decoded(item) == [context, *(f" {ending}" for ending in endings)]
    assert item.characters.tolist() == [6, 10, 22, 18]


def test_trailing_spaces_of_a_cleaned_context_belong_to_the_ending() -> None:
    item = to_item(question(ctx_a="Boil it.", ctx_b="[step]", endings=["a", "b", "c", "d"]), "cleaned")
    assert decoded(item) == ["Making tea: Boil it.", "  a", "  b", "  c", "  d"]
    whole = tokenizer.gpt2().encode_ordinary("Making tea: Boil it.  a")
    assert [*item.context, *item.endings[0]] == whole


def test_an_empty_context_becomes_end_of_text() -> None:
    assert to_item(question(ctx=""), "original").context.tolist() == [tokenizer.END_OF_TEXT]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe".decode("latin-1").join(["{", "}"]), "not JSON"),
        ("[1]", "not an object"),
        ({**TEA, "ctx_b": None}, 'no text in "ctx_b"'),
        ({key: value for key, value in TEA.items() if key != "ctx"}, 'no text in "ctx"'),
        ({**TEA, "endings": ["a", "b", "c"]}, '"endings" are not 4 texts'),
        ({**TEA, "endings": ["a", "b", "c", 4]}, '"endings" are not 4 texts'),
        ({**TEA, "endings": ["a", "b", "c", "[step]"]}, '"endings" are not 4 texts'),
        ({**TEA, "label": 4}, '"label" is not a number from 0 to 3'),
        ({**TEA, "label": "3"}, '"label" is not'),
        ({**TEA, "label": True}, '"label" is not'),
    ],
)
def test_an_invalid_line_is_an_error_with_its_number(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "items.jsonl", TEA, "", line)
    with pytest.raises(UserError, match=rf"items\.jsonl, line 3: .*{message}"):
        list(read_questions(path))


def test_a_missing_or_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read \(No such file.*`./launch.sh prepare hellaswag`"):
        load_items(tmp_path / "gone.jsonl", "original", tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        load_items(tmp_path / "empty.jsonl", "original", tmp_path)


def test_tokenized_items_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "items.jsonl", TEA, BOAT), tmp_path / "cache"
    styles: tuple[TextStyle, ...] = ("original", "cleaned")
    expected = {style: load_items(path, style, cache) for style in styles}
    assert len(list(cache.iterdir())) == 2
    monkeypatch.delattr(hellaswag, "to_item")
    for style, items in expected.items():
        again = load_items(path, style, cache)
        assert [flat(item) for item in again] == [flat(item) for item in items]
        assert again[0].context.dtype == np.uint16
    write(path, BOAT)
    with pytest.raises(NameError):  # the cache is not used for other content
        load_items(path, "original", cache)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_cache_is_written_again(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "items.jsonl", TEA, BOAT)
    before = load_items(path, "original", tmp_path / "cache")
    (cache,) = (tmp_path / "cache").iterdir()
    good = cache.read_bytes()
    middle = good.index(before[0].context.tobytes())
    bad = {
        "cut": good[: len(good) // 2],
        "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "emptied": b"",
        "other": b"PK\x03\x04" + bytes(100),
    }
    cache.write_bytes(bad[damage])
    assert [flat(item) for item in load_items(path, "original", tmp_path / "cache")] == [flat(item) for item in before]
    assert cache.read_bytes() == good
    assert list((tmp_path / "cache").iterdir()) == [cache]


def test_items_are_loaded_even_if_the_cache_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file instead of a directory")
    assert len(load_items(write(tmp_path / "items.jsonl", TEA, BOAT), "cleaned", tmp_path / "cache")) == 2


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` at /good, half of it at /dropped, and an error elsewhere."""

    content = (json.dumps(TEA) + "\n").encode() * 2000

    def do_GET(self) -> None:
        if self.path not in ("/good", "/dropped"):
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content if self.path == "/good" else self.content[: len(self.content) // 2])

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_a_download_with_the_expected_checksum_is_kept(tmp_path: Path, server: str) -> None:
    path = tmp_path / "deep" / "items.jsonl"
    fetch(path, f"{server}/good", hashlib.sha256(Answers.content).hexdigest())
    assert path.read_bytes() == Answers.content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("page", "digest", "message"),
    [
        ("good", "0" * 64, "checksum mismatch: .*/good has sha256"),
        ("dropped", hashlib.sha256(Answers.content).hexdigest(), "(cut short|IncompleteRead)"),
        ("gone", "0" * 64, "/gone cannot be downloaded to .*404"),
    ],
)
def test_a_failed_download_leaves_the_existing_file(
    tmp_path: Path, server: str, page: str, digest: str, message: str
) -> None:
    path = write(tmp_path / "items.jsonl", TEA)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        fetch(path, f"{server}/{page}", digest)
    assert "--from FILE" in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_connection_is_an_error_of_one_line(tmp_path: Path, server: str) -> None:
    with pytest.raises(UserError, match=r"cannot be downloaded to .*: .*refused"):
        fetch(tmp_path / "items.jsonl", "http://127.0.0.1:9/items.jsonl", "0" * 64)


def run(*words: str) -> int:
    """Run ``prepare hellaswag`` with these arguments."""
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args(["hellaswag", *words]))


def test_prepare_copies_a_local_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "mine.jsonl", TEA, BOAT), tmp_path / "out"
    assert run("--from", str(source), "--out", str(out)) == exit_codes.DONE
    copied = out / "hellaswag_val.jsonl"
    assert copied.read_bytes() == source.read_bytes()
    assert capsys.readouterr().out == f"2 items in {copied}: not the original file byte for byte\n"
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: not JSON"):
        run("--from", str(write(tmp_path / "bad.jsonl", "{")), "--out", str(out))
    assert copied.read_bytes() == source.read_bytes()


def test_prepare_downloads_a_missing_file(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(Answers.content).hexdigest())
    monkeypatch.setattr(hellaswag, "URL", f"{server}/good")
    assert run("--out", str(tmp_path)) == exit_codes.DONE
    assert capsys.readouterr().out == f"2,000 items in {tmp_path / 'hellaswag_val.jsonl'}: the original file\n"
    monkeypatch.setattr(hellaswag, "URL", f"{server}/gone")
    assert run("--out", str(tmp_path)) == exit_codes.DONE  # the file exists: nothing is downloaded


@pytest.mark.parametrize(
    "line", ["[" * 30_000, {**TEA, "endings": ["a", "b", "c", "half \ud800 pair"]}], ids=["deep", "half"]
)
def test_a_line_that_cannot_be_parsed_or_encoded_is_an_error(tmp_path: Path, line: object) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" if isinstance(each, dict) else f"{each}\n" for each in (TEA, line)))
    with pytest.raises(UserError, match=r"items\.jsonl, line 2: "):
        list(read_questions(path))


def test_many_open_brackets_are_cleaned_in_linear_time(tmp_path: Path) -> None:
    (item,) = read_questions(write(tmp_path / "items.jsonl", {**TEA, "ctx_a": "[step] tea " + "[" * 300_000}))
    start = time.monotonic()
    assert prompt(item, "cleaned")[0] == "Making tea:  tea ".replace("  ", " ") + "[" * 300_000 + " Then she"
    assert time.monotonic() - start < 20
