"""Documents split at a separator."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from prepare_helpers import read
from pyarrow import parquet

from ds_gpt2.data.prepare.sources import Reading, local_source


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one<sep>two<sep>three", ["one", "two", "three"]),
        ("<sep><sep>x", ["", "", "x"]),
        ("x" * 3_000_000 + "<sep>" + "y" * 2_500_000 + "<sep>z", ["x" * 3_000_000, "y" * 2_500_000, "z"]),
        # Across the ends of blocks, which are 2 ** 20 characters.
        *((f"{'x' * (2**22 - cut)}<sep>two", ["x" * (2**22 - cut), "two"]) for cut in range(7)),
    ],
    ids=len,
)
def test_a_separator_splits_a_text_into_documents(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "x.txt").write_text(text)
    assert read(tmp_path / "x.txt", separator="<sep>") == parts
    (part,) = local_source([tmp_path / "x.txt"], reading=Reading(separator="<sep>")).parts
    for skip in range(len(parts)):
        assert ["".join(document or "") for document in part.documents(skip)] == parts[skip:]  # type: ignore[arg-type]  # text parts yield str or None


def test_a_separator_splits_lines_and_rows(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a|b", None, "c"]}), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"text": "a|b"}\n{"text": null}\n{"text": "c"}\n')
    for path in (tmp_path / "x.parquet", tmp_path / "x.jsonl"):
        assert read(path, separator="|") == ["a", "b", None, "c"]
