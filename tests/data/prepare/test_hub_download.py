"""Datasets from a local hub server, with the real client and command, over connections that fail."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pytest
from hub_server import Hub
from huggingface_hub.errors import LocalEntryNotFoundError
from launched import PROJECT
from pyarrow import parquet

from ds_gpt2.common.errors import UserError
from ds_gpt2.data import tokenizer
from ds_gpt2.data.dataset import UNFINISHED, open_dataset
from ds_gpt2.data.prepare.holdout import FirstTokens
from ds_gpt2.data.prepare.hub_download import HubFile, fetch
from ds_gpt2.data.prepare.pipeline import Recipe, prepare
from ds_gpt2.data.prepare.sources import local_source
from ds_gpt2.data.shards import header_of

PROGRAM = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py")]  # as launch.sh does


def table_of(texts: list[str | None], ballast: int = 0) -> bytes:
    """Return a parquet file.

    Args:
        ballast: bytes of another column; the client writes 10 MB at a time and cannot continue a smaller download.
    """
    content = io.BytesIO()
    dump = [random.Random(number).randbytes(ballast // len(texts)) for number in range(len(texts))]
    columns = {"text": texts, "dump": dump, "score": [3.0] * len(texts)}
    parquet.write_table(pyarrow.table(columns), content, row_group_size=100)
    return content.getvalue()


@pytest.fixture(scope="module")
def tables() -> dict[str, bytes]:
    """Return files with the layout of a sample of FineWeb-Edu."""
    rng = random.Random(1)
    words = [f"word{number}" for number in range(3000)]
    return {
        f"sample/10BT/{number:03}_00000.parquet": table_of(
            [None if row == 7 else " ".join(rng.choices(words, k=150)) for row in range(400)],
            ballast=24_000_000 if number in (1, 2) else 0,
        )
        for number in range(5)
    }


def shard(tokens: list[int]) -> bytes:
    return header_of(len(tokens)) + np.array(tokens, "<u2").tobytes()


@pytest.fixture
def hub(tables: dict[str, bytes]) -> Iterator[Hub]:
    extra = {"README.md": b"# card", "data/CC-MAIN/000_00000.parquet": table_of(["not requested"])}
    end = tokenizer.END_OF_TEXT
    shards = {f"edu_fineweb_train_{number:06}.bin": shard([end, *range(number, number + 999)]) for number in (1, 2, 3)}
    shards["edu_fineweb_val_000000.bin"] = shard([end, *range(500)])
    datasets = {
        "HuggingFaceFW/fineweb-edu": {**tables, **extra},
        "karpathy/fineweb-edu-100B-gpt2-token-shards": shards,
        "some/wrong": {"x_val_0.bin": shard([1, 2]), "x_train_1.bin": shard([1, 60_000])},
        "some/text": {"a.csv": b"text"},
    }
    with Hub(datasets) as served:
        yield served


def start(hub: Hub | str, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start ``prepare`` in a user's environment."""
    url = hub if isinstance(hub, str) else hub.url
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [*PROGRAM, "prepare", *words, "--out", str(folder / "out")]
    return subprocess.Popen(
        command, cwd=PROJECT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def expected(tables: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> list[str | None]:
    """Return the checksums of the shards prepared from the same files on this machine."""
    folder = tmp_path_factory.mktemp("tables")
    for path, content in tables.items():
        (folder / Path(path).name).write_bytes(content)
    held_out = round(0.02 * sum(map(len, tables.values())) / 2.86)
    dataset = prepare(local_source([folder]), folder / "out", Recipe(FirstTokens(held_out)), workers=1)
    return [each.sha256 for each in dataset.shards]


@pytest.mark.slow
def test_a_sample_is_downloaded_despite_errors_of_the_hub(hub: Hub, tmp_path: Path, expected: list[str | None]) -> None:
    faults: dict[tuple[int, int], int | str] = {
        (0, 1): 429,
        (1, 1): "drop",
        (2, 1): 503,
        (2, 2): "drop",
        (3, 1): "corrupt",
    }
    hub.fault = lambda path, time: faults.get((int(Path(path).name[:3]), time))
    output = finish(start(hub, tmp_path, "fineweb-edu", "--workers", "2"))
    dataset = open_dataset(tmp_path / "out")
    assert [each.sha256 for each in dataset.shards] == expected
    assert dataset.counts == {"documents": 5 * 399, "empty": 0, "null": 5}
    assert dataset.source == "HuggingFaceFW/fineweb-edu/sample/10BT at 0123456789ab"
    assert len(hub.ranges) >= 2  # downloads continued instead of starting again
    assert "checksum mismatch; retrying in" in output
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"out"}
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".bin", ".bin", ".json"]


