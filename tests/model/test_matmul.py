"""Products of bf16 matrices computed in fp32, as on CPUs without bf16 instructions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ds_gpt2.model import matmul
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "BF16_IS_SLOW", True)
    torch.manual_seed(3)


def exact(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    total = a.double() @ b.double()
    return (total if bias is None else total + bias.double()).bfloat16()


@pytest.mark.parametrize(
    "shape", [(7, 5, 3000), (3000, 5, 7), (7, 3000, 5), (1024, 16, 1024), (1, 1, 1), (2500, 2500, 3)]
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_the_rounded_exact_one(shape: tuple[int, int, int], with_bias: bool, transposed: bool) -> None:
    m, k, n = shape
    a = torch.randn(k, m).bfloat16().t() if transposed else torch.randn(m, k).bfloat16()
    b = torch.randn(n, k).bfloat16().t() if transposed else torch.randn(k, n).bfloat16()
    bias = torch.randn(n).bfloat16() if with_bias else None
    found, expected = matmul.product(a, b, bias), exact(a, b, bias)
    assert found.dtype == torch.bfloat16 and found.shape == (m, n)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3 * k**0.5)
    assert (found != expected).float().mean() < 0.01  # fp32 sums may round in the other direction in close cases


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_and_its_gradients_equal_those_of_pytorch_in_fp32(bias: bool) -> None:
    layer = torch.nn.Linear(24, 40, bias=bias).bfloat16()
    x = torch.randn(3, 5, 24).bfloat16().requires_grad_()
    upstream = torch.randn(3, 5, 40).bfloat16()
    found = matmul.linear(x, layer.weight, layer.bias)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad(found, inputs, upstream)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = F.linear(*wide)
    assert torch.equal(found, expected.bfloat16())
    for mine, theirs in zip(grads, torch.autograd.grad(expected, wide, upstream.float()), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs.bfloat16(), rtol=2**-7, atol=1e-6)


def test_loss_and_gradients_of_a_model_equal_those_with_pytorchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2(ModelShape(2, 2, 32, 16)).bfloat16()
    tokens, targets = torch.randint(50_257, (2, 2, 16))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    loss, gradient = step()
    monkeypatch.setattr(matmul, "BF16_IS_SLOW", False)
    native_loss, native = step()
    assert loss == pytest.approx(float(native_loss), rel=1e-3)
    assert (gradient - native).norm() < 0.02 * native.norm()


def test_other_dtypes_and_fast_processors_use_pytorchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.addmm", None)  # used for tiles
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal(matmul.product(a, b), a @ b)
    monkeypatch.setattr(matmul, "BF16_IS_SLOW", False)
    assert torch.equal(matmul.product(a.bfloat16(), b.bfloat16()), a.bfloat16() @ b.bfloat16())


def test_all_products_of_a_model_except_attention_use_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    product = matmul.product

    def spy(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return product(a, b, bias)

    monkeypatch.setattr(matmul, "product", spy)
    model = GPT2(ModelShape(2, 2, 32, 16)).bfloat16()
    model.logits(torch.zeros(1, 4, dtype=torch.long))
    assert shapes == [*[(4, 32, 96), (4, 32, 32), (4, 32, 128), (4, 128, 32)] * 2, (4, 32, 50_257)]


@pytest.mark.slow
def test_a_processor_without_bf16_instructions_is_detected() -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # oneDNN's documentation, "CPU Dispatcher Control"
    program = "from ds_gpt2.model.matmul import BF16_IS_SLOW; print(BF16_IS_SLOW)"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "True\n" or platform.machine() != "x86_64"
