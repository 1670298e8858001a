"""Files of ``export --format fp32``: wrong, damaged and forged ones are errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ds_gpt2.common.errors import UserError
from ds_gpt2.pretrained import torch_file
from ds_gpt2.pretrained.load import read, shape_at

pytestmark = pytest.mark.usefixtures("one_thread")


def _export(path: Path, edit: Callable[[dict[str, Any]], object], model: Path) -> Path:
    found = read(model)
    weights = dict(found.weights, **{"wte.weight": F.pad(found.weights["wte.weight"], (0, 0, 0, 47))})
    torch_file.write(weights, found.shape, {}, path)
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    return path


def _weight(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["model"].update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.pop("shape"), "does not have the model's shape"),
        (lambda content: content["shape"].update(layers=10**6), r"has no h\.2\."),
        (
            lambda content: content["shape"].update(layers=10**15),
            "layers is 1,000,000,000,000,000, more than 1,000,000",
        ),
        (lambda content: content["shape"].update(layers="2"), "is not a model's shape"),
        (lambda content: content["shape"].update(heads=3), "width 32 is not divisible by heads 3"),
        (lambda content: content["shape"].update(width=True), "is not a model's shape"),
        (lambda content: content.update(model=[1]), "no dictionary of weights"),
        (_weight("ln_f.bias", 3), "'ln_f.bias' is not a weight"),
        (lambda content: content["model"].update({3: torch.zeros(1)}), "'3' is not a weight"),
        (_weight("ln_f.bias", torch.zeros(32, dtype=torch.int64)), r"ln_f\.bias is of dtype torch\.int64"),
        (_weight("ln_f.bias", torch.zeros(32).to(torch.float8_e5m2)), r"ln_f\.bias is of dtype torch\.float8"),
        (_weight("ln_f.bias", torch.zeros(32).to_sparse()), r"ln_f\.bias is not stored as a contiguous CPU tensor"),
        (_weight("ln_f.bias", torch.zeros(1).expand(32)), r"ln_f\.bias is not stored as a contiguous CPU tensor"),
        (_weight("ln_f.bias", torch.zeros(32, device="meta")), r"ln_f\.bias is not stored as a contiguous CPU tensor"),
        (_weight("ln_f.bias", torch.zeros(31)), r"ln_f\.bias is \(31,\)"),
        (_weight("more", torch.zeros(31)), "has an unknown tensor more"),
    ],
)
def test_an_export_with_wrong_content_is_an_error(
    plain: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = _export(tmp_path / "model.pt", edit, plain)
    for function in (read, shape_at):
        with pytest.raises(UserError, match=message) as raised:
            function(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_an_export_that_is_not_finite_is_an_error(plain: Path, tmp_path: Path) -> None:
    path = _export(tmp_path / "model.pt", _weight("ln_f.bias", torch.full((32,), float("inf"))), plain)
    with pytest.raises(UserError, match=r"ln_f\.bias has values that are Inf or NaN"):
        read(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_export_of_another_float_dtype_is_read(plain: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def cast(content: dict[str, Any]) -> None:
        content["model"] = {name: each.to(dtype) for name, each in content["model"].items()}

    found = read(_export(tmp_path / "model.pt", cast, plain)).weights
    for name, expected in read(plain).weights.items():
        assert torch.equal(found[name], expected.to(dtype).float()), name


@pytest.mark.parametrize("size", [0, 1, 100, 100_000])
def test_a_truncated_export_is_an_error(plain: Path, tmp_path: Path, size: int) -> None:
    path = _export(tmp_path / "model.pt", lambda content: None, plain)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.pt is not a valid file of `export --format fp32`: .") as raised:
        read(path)
    assert "\n" not in str(raised.value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("code was run"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a text\n", "it is damaged, or not a file of torch.save"),
        (b"", "it is damaged, or not a file of torch.save"),
        (Harmful(), "it contains objects other than tensors and plain values, such as code, which are not loaded"),
    ],
    ids=["text", "empty", "code"],
)
def test_a_file_of_another_format_is_an_error(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as raised:
        read(path)
    assert str(raised.value) == f"{path} is not a valid file of `export --format fp32`: {message}"
