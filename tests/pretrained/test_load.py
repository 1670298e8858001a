"""Weights of other programs: those that are read compute the logits of transformers, others are errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pretrained_helpers import CONFIG, TOKENS, WEIGHTS, make, ours, rewrite, theirs

from ds_gpt2.common.errors import UserError
from ds_gpt2.model.shape import VOCABULARY
from ds_gpt2.pretrained.load import as_model, is_pretrained, padding_note, read, weights_for

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_dtypes_are_read(copy: Path, dtype: torch.dtype) -> None:
    rewrite(copy, lambda weights: weights.update({name: each.to(dtype) for name, each in weights.items()}))
    torch.testing.assert_close(ours(copy), theirs(copy), atol=2e-4, rtol=1e-4)


def test_weights_without_prefix_and_with_masks_are_read(copy: Path) -> None:
    expected = theirs(copy)

    def to_old_format(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        for layer in range(2):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.uint8).tril()
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(copy, to_old_format)
    torch.testing.assert_close(ours(copy), expected, atol=2e-4, rtol=1e-4)


def test_a_stored_head_must_equal_the_embedding(copy: Path) -> None:
    expected = theirs(copy)
    rewrite(copy, lambda weights: weights.update({"lm_head.weight": weights["transformer.wte.weight"].clone()}))
    torch.testing.assert_close(ours(copy), expected, atol=2e-4, rtol=1e-4)

    def untie(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"][5, 5] += 1e-3

    rewrite(copy, untie)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding wte\.weight"):
        read(copy)


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.h.1.mlp.c_fc.bias"][3] = float("nan")


def _beyond_fp32(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.ln_f.bias"] = torch.full((32,), 1e300, dtype=torch.float64)


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.update({name: weights[name].to(dtype)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_nan, r"h\.1\.mlp\.c_fc\.bias has values that are Inf or NaN"),
        (_beyond_fp32, r"ln_f\.bias has values that are Inf or NaN in fp32"),
        (_cast("transformer.ln_f.bias", torch.int64), r"transformer\.ln_f\.bias is of dtype I64"),
        (_cast("transformer.h.0.attn.c_attn.weight", torch.int8), r"c_attn\.weight is of dtype I8"),
        (_cast("transformer.wte.weight", torch.float8_e4m3fn), r"wte\.weight is of dtype F8_E4M3"),
        (_cast("transformer.ln_f.bias", torch.bool), r"ln_f\.bias is of dtype BOOL"),
        (_cast("transformer.ln_f.bias", torch.complex64), r"ln_f\.bias is of dtype C64"),
        (lambda weights: weights.pop("transformer.h.0.ln_1.bias"), r"has no h\.0\.ln_1\.bias"),
        (lambda weights: weights.update(other=torch.zeros(2)), "has an unknown tensor other"),
        (lambda weights: weights.update({"a\nb": torch.zeros(2)}), r"has an unknown tensor 'a\\nb'"),
        (
            lambda weights: weights.update({"wte.weight": weights["transformer.wte.weight"].clone()}),
            r"has both (transformer\.)?wte\.weight and (transformer\.)?wte\.weight",
        ),
        (
            lambda weights: weights.update({"transformer.ln_f.bias": torch.zeros(1, 32)}),
            r"ln_f\.bias is \(1, 32\), but the model's config requires \(32,\)",
        ),
        (
            lambda weights: weights.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)}),
            r"c_fc\.weight is stored as \(128, 32\), .* requires \(32, 128\): it is transposed$",
        ),
        (lambda weights: weights.update({"lm_head.weight": torch.zeros(3, 32)}), r"lm_head\.weight is \(3, 32\)"),
        (
            lambda weights: weights.update({"transformer.lm_head.weight": torch.zeros(3)}),
            "has an unknown tensor transformer",
        ),
    ],
)
def test_wrong_weights_are_errors_with_the_name_of_the_tensor(
    copy: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(copy, edit)
    with pytest.raises(UserError, match=message) as raised:
        read(copy)
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value)


def test_paths_without_a_model_are_errors(copy: Path, tmp_path: Path) -> None:
    (copy / CONFIG).unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read(copy)
    for path in (copy / WEIGHTS, copy / "pytorch_model.bin"):
        path.touch()
        with pytest.raises(UserError, match=f"{path} is one file of a model: give its directory, {copy}"):
            read(path)
    with pytest.raises(UserError, match="nowhere does not exist: give a Hugging Face directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"no model in {tmp_path}"):
        read(tmp_path)
    for function in (read, is_pretrained):
        with pytest.raises(UserError, match="x cannot be read: File name too long"):
            function(tmp_path / ("x" * 300))


@pytest.mark.parametrize("vocabulary", [50_258, 50_304, 50_311, 51_200])
def test_padding_of_the_vocabulary_is_removed(tmp_path: Path, vocabulary: int, log_messages: list[str]) -> None:
    """The loss is over GPT-2's tokens: that of transformers without the probability of the padding."""
    directory = make(tmp_path / "padded", vocabulary)
    logits, targets = theirs(directory)[:-1], TOKENS[0, 1:]
    assert logits.shape[1] == vocabulary
    torch.testing.assert_close(ours(directory)[:-1], logits[:, :VOCABULARY], atol=2e-4, rtol=1e-4)
    found = read(directory)
    with torch.no_grad():
        loss = float(as_model(found.shape, found.weights)(TOKENS[:, :-1], TOKENS[:, 1:]))
    assert loss == pytest.approx(float(F.cross_entropy(logits[:, :VOCABULARY], targets)), abs=1e-4)
    real = logits.softmax(-1)[:, :VOCABULARY].sum(-1)
    assert loss == pytest.approx(float(F.cross_entropy(logits, targets) + real.log().mean()), abs=1e-4)
    assert real.log().mean() < -1e-6, "the padding has no probability"
    assert found.padding == vocabulary - VOCABULARY
    assert f"vocabulary of {vocabulary:,}: the {vocabulary - VOCABULARY:,} rows" in str(padding_note(found))
    assert len(weights_for(found.shape, str(directory))["wte.weight"]) == VOCABULARY
    assert log_messages == [f"{directory}: {padding_note(found)}"]


def test_a_model_without_padding_has_no_note(plain: Path) -> None:
    assert padding_note(read(plain)) is None
