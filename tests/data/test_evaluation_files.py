"""Files of items: what is accepted, how text is tokenized, and the cache of tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evaluation_rows import rows_of
from ds_gpt2.common.errors import UserError
from ds_gpt2.data import evaluation_files, tokenizer
from ds_gpt2.data.evaluation_files import Choice, load_items, measures_of, to_item
from ds_gpt2.data.items import Item, ItemList
from ds_gpt2.data.prepare.evaluation_sets import PUBLISHED

LINE = {"context": "The sky is", "endings": ["blue", "a café", "made of stone"], "label": 1}
CONTEXTS, ENDING = ["Ann left, so Ann", "Ann left, so Bea"], "was sad."
BLANK = {"contexts": CONTEXTS, "ending": ENDING, "label": 1}


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def same(first: Item, second: Item) -> bool:
    arrays = [[item.context, *item.endings, item.characters, item.bytes] for item in (first, second)]
    equal = all(np.array_equal(one, other) for one, other in zip(*arrays, strict=True))
    scored = [[item.first_scored(number) for number in range(len(item.endings))] for item in (first, second)]
    return equal and scored[0] == scored[1] and first.label == second.label


def test_context_and_ending_are_joined_by_a_space() -> None:
    item = to_item(Choice(["The sky is"], ["blue", "a café"], 0))
    encode = tokenizer.gpt2().encode_ordinary
    assert item.context.tolist() == encode("The sky is")
    assert [ending.tolist() for ending in item.endings] == [encode(" blue"), encode(" a café")]
    assert item.characters.tolist() == [4, 6] and item.bytes.tolist() == [4, 7]
    assert item.unscored is None


def test_white_space_at_the_end_of_a_context_belongs_to_the_ending() -> None:
    item = to_item(Choice(["Why? \n"], ["so"], 0))
    decode = tokenizer.gpt2().decode
    assert [decode(item.context.tolist()), decode(item.endings[0].tolist())] == ["Why?", " \n so"]


def test_an_empty_context_becomes_end_of_text() -> None:
    item = to_item(Choice([""], ["a", "b"], 0))
    assert item.context.tolist() == [tokenizer.END_OF_TEXT]
    assert tokenizer.gpt2().decode(item.endings[0].tolist()) == " a"


def test_the_common_beginning_of_several_contexts_is_the_context_of_the_item() -> None:
    item = to_item(Choice(CONTEXTS, [ENDING], 1))
    decode = tokenizer.gpt2().decode
    assert decode(item.context.tolist()) == "Ann left, so"
    assert [decode(ending.tolist()) for ending in item.endings] == [" Ann was sad.", " Bea was sad."]
    scored = [ending[item.first_scored(number) :].tolist() for number, ending in enumerate(item.endings)]
    assert [decode(part) for part in scored] == [" was sad."] * 2


def test_contexts_without_a_common_beginning_leave_the_context_empty() -> None:
    item = to_item(Choice(["Ann", "Bea"], ["left."], 0))
    assert len(item.context) == 0 and item.unscored is not None and item.unscored.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", 'not an object with "context"'),
        ({**LINE, "context": None}, 'no text in "context"'),
        ({**LINE, "endings": "abc"}, '"endings" is not a list of texts'),
        ({**LINE, "endings": ["a", 2]}, '"endings" is not a list of texts'),
        ({**LINE, "endings": ["a"]}, '"endings" are 1, not 2 to 100 texts'),
        ({**LINE, "endings": ["a"] * 101}, '"endings" are 101, not 2 to 100 texts'),
        ({**LINE, "endings": ["a", " "]}, "an ending is empty"),
        ({**LINE, "endings": ["a", "\ud800"]}, '"endings" cannot be encoded as UTF-8'),
        ({**LINE, "label": 3}, '"label" is not a whole number from 0 to 2'),
        ({**LINE, "label": "1"}, '"label" is not'),
        ({**LINE, "label": True}, '"label" is not'),
        ({**BLANK, "ending": ["x"]}, 'no text in "ending"'),
        ({**BLANK, "contexts": ["x"]}, '"contexts" are 1, not 2 to 100 texts'),
        ({"contexts": ["a", "b"], "label": 0}, 'no text in "ending"'),
        ({**LINE, **BLANK}, 'give "context" and "endings", or "contexts" and "ending", not both'),
    ],
)
def test_an_invalid_line_is_an_error_with_its_number(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "mine.jsonl", LINE, "", line)
    with pytest.raises(UserError, match=rf"mine\.jsonl, line 3: {re.escape(message)}") as error:
        load_items(path, "mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_that_is_not_utf_8_is_an_error(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.jsonl").write_bytes(json.dumps({**LINE, "context": "é"}, ensure_ascii=False).encode(encoding))
    with pytest.raises(UserError, match=r"mine\.jsonl, line 1: not UTF-8; convert the file"):
        load_items(tmp_path / "mine.jsonl", "mine")


def test_a_last_word_has_one_ending(tmp_path: Path) -> None:
    one = {"context": "I see a", "endings": ["dog"], "label": 0}
    assert len(load_items(write(tmp_path / "one.jsonl", one), "lambada")) == 1
    with pytest.raises(UserError, match='line 1: "endings" are 3, not one word'):
        load_items(write(tmp_path / "more.jsonl", LINE), "lambada")


def test_a_missing_or_empty_file_is_an_error_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone cannot be read \(No such file.*prepare evaluation arc_easy` downloads"):
        load_items(tmp_path / "gone", "arc_easy")
    with pytest.raises(UserError, match=r"evaluations\.mine\.path"):
        load_items(tmp_path / "gone", "mine")
    with pytest.raises(UserError, match="empty has no items"):
        load_items(write(tmp_path / "empty", ""), "mine")


@pytest.mark.parametrize("name", PUBLISHED)
def test_items_are_read_back_from_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / f"{name}.jsonl", *map(PUBLISHED[name].convert, rows_of(name, 25)))
    first = load_items(path, name)
    (cache,) = (each for each in tmp_path.iterdir() if each != path)
    assert cache.name.startswith(f".{name}_") and "_gpt2_v1_" in cache.name
    monkeypatch.delattr(evaluation_files, "to_item")  # nothing is tokenized again
    again = load_items(path, name)
    assert len(first) == len(again) == 25 and all(map(same, first, again))
    assert again.nbytes < 25 * 1000


def test_a_damaged_cache_is_written_again(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", LINE, BLANK)
    load_items(path, "mine")
    (cache,) = tmp_path.glob(".mine*")
    whole = cache.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        cache.write_bytes(damaged)
        assert len(load_items(path, "mine")) == 2
        assert ItemList.read(cache) is not None


def test_the_cache_of_a_changed_file_replaces_the_earlier_one(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", LINE)
    kept = [
        write(tmp_path / name, LINE)
        for name in ("mine2.jsonl", ".mine_word_gpt2_v1_" + "0" * 64 + ".npz", ".mine_choice_gpt2_v1_notes.npz")
    ]
    load_items(kept[0], "mine2")
    load_items(path, "mine")
    (first,) = tmp_path.glob(".mine_choice_gpt2_v1_?????*[0-9a-f].npz")
    write(path, LINE, LINE)
    assert len(load_items(path, "mine")) == 2
    assert not first.exists() and all(each.exists() for each in kept)
    assert len([*tmp_path.glob(".mine_choice_*")]) == 2 and len([*tmp_path.glob(".mine2_choice_*")]) == 1


def test_the_cache_is_written_to_the_second_directory_if_the_first_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def refuse(items: ItemList, path: Path) -> bool:
        written.append(path)
        return path.parent.name == "run"

    monkeypatch.setattr(ItemList, "write", refuse)
    load_items(write(tmp_path / "mine.jsonl", LINE), "mine", tmp_path / "run")
    assert [path.parent for path in written] == [tmp_path, tmp_path / "run"]


def test_measures_are_those_of_the_harness() -> None:
    found: dict[str, Any] = {name: measures_of(name) for name in (*PUBLISHED, "mine")}
    assert found["lambada"] == ("acc", "perplexity")
    assert [name for name in found if found[name] == ("acc",)] == ["boolq", "copa", "winogrande"]
    assert found["mine"] == found["arc_easy"] == ("acc", "acc_norm")
