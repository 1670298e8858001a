"""manifest.json is decoded exactly as it was encoded; everything else is refused."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gpt2.checkpoint import manifest
from ds_gpt2.checkpoint.catalog import open_generation, problem_of
from ds_gpt2.checkpoint.manifest import DamagedError, FileEntry, Manifest, decode, encode
from ds_gpt2.common import files
from ds_gpt2.common.safe_json import LARGEST

SHA = hashlib.sha256(b"weights").hexdigest()
REAL = Manifest(
    created="2026-11-24T23:15:33+01:00",
    epoch=0.0983,
    state={"step": 12, "tokens": 12_288, "val_loss": 9.95, "val_step": 12, "best_val_loss": None},
    world_size=1,
    identity={"model.layers": 2, "data": "6456e6ac4ca4d52e"},
    settings={"run": {"name": "tést"}, "optimizer": {"betas": [0.9, 0.95]}},
    versions={"torch": "2.11.0"},
    files={"mp_rank_00_model_states.pt": FileEntry(bytes=7, sha256=SHA)},
)
BYTES = encode(REAL)


def sealed(content: dict[str, Any]) -> bytes:
    """Return the encoding of any content with a valid SHA-256, as a forger would write it."""

    def dump(content: dict[str, Any]) -> bytes:
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

    content = {key: value for key, value in content.items() if key != "sha256"}
    return dump({**content, "sha256": hashlib.sha256(dump(content)).hexdigest()})


def forged(**changes: object) -> bytes:
    return sealed({**json.loads(BYTES), **changes})


def test_an_encoded_manifest_is_decoded() -> None:
    assert decode(BYTES) == REAL
    assert encode(decode(BYTES)) == BYTES == forged()
    assert (REAL.step, REAL.bytes, REAL.val_loss) == (12, 7, 9.95)


_integers = st.integers(-LARGEST, LARGEST)
_plain = st.recursive(
    st.none() | st.booleans() | _integers | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_plain_dict = st.dictionaries(st.text(), _plain, max_size=4)
_manifests = st.builds(
    Manifest,
    kind=st.sampled_from(["full", "weights"]),
    created=st.text(),
    epoch=st.floats(0, 1e6),
    state=_plain_dict.flatmap(lambda state: st.integers(0, LARGEST).map(lambda step: {**state, "step": step})),
    world_size=st.integers(1, 10_000),
    identity=_plain_dict,
    settings=_plain_dict,
    versions=st.dictionaries(st.text(), st.text(), max_size=3),
    files=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True).filter(lambda name: name != "manifest.json"),
        st.builds(FileEntry, bytes=st.integers(0, LARGEST), sha256=st.binary(min_size=32, max_size=32).map(bytes.hex)),
        max_size=4,
    ),
)


@pytest.mark.slow
@given(_manifests)
@settings(max_examples=200)
def test_any_manifest_survives_the_round_trip(written: Manifest) -> None:
    assert decode(encode(written)) == written


def test_the_validation_loss_is_only_that_of_the_same_step() -> None:
    assert REAL.model_copy(update={"state": {"step": 13, "val_loss": 9.95, "val_step": 12}}).val_loss is None
    assert REAL.model_copy(update={"state": {"step": 0}}).val_loss is None


def test_a_loss_of_nan_leaves_a_readable_manifest() -> None:
    """A run that diverges must still be able to save."""
    diverged = REAL.model_copy(update={"state": {"step": 12, "val_loss": float("nan"), "val_step": 12}})
    json.loads(encode(diverged), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert decode(encode(diverged)).val_loss is None


def test_every_change_of_one_byte_is_found() -> None:
    """At every position: each bit is flipped, and some bytes with a meaning in JSON are written."""
    missed = []
    for position, byte in enumerate(BYTES):
        others = {byte ^ 1 << bit for bit in range(8)} | set(b'\x00\xff 0e-"}{,\n') - {byte}
        for other in others:
            changed = bytearray(BYTES)
            changed[position] = other
            try:
                decode(bytes(changed))
            except DamagedError:
                continue
            missed.append((position, other))
    assert missed == []


def test_every_byte_lost_or_added_is_found() -> None:
    for position in range(len(BYTES)):
        for changed in (BYTES[:position] + BYTES[position + 1 :], BYTES[:position] + b" " + BYTES[position:]):
            with pytest.raises(DamagedError, match=r"manifest\.json"):
                decode(changed)
    with pytest.raises(DamagedError):
        decode(BYTES + b"\n")


@pytest.mark.parametrize("cut", ["start", "end", "zeros"])
def test_every_truncation_is_found(cut: str) -> None:
    """The end or the beginning is missing, or the end is zeros, as some file systems leave it."""
    for length in range(len(BYTES)):
        left = {
            "end": BYTES[:length],
            "start": BYTES[len(BYTES) - length :],
            "zeros": BYTES[:length].ljust(len(BYTES), b"\0"),
        }
        with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
            decode(left[cut])


def _files(**entries: object) -> dict[str, object]:
    return {"files": entries}


def _named(name: str) -> dict[str, object]:
    return {"files": {name: {"bytes": 7, "sha256": SHA}}}


FORGERIES = {
    "a file above": _named("../x"),
    "a file far above": _named("../../../../etc/passwd"),
    "an absolute file": _named("/etc/passwd"),
    "a file below": _named("a/b"),
    "the directory": _named("."),
    "the parent": _named(".."),
    "no name": _named(""),
    "a NUL": _named("a\0b"),
    "a line end": _named("a\n"),
    "half a surrogate pair": _named("\ud800"),
    "itself": _named("manifest.json"),
    "a negative size": _files(a={"bytes": -1, "sha256": SHA}),
    "a size in text": _files(a={"bytes": "7", "sha256": SHA}),
    "half a byte": _files(a={"bytes": 7.5, "sha256": SHA}),
    "NaN bytes": _files(a={"bytes": float("nan"), "sha256": SHA}),
    "infinitely many bytes": _files(a={"bytes": float("inf"), "sha256": SHA}),
    "true bytes": _files(a={"bytes": True, "sha256": SHA}),
    "a short hash": _files(a={"bytes": 7, "sha256": SHA[:-1]}),
    "a hash and a line end": _files(a={"bytes": 7, "sha256": SHA + "\n"}),
    "a hash in capitals": _files(a={"bytes": 7, "sha256": SHA.upper()}),
    "no hash": _files(a={"bytes": 7}),
    "an entry too many": _files(a={"bytes": 7, "sha256": SHA, "mode": "0777"}),
    "an entry that is none": _files(a=None),
    "a list of files": {"files": ["a"]},
    "no files": {"files": None},
    "no step": {"state": {}},
    "a step before the first": {"state": {"step": -1}},
    "NaN steps": {"state": {"step": float("nan")}},
    "a step in text": {"state": {"step": "12"}},
    "half a step": {"state": {"step": 12.0}},
    "a true step": {"state": {"step": True}},
    "a state that is a list": {"state": [12]},
    "no ranks": {"world_size": 0},
    "NaN ranks": {"world_size": float("nan")},
    "ranks in text": {"world_size": "4"},
    "an epoch in text": {"epoch": "1"},
    "another kind": {"kind": "everything"},
    "a version that is no text": {"versions": {"torch": 2}},
    "a date that is none": {"created": 1_700_000_000},
    "a name too many": {"command": "rm -rf /"},
    "another format": {"format": 3},
    "the format before": {"format": 1},
    "a true format": {"format": True},
    "the format in text": {"format": "2"},
    "the format as a fraction": {"format": 2.0},
    "no format": {"format": None},
}


@pytest.mark.parametrize("changes", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_manifest_is_refused_and_its_files_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """The SHA-256 is valid: the content is refused."""
    checkpoint = tmp_path / "rolling_step_000012"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_bytes(forged(**changes))
    touched: list[Path] = []
    _record(monkeypatch, touched)
    generation = open_generation(checkpoint)
    problem = problem_of(generation)
    monkeypatch.undo()
    assert generation.manifest is None
    assert problem is not None and problem.startswith(("manifest.json is invalid: ", "manifest.json has format "))
    assert touched == [checkpoint / "manifest.json"]


def _record(monkeypatch: pytest.MonkeyPatch, touched: list[Path]) -> None:
    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Path, *arguments: Any, **options: Any) -> Any:
            touched.append(self)
            return original(self, *arguments, **options)

        return call

    def recorded_open(path: Path, *arguments: Any, **options: Any) -> Any:
        touched.append(path)
        return open(path, *arguments, **options)

    for module in (manifest, files):
        monkeypatch.setattr(module, "open", recorded_open, raising=False)
    monkeypatch.setattr(Path, "stat", recording(Path.stat))


@pytest.mark.parametrize("name", ["format", "files", "state", "epoch", "created", "sha256", "world_size"])
def test_every_field_is_required(name: str) -> None:
    content = json.loads(BYTES)
    del content[name]
    data = sealed(content) if name != "sha256" else json.dumps(content).encode()
    if name == "format":
        with pytest.raises(DamagedError, match="format None; this version reads format 2"):
            decode(data)
    else:
        with pytest.raises(DamagedError):
            decode(data)


def test_another_format_is_not_reported_as_damage() -> None:
    with pytest.raises(DamagedError, match=r"manifest\.json has format 3; this version reads format 2"):
        decode(forged(format=3))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'["sha256"]',
        b"7",
        b'"sha256"',
        b"{}",
        b'{"sha256": 1}',
        b"\xff\xfe",
        b"\xef\xbb\xbf" + BYTES,
        BYTES.decode().encode("utf-16"),
        b"{" * 1000,
        b'{"sha256": NaN, "format": 2}',
        b'{"sha256": "", "a": ' + b"9" * 5000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_other_content_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        decode(data)


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_deeply_nested_json_is_refused(opening: str, closing: str) -> None:
    """Nest far beyond the recursion limits, and to every depth near them: reading and writing have different limits."""

    def nested(depth: int) -> bytes:
        return f'{{"sha256": "", "format": 2, "state": {opening * depth}1{closing * depth}}}'.encode()

    def is_read(depth: int) -> bool:
        try:
            json.loads(nested(depth))
        except RecursionError:
            return False
        return True

    limit = bisect.bisect_left(range(200_000), True, key=lambda depth: not is_read(depth))
    for depth in (500, 1_000, 5_000, 200_000, *range(limit - 8, limit + 3)):
        with pytest.raises(DamagedError):
            decode(nested(depth))


def test_a_duplicate_key_is_refused() -> None:
    first = BYTES.index(b'"epoch"')
    with pytest.raises(DamagedError):
        decode(BYTES[:first] + b'"epoch": 9.0,\n ' + BYTES[first:])


def test_the_error_of_an_unreadable_manifest_has_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read: No such file"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read: Is a directory"):
        manifest.read(tmp_path)


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.write(BYTES)
        file.truncate(2**40)  # a sparse file: it occupies no disk space
    with pytest.raises(DamagedError):
        manifest.read(tmp_path)
