import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ds_gpt2.model import loss
from ds_gpt2.model.loss import chunk_tokens, cross_entropy

VOCABULARY, PADDED, WIDTH = 1000, 1024, 16


def _inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = (0.3 * torch.randn(PADDED, WIDTH, generator=generator)).to(dtype).requires_grad_()
    return hidden, head, torch.randint(VOCABULARY, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [1, 8, 13, 64])  # less than a chunk, whole chunks, an incomplete last chunk
def test_loss_and_gradients_equal_those_of_pytorch(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss._CHUNK_BYTES, "cpu", 8 * 4 * PADDED)
    hidden, head, targets = _inputs(tokens, torch.float32)
    ours = cross_entropy(hidden, head, targets, VOCABULARY)
    (3 * ours).backward()
    got = [hidden.grad, head.grad]
    hidden.grad = head.grad = None
    expected = F.cross_entropy(hidden @ head[:VOCABULARY].t(), targets)
    (3 * expected).backward()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[0], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], head.grad, rtol=1e-5, atol=1e-6)


def test_padding_has_no_probability_and_no_gradient() -> None:
    hidden, head, targets = _inputs(16, torch.float32)
    with torch.no_grad():
        head[VOCABULARY:] = 100.0  # would have the highest probability
    cross_entropy(hidden, head, targets, VOCABULARY).backward()
    assert head.grad is not None
    assert head.grad[VOCABULARY:].abs().max() == 0
    assert head.grad[:VOCABULARY].abs().max() > 0


def test_a_very_unlikely_target_has_a_finite_loss() -> None:
    """The probability underflows to 0 in fp32; the loss must be the difference of the logits."""
    head = torch.zeros(PADDED, WIDTH)
    head[0, 0] = 300.0
    hidden = torch.zeros(1, WIDTH)
    hidden[0, 0] = 1.0
    assert cross_entropy(hidden, head, torch.tensor([1]), VOCABULARY).item() == pytest.approx(300.0)


def test_bf16_gradients_are_as_accurate_as_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss._CHUNK_BYTES, "cpu", 8 * 4 * PADDED)
    exact_hidden, exact_head, targets = _inputs(64, torch.float32)
    F.cross_entropy(exact_hidden @ exact_head[:VOCABULARY].t(), targets).backward()
    assert exact_hidden.grad is not None and exact_head.grad is not None
    errors = []
    for function in (
        lambda h, w: cross_entropy(h, w, targets, VOCABULARY),
        lambda h, w: F.cross_entropy((h @ w[:VOCABULARY].t()).float(), targets),
    ):
        hidden, head, _ = _inputs(64, torch.bfloat16)
        function(hidden, head).backward()
        assert hidden.grad is not None
        assert head.grad is not None
        errors.append((head.grad.float() - exact_head.grad).norm() + (hidden.grad.float() - exact_hidden.grad).norm())
    assert errors[0] < 1.5 * errors[1]


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, head, targets = _inputs(64, torch.float32)
    products = []
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, FlopCounterMode(display=False) as counter:
            loss = cross_entropy(hidden, head, targets, VOCABULARY)
        products.append(counter.get_total_flops())
        assert loss.requires_grad == (len(products) == 1)
    assert products == [3 * 2 * 64 * PADDED * WIDTH, 2 * 64 * PADDED * WIDTH]


def test_a_chunk_is_a_power_of_two_within_its_budget() -> None:
    cpu = torch.device("cpu")
    assert chunk_tokens(50_304, cpu) == 512
    assert chunk_tokens(10**9, cpu) == 1
