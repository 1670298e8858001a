import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from ds_gpt2.config.sections import PRESETS
from ds_gpt2.model.gpt2 import GPT2, flops_per_token, parameter_groups
from ds_gpt2.model.shape import PADDED_VOCABULARY, VOCABULARY, ModelShape

SHAPE = ModelShape(layers=3, heads=4, width=32, sequence_length=48)


@pytest.fixture(scope="module")
def pair() -> tuple[GPT2, GPT2LMHeadModel]:
    """Return our model and that of transformers, with equal random weights, biases and norms."""
    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=SHAPE.layers, n_head=SHAPE.heads, n_embd=SHAPE.width, n_positions=SHAPE.sequence_length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).train()
    ours = GPT2(SHAPE).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, parameter in ours.named_parameters():
            source = theirs.get_parameter(f"transformer.{name}")
            value = source.t() if name.split(".")[-2].startswith("c_") and source.dim() == 2 else source
            parameter[: value.shape[0]] = value
    return ours, theirs


def test_logits_equal_those_of_transformers(pair: tuple[GPT2, GPT2LMHeadModel]) -> None:
    ours, theirs = pair
    tokens = torch.randint(VOCABULARY, (2, SHAPE.sequence_length))
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_equal_those_of_transformers(pair: tuple[GPT2, GPT2LMHeadModel]) -> None:
    ours, theirs = pair
    window = torch.randint(VOCABULARY, (2, SHAPE.sequence_length + 1))
    tokens, targets = window[:, :-1], window[:, 1:]
    loss = ours(tokens, targets)
    loss.backward()
    expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in ours.named_parameters():
        reference = theirs.get_parameter(f"transformer.{name}").grad
        assert reference is not None
        assert parameter.grad is not None
        transposed = name.split(".")[-2].startswith("c_") and reference.dim() == 2
        got = parameter.grad[:VOCABULARY] if name == "wte.weight" else parameter.grad
        torch.testing.assert_close(got, reference.t() if transposed else reference, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("preset", "millions"), [("124M", 124.44), ("350M", 354.82), ("774M", 774.03), ("1558M", 1557.61)]
)
def test_presets_have_the_parameter_counts_of_openai(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = GPT2(ModelShape(*PRESETS[preset], sequence_length=1024))
    counted = sum(parameter.numel() for parameter in model.parameters())
    padding = (PADDED_VOCABULARY - VOCABULARY) * model.shape.width
    assert (model.shape.parameters, model.shape.unpadded_parameters) == (counted, counted - padding)
    assert model.shape.unpadded_parameters / 1e6 == pytest.approx(millions, abs=0.005)


def test_flops_per_token_equal_those_of_nanogpt() -> None:
    with torch.device("meta"):
        model = GPT2(ModelShape(*PRESETS["124M"], sequence_length=1024))
    assert flops_per_token(model) / 1e6 == pytest.approx(855.4, abs=0.05)


def test_initialization_follows_gpt2() -> None:
    torch.manual_seed(0)
    model = GPT2(ModelShape(layers=8, heads=4, width=128, sequence_length=64))
    residual = 0.02 / math.sqrt(16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_an_untrained_model_has_the_loss_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = GPT2(ModelShape(layers=2, heads=2, width=64, sequence_length=64))
    tokens, targets = torch.randint(VOCABULARY, (2, 4, 64))
    assert model(tokens, targets).item() == pytest.approx(math.log(VOCABULARY), abs=0.1)


def test_attention_is_causal() -> None:
    torch.manual_seed(0)
    model = GPT2(SHAPE).eval()
    tokens = torch.randint(VOCABULARY, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = 0
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_dropout_is_applied_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT2(SHAPE, dropout=0.5)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, 16))
    assert model(tokens, targets) != model(tokens, targets)
    model.eval()
    assert model(tokens, targets) == model(tokens, targets)


def test_weight_decay_applies_to_matrices_only() -> None:
    model = GPT2(SHAPE)
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in free["params"])
    grouped = [*decayed["params"], *free["params"]]
    assert len(grouped) == len(list(model.parameters()))