@pytest.mark.slow
def test_a_preparation_killed_during_downloads_continues(hub: Hub, tmp_path: Path, expected: list[str | None]) -> None:
    hub.fault = lambda path, time: "drop" if time == 1 else None
    for _ in range(3):
        process = start(hub, tmp_path, "fineweb-edu", "--workers", "1")
        before, deadline = sum(hub.requests.values()), time.monotonic() + 60
        while sum(hub.requests.values()) < before + 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.communicate()
        present = list((tmp_path / f"out{UNFINISHED}" / "fetched").rglob("*.parquet"))
        assert len(present) <= 2  # the file being read and the next one
    finish(start(hub, tmp_path, "fineweb-edu", "--workers", "1"))
    assert [each.sha256 for each in open_dataset(tmp_path / "out").shards] == expected


@pytest.mark.slow
def test_no_more_files_are_downloaded_than_needed(hub: Hub, tmp_path: Path) -> None:
    finish(start(hub, tmp_path, "fineweb-edu", "--tokens", "50000", "--workers", "1"))
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokens("val") == 1000 and dataset.tokens("train") == 49_000
    assert sum(hub.requests.values()) <= 2


@pytest.mark.slow
def test_token_shards_are_downloaded_and_verified(hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda path, time: "drop" if "train_000002" in path and time == 1 else None
    finish(start(hub, tmp_path, "pretokenized", "fineweb-edu100B", "--tokens", "1500"))
    dataset = open_dataset(tmp_path / "out")
    names = ["edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin", "edu_fineweb_train_000002.bin"]
    assert [each.file for each in dataset.shards] == names
    assert dataset.tokens("train") == 2000 and dataset.tokens("val") == 501
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "dataset.json"])


@pytest.mark.slow
def test_test_splits_are_left_out(hub: Hub, tmp_path: Path) -> None:
    names = [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    hub.datasets["some/splits"] = {name: table_of([f"{name} {row}" for row in range(90)]) for name in names}
    output = finish(start(hub, tmp_path, "hub", "some/splits", "--workers", "1"))
    assert "some/splits: left out 1 file of its test split" in output
    assert open_dataset(tmp_path / "out").counts["documents"] == 180
    assert not any("test-00000" in path for path in hub.requests)


@pytest.mark.slow
def test_token_shards_of_a_test_split_are_left_out(hub: Hub, tmp_path: Path) -> None:
    shards = hub.datasets["karpathy/fineweb-edu-100B-gpt2-token-shards"]
    shards["edu_fineweb_test_000000.bin"] = shard([tokenizer.END_OF_TEXT, *range(300)])
    output = finish(start(hub, tmp_path, "pretokenized", "fineweb-edu100B"))
    assert "left out 1 shard of a test split, recognized by name" in output
    assert open_dataset(tmp_path / "out").tokens("train") == 3000
    shards["more/edu_fineweb_train_000001.bin"] = shard([tokenizer.END_OF_TEXT, 5])
    output = finish(start(hub, tmp_path / "second", "pretokenized", "fineweb-edu100B"), code=2)
    assert "has shards of the same name in several directories" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hub", "no/such"], "error: no/such on {url}: there is no such dataset, or it requires an HF_TOKEN"),
        (
            ["hub", "some/text"],
            "error: some/text has no parquet files: download it yourself, then use `./launch.sh prepare text FILE...`",
        ),
        (["pretokenized", "some/text"], "error: some/text has no .bin shards for both training and validation"),
        (
            ["pretokenized", "some/wrong"],
            "error: x_train_1.bin of some/wrong has token id 60000 at position 1, GPT-2's highest is 50256",
        ),
        (["hub", "HuggingFaceFW/fineweb-edu", "--column", "body"], "error: {out}"),
    ],
)
def test_an_error_is_one_line(hub: Hub, tmp_path: Path, words: list[str], line: str) -> None:
    output = finish(start(hub, tmp_path, *words), code=2)
    assert output.splitlines()[-1].startswith(line.format(url=hub.url, out=tmp_path / "out.unfinished")), output
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_unreachable_hub_is_an_error_within_seconds(tmp_path: Path) -> None:
    start_time = time.monotonic()
    output = finish(start("http://127.0.0.1:9", tmp_path, "fineweb"), code=2)
    assert output.splitlines()[-1].startswith(
        "error: HuggingFaceFW/fineweb on http://127.0.0.1:9 cannot be downloaded: "
    )
    assert time.monotonic() - start_time < 30


@pytest.mark.parametrize(
    ("error", "requests", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot be stored: No space left on device; free some"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "cannot be stored: No space left on"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "cannot be stored: Permission denied"),
        (OSError(errno.ECONNRESET, "Connection reset"), 12, "cannot be downloaded: .*Connection reset"),
        (LocalEntryNotFoundError("no network"), 12, "cannot be downloaded: no network"),
    ],
    ids=str,
)
def test_only_errors_of_the_network_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, requests: int, message: str
) -> None:
    calls = []

    def fail(*words: object, **options: object) -> None:
        calls.append(words)
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=message) as raised:
        fetch(HubFile("some/data", "0" * 40, "a.parquet", 1, "mark", None), tmp_path)
    assert len(calls) == requests and "\n" not in str(raised.value)
