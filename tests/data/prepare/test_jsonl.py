"""Documents from JSON lines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prepare_helpers import read

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.documents import Unreadable
from ds_gpt2.data.prepare.sources import LocalFile, local_source

DEEP = '{"text": ' + "[" * 20_000 + "]" * 20_000 + "}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[]", "not a JSON object but a list"),
        ("null", "not a JSON object but null"),
        ("{}", 'no field "text", the object is empty'),
        ('{"text": 1}', 'field "text" is a number, not a string'),
        ('{"content": "x", "id": 1}', 'no field "text", it has "content", "id": give --column NAME'),
        (DEEP, "not JSON (nested too deeply)"),
    ],
    ids=lambda value: value[:10],
)
def test_an_invalid_line_is_one_unreadable_document(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + '\n{"text": "one"}\n{"text": "two"}\n')
    assert read(path) == [Unreadable(f"{path}, line 1: {reason}"), "one", "two"]
    assert next(iter(local_source([path]).parts)).documents(1).__next__() == "one"
    path.write_text('{"text": "one"}\n' + line + "\n" + line)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2: {reason}")):
        local_source([path])


def test_a_json_array_or_object_is_an_error_with_a_command_to_convert_it(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}"} for number in range(9)]
    for content in (json.dumps(rows), json.dumps(rows, indent=1), "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=r"x\.json is one JSON array.*jq -c '\.\[\]'"):
            local_source([tmp_path / "x.json"])
    (tmp_path / "x.json").write_text(json.dumps({"text": "x"}, indent=1))
    with pytest.raises(UserError, match=r"x\.json, line 1: not JSON .*jq -c \. "):
        local_source([tmp_path / "x.json"])


def test_a_field_of_another_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "one"}\n')
    assert list(LocalFile(tmp_path / "x.jsonl", "content").documents(0)) == ["one"]
