"""Read files of the project with arbitrary content: a value, None or a one-line error, and no file is written."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_gpt2 import cli
from ds_gpt2.checkpoint import manifest
from ds_gpt2.checkpoint.catalog import newest_tag, scan
from ds_gpt2.checkpoint.commit import read_pointer, read_record
from ds_gpt2.checkpoint.manifest import DamagedError
from ds_gpt2.common import safe_json
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.output_owner import read_owner
from ds_gpt2.config.run_location import last_started
from ds_gpt2.config.settings_tree import read_tree
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.data.hellaswag import load_items
from ds_gpt2.data.shards import count_tokens
from ds_gpt2.engine.checkpoint_io import unpickle
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.pretrained.gpt2_config import read_config
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.journal import last_saved_step, parse_event, read_journal
from ds_gpt2.run_dir.metrics import parse_record, read_metrics
from ds_gpt2.run_dir.notes import read_notes
from ds_gpt2.run_dir.starts import first_start, last_start, read_starts
from ds_gpt2.run_dir.supervisor_record import read_supervisor_record

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "settings": ("config.yaml", lambda d: read_tree(d / "config.yaml")),
    "DeepSpeed's file": ("ds.json", lambda d: load_deepspeed_file(d / "ds.json")),
    "journal": ("journal.jsonl", lambda d: (list(read_journal(d)), last_saved_step(d))),
    "metrics": ("metrics.jsonl", lambda d: list(read_metrics(d / "metrics.jsonl"))),
    "starts": ("starts.jsonl", lambda d: (read_starts(d), first_start(d), last_start(d))),
    "start of a run": ("starts.jsonl", last_started),
    "owner": ("run.json", read_owner),
    "supervisor": ("supervisor.json", read_supervisor_record),
    "notes": ("NOTES.md", read_notes),
    "heartbeat": ("heartbeat/rank_00000", lambda d: read_beat(d, 0)),
    "manifest": ("rolling_step_000001/manifest.json", lambda d: manifest.read(d / "rolling_step_000001")),
    "checkpoints": ("rolling_step_000001/manifest.json", lambda d: (scan(d), newest_tag(d))),
    "a rank's record": ("rank_00000.json", lambda d: read_record(d, 0)),
    "pointer": ("latest", lambda d: read_pointer(d, "latest")),
    "index of data": ("dataset.json", open_dataset),
    "a shard": ("train_000000.bin", lambda d: count_tokens(d / "train_000000.bin")),
    "an array": ("train_000000.npy", lambda d: count_tokens(d / "train_000000.npy")),
    "HellaSwag": ("items.jsonl", lambda d: load_items(d / "items.jsonl", "original", d / "none" / "cache")),
    "a model's configuration": ("config.json", lambda d: read_config(d / "config.json")),
}
EXPECTED = (UserError, DamagedError, OSError, safe_json.BadJsonError)

DEEP = [b"[" * 100_000, b'{"a":' * 50_000, b"[" * 100_000 + b"]" * 100_000, b"a: " * 3000 + b"1"]
LONG = [b'{"step": ' + b"9" * 10_000 + b"}", b'{"step": 1e999}', b"1" * 5000, b'{"time": 1e400, "kind": "save"}']
ODD = [b"", b"\x00" * 4096, b"\xff\xfe{\x00", b"\xef\xbb\xbf{}", b"null", b"[]", b'"text"', b"{}", b"{", b"!!int abc"]


def files_in(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def check(directory: Path, reader: str, data: bytes) -> None:
    name, read = READERS[reader]
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(data)
    before = files_in(directory)
    message = ""
    try:
        read(directory)
    except EXPECTED as error:
        message = str(error)
    assert "\n" not in message and len(message) < 2000
    assert files_in(directory) == before


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("data", [*DEEP, *LONG, *ODD], ids=lambda data: repr(data[:12]))
def test_unusual_content(tmp_path: Path, reader: str, data: bytes) -> None:
    check(tmp_path, reader, data)
    check(tmp_path, reader, data + b"\n" + data)


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_arbitrary_bytes(tmp_path: Path, reader: str, data: bytes) -> None:
    check(tmp_path, reader, data)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_reading_a_pipe_directory_or_device_does_not_block(tmp_path: Path, reader: str, kind: str) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    ended = threading.Event()
    usual = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), usual[1]))  # an endless read fails at this limit
    found: list[BaseException] = []

    def run() -> None:
        try:
            read(tmp_path)
        except BaseException as error:
            found.append(error)
        ended.set()

    try:
        threading.Thread(target=run, daemon=True).start()
        assert ended.wait(20), "the read blocks"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)
    assert all(isinstance(error, EXPECTED) for error in found), found


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": "\xff"}', "byte 7 is not text in UTF-8"),
        (b'\xef\xbb\xbf"\xff"', "byte 4 is not text in UTF-8"),
        (b"\xff\xfe[\0]", "byte 4 is not text in UTF-16"),
        (b"[\0\0\0\0\0\0\xff", "byte 4 is not text in UTF-32-LE"),
    ],
)
def test_the_reason_for_bytes_that_are_not_text_is_not_that_of_the_codec(data: bytes, reason: str) -> None:
    with pytest.raises(safe_json.BadJsonError, match=f"^{re.escape(reason)}$"):
        safe_json.parse(data)


@pytest.mark.parametrize("number", ["1" + "0" * 30, "-" + "9" * 21, str(2**64 + 1)])
def test_whole_numbers_out_of_range_are_refused(number: str) -> None:
    with pytest.raises(safe_json.BadJsonError, match="out of range"):
        safe_json.parse(number)
    assert safe_json.parse(str(2**64)) == 2**64


@pytest.mark.parametrize(
    "event",
    [
        {"time": 1e300, "kind": "save", "text": ""},
        {"time": float("nan"), "kind": "save", "text": ""},
        {"time": 1.0, "kind": "save", "text": "", "step": [1]},
        {"time": 1.0, "kind": "save", "text": "", "facts": [1]},
        {"time": 1.0, "kind": ["save"], "text": ""},
    ],
)
def test_an_event_with_values_of_wrong_types_is_damaged(event: dict[str, object]) -> None:
    assert parse_event(json.dumps(event).encode()) is None


@pytest.mark.parametrize("time", [1e300, -1.0, float("nan"), "now", [1.0], True])
def test_an_invalid_time_is_left_out_of_a_record(time: object) -> None:
    record = parse_record(json.dumps({"step": 1, "time": time}))
    assert record is not None and "time" not in record


def test_the_expansion_of_yaml_aliases_is_limited(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]" for number in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="its aliases expand to more than 100,000 values") as caught:
        read_tree(tmp_path / "bomb.yaml")
    assert len(str(caught.value)) < 300
    (tmp_path / "fine.yaml").write_text("a: &a {b: 1}\nc: *a\nd: {<<: *a}\n")
    assert read_tree(tmp_path / "fine.yaml") == {"a": {"b": "1"}, "c": {"b": "1"}, "d": {"b": "1"}}


@pytest.mark.parametrize("size", [0, -1, 10**6 + 1, 10**9])
def test_an_impossible_model_shape_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="more than 1,000,000 or less than 1"):
        ModelShape(size, 2, 32, 64)
    with pytest.raises(ValueError, match="width 32 is not divisible by heads 3"):
        ModelShape(2, 3, 32, 64)


def test_an_error_shows_only_the_start_of_a_long_value(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"run: {{name: {'x' * 10**6}}}\n")
    (tmp_path / "dataset.json").write_text(
        json.dumps({"format": "x" * 10**6, "shards": [], "tokenizer": "", "source": ""})
    )
    assert cli.main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("...\n") and len(error) < 1600 and error.count("\n") == 1


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "n_positions"])
def test_sizes_in_a_model_configuration_are_limited(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", key: 10**9}))
    with pytest.raises(UserError, match=f"{key} is 1000000000; input should be less than or equal to 1000000"):
        read_config(tmp_path / "config.json")


def test_the_error_of_a_refused_pickle_does_not_suggest_loading_it(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "model.pt")
    with pytest.raises(pickle.UnpicklingError) as caught:
        unpickle(tmp_path / "model.pt")
    assert str(caught.value) == "model.pt is damaged, or holds more than tensors and plain values"
