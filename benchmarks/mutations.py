"""Mutations of files for ``fuzz.py``: hypothesis strategies that change values, structure or bytes."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import strategies as st

from ds_gpt2.checkpoint import manifest

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**9, 10**12, 10**18, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from([1e308, 5e-324, float("inf"), float("nan")]),
    st.text(max_size=30),
    st.sampled_from(["", "x" * 300, "x" * 100_000, "..", "/", "~root", "~no-such-user/x", "a\0b", "\x1b[2J", "null"]),
    st.sampled_from(["2026-01-01", "9999-99-99", "1e9", "-0", "1_000", "0x10", "!!int abc", "$HOME", "${", "\ud800"]),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.text(max_size=8), SCALARS, max_size=4),
    st.sampled_from([500, 5000]).map(lambda depth: _nested(depth)),
    st.just([0] * 100_000),
)


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutations(form: str, original: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for mutations of ``original``."""
    if form == "bytes":
        return _changed_bytes(original)
    if form == "jsonl":
        lines = original.splitlines()
        changed = st.integers(0, len(lines) - 1).flatmap(
            lambda number: _changed_json(json.loads(lines[number])).map(
                lambda line: b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + b"\n"
            )
        )
        return changed | _changed_bytes(original)
    if form == "yaml":
        tree = yaml.safe_load(original)
        return _changed_tree(tree).map(_dump_yaml) | _changed_bytes(original)
    if form == "manifest":
        return _changed_tree({key: value for key, value in json.loads(original).items() if key != "sha256"}).map(_sign)
    return _changed_json(json.loads(original)) | _changed_bytes(original)


def _sign(tree: Any) -> bytes:
    """Return a manifest with a valid checksum."""
    content = tree if isinstance(tree, dict) else {"content": tree}
    try:
        return manifest._dump({**content, "sha256": manifest._digest(content)})
    except (RecursionError, ValueError, TypeError):
        return b"{}"


def _dump_yaml(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode(errors="surrogatepass")  # JSON is nearly a subset of YAML
    except (RecursionError, ValueError):
        return b"a: [" * 3000


def _changed_json(tree: Any) -> st.SearchStrategy[bytes]:
    def dump(changed: Any) -> bytes:
        try:
            return json.dumps(changed).encode()
        except (RecursionError, ValueError):
            return b"[" * 100_000

    return _changed_tree(tree).map(dump)


@st.composite
def _changed_tree(draw: st.DrawFn, tree: Any) -> Any:
    """Replace, remove, rename or wrap one to three nodes."""
    for _ in range(draw(st.integers(1, 3))):
        tree = draw(_changed_node(tree))
    return tree


@st.composite
def _changed_node(draw: st.DrawFn, tree: Any) -> Any:
    if isinstance(tree, dict) and tree and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(list(tree)))
        what = draw(st.integers(0, 9))
        if what == 0:
            return {name: value for name, value in tree.items() if name != key}
        if what == 1:
            return {(draw(st.text(max_size=8)) if name == key else name): value for name, value in tree.items()}
        return {**tree, key: draw(_changed_node(tree[key]))}
    if isinstance(tree, list) and tree and draw(st.integers(0, 9)):
        number = draw(st.integers(0, len(tree) - 1))
        return [*tree[:number], draw(_changed_node(tree[number])), *tree[number + 1 :]]
    return draw(VALUES | st.just([tree]) | st.just({"a": tree}))


@st.composite
def _changed_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    data = bytearray(original)
    reach = min(len(data), 4096) if draw(st.booleans()) else len(data)  # mostly in headers
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, reach - 1)))
        what = draw(st.sampled_from(["flip", "insert", "cut", "delete", "number"]))
        if what == "flip" and data:
            data[at % len(data)] ^= draw(st.integers(1, 255))
        elif what == "insert":
            data[at:at] = draw(
                st.binary(min_size=1, max_size=20) | st.sampled_from([b"\x1b[2J", b"\0" * 64, b"9" * 400])
            )
        elif what == "cut":
            del data[at:]
        elif what == "delete":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            data[at : at + 8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)
