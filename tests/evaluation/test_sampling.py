import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.tokenizer import END_OF_TEXT, gpt2
from ds_gpt2.engine.rng_state import get_rng_state
from ds_gpt2.evaluation.sampling import (
    Sampling,
    choose,
    derived_seed,
    encode_prompt,
    generate,
    next_tokens,
    probabilities,
    stream,
)
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import VOCABULARY, ModelShape

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Sampling(temperature=0.0)
SHAPE = ModelShape(layers=2, heads=2, width=32, sequence_length=16)


@pytest.fixture(scope="module")
def model() -> GPT2:
    """Return a random model with weights large enough that attention and positions determine the next token."""
    torch.manual_seed(1)
    model = GPT2(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _always_ends() -> GPT2:
    """Return a model that always predicts <|endoftext|>, with higher logits for the padding of the vocabulary."""
    model = GPT2(SHAPE).eval()
    with torch.no_grad():
        model.wte.weight.zero_()
        model.wte.weight[END_OF_TEXT] = 5.0
        model.wte.weight[VOCABULARY:] = 10.0
        model.ln_f.bias.fill_(1.0)
    return model


def _often_ends() -> GPT2:
    """Return a model that predicts <|endoftext|> with probability 1/4 after any context."""
    model = GPT2(SHAPE).eval()
    with torch.no_grad():
        model.wte.weight.zero_()
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.eye(SHAPE.width)[0])
        model.wte.weight[END_OF_TEXT, 0] = torch.tensor((VOCABULARY - 1) / 3).log()
    return model


@torch.no_grad()
def _greedy_without_cache(model: GPT2, prompt: list[int], tokens: int) -> list[int]:
    """Generate without a cache; a full context is cut to its newest three quarters."""
    longest = model.shape.sequence_length
    context, text = prompt[-longest:], []
    for _ in range(tokens):
        if len(context) > longest:
            context = context[-(longest * 3 // 4) :]
        text.append(int(model.logits(torch.tensor([context]))[0, -1].argmax()))
        context.append(text[-1])
    return text


def _tokens(model: GPT2, prompt: list[int], tokens: int, sampling: Sampling, seeds: list[int]) -> torch.Tensor:
    """Return the chosen tokens, (tokens, rows)."""
    return torch.stack(list(itertools.islice(next_tokens(model, prompt, sampling, seeds), tokens)))


def _shares(probability: list[float], sampling: Sampling) -> list[float]:
    return probabilities(torch.tensor([probability]).log(), sampling)[0].tolist()


@pytest.mark.parametrize("prompt_length", [1, 5, 15, 16, 17, 40])
def test_cached_and_uncached_tokens_are_equal_within_and_beyond_the_context(model: GPT2, prompt_length: int) -> None:
    prompt = torch.randint(VOCABULARY, (prompt_length,), generator=torch.Generator().manual_seed(4)).tolist()
    expected = _greedy_without_cache(model, prompt, 40)
    assert len(set(expected)) > 10
    chosen = _tokens(model, prompt, 40, GREEDY, [0, 0, 0])
    assert chosen.T.tolist() == [expected] * 3


def test_cached_and_uncached_logits_are_equal(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    monkeypatch.setattr(
        "ds_gpt2.evaluation.sampling.choose", lambda logits, *_: recorded.append(logits) or torch.tensor([7, 8])
    )
    _tokens(model, [1, 2, 3], 10, GREEDY, [0, 0])
    for row, token in enumerate([7, 8]):
        expected = model.logits(torch.tensor([[1, 2, 3] + [token] * 9]))[0, 2:]
        torch.testing.assert_close(torch.stack(recorded)[:, row], expected, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_equal_those_of_transformers() -> None:
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=64)).eval()
    ours = GPT2(ModelShape(layers=3, heads=4, width=32, sequence_length=64)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, parameter in ours.named_parameters():
            source = theirs.get_parameter(f"transformer.{name}")
            transposed = name.split(".")[-2].startswith("c_") and source.dim() == 2
            parameter[: VOCABULARY if name == "wte.weight" else None] = source.t() if transposed else source
    prompt = gpt2().encode_ordinary("The statement of")
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=END_OF_TEXT
    )[0, len(prompt) :].tolist()
    assert len(expected) == 50
    assert len(set(expected)) > 10
    assert _tokens(ours, prompt, 50, GREEDY, [0])[:, 0].tolist() == expected


def test_a_seed_determines_the_text_of_generate_and_stream(model: GPT2) -> None:
    sampling = Sampling(temperature=2.0, top_k=50, top_p=0.9)
    first = generate(model, "The", 20, sampling, count=3, seed=1)
    assert first == generate(model, "The", 20, sampling, count=3, seed=1)
    assert len(set(first)) == 3
    assert not set(first) & set(generate(model, "The", 20, sampling, count=3, seed=2))
    assert generate(model, "The", 20, sampling, seed=1) == first[:1]
    assert gpt2().decode(list(itertools.islice(stream(model, "The", sampling, seed=1), 20))) == first[0]


def test_a_continuation_does_not_depend_on_their_count(model: GPT2) -> None:
    five = generate(model, "The", 40, Sampling(), count=5, seed=7)
    assert [generate(model, "The", 40, Sampling(), count=count, seed=7) for count in (1, 2, 4)] == [
        five[:1], five[:2], five[:4],
    ]  # fmt: skip


def test_derived_seeds_differ() -> None:
    seeds = [derived_seed(seed, number) for seed in (0, 1, 1337, 2**32, 2**70) for number in range(5)]
    assert len(set(seeds)) == 25
    assert derived_seed(1337, 2) == derived_seed(1337, 2)


def test_the_global_random_state_is_neither_used_nor_changed(model: GPT2) -> None:
    torch.manual_seed(1)
    first = generate(model, "The", 10, Sampling())
    torch.manual_seed(2)
    before = get_rng_state()
    assert generate(model, "The", 10, Sampling()) == first
    assert str(get_rng_state()) == str(before)
    assert torch.equal(get_rng_state()["torch"], before["torch"])


def test_gradients_are_disabled_for_the_model_only(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(logits: torch.Tensor, *_: object) -> torch.Tensor:
        assert not logits.requires_grad
        return torch.tensor([7])

    monkeypatch.setattr("ds_gpt2.evaluation.sampling.choose", check)
    for token in itertools.islice(stream(model, "The", Sampling()), 2):
        assert token == 7
        assert torch.is_grad_enabled()


def test_an_empty_prompt_becomes_end_of_text(model: GPT2) -> None:
    assert encode_prompt("") == [END_OF_TEXT]
    assert generate(model, "", 5, GREEDY) == [gpt2().decode(_greedy_without_cache(model, [END_OF_TEXT], 5))]


def test_a_prompt_longer_than_the_context_is_cut_at_the_start(model: GPT2) -> None:
    tokens = gpt2().encode_ordinary("one two three four five six seven eight nine ten " * 5)
    longer, cut = (_tokens(model, prompt, 5, GREEDY, [0]) for prompt in (tokens, tokens[-16:]))
    assert torch.equal(longer, cut)
    assert not torch.equal(cut, _tokens(model, tokens[-15:], 5, GREEDY, [0]))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.1)])
def test_generation_ends_at_end_of_text_and_never_chooses_padding(sampling: Sampling) -> None:
    assert generate(_always_ends(), "The", 5, sampling, count=2) == ["<|endoftext|>"] * 2
    assert list(itertools.islice(stream(_always_ends(), "The", sampling), 5)) == [END_OF_TEXT]


def test_each_continuation_ends_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GPT2.hidden
    calls = []
    monkeypatch.setattr(GPT2, "hidden", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    texts = generate(_often_ends(), "The", 200, Sampling(), count=6, seed=3)
    assert all(text.count("<|endoftext|>") == 1 and text.endswith("<|endoftext|>") for text in texts)
    lengths = [len(gpt2().encode(text, allowed_special="all")) for text in texts]
    assert len(set(lengths)) > 2
    assert len(calls) < 100  # generation stops when all continuations have ended
    alone = [generate(_often_ends(), "The", 200, Sampling(), count=number + 1, seed=3)[number] for number in range(6)]
    assert texts == alone


def test_temperature_and_filters_match_values_computed_by_hand() -> None:
    distribution = [0.1, 0.5, 0.05, 0.3, 0.05]
    assert _shares(distribution, Sampling()) == pytest.approx(distribution)
    assert _shares(distribution, Sampling(top_k=2)) == pytest.approx([0, 5 / 8, 0, 3 / 8, 0])
    assert _shares(distribution, Sampling(top_k=99)) == pytest.approx(distribution)
    # 0.5 is less than 0.7, 0.5 + 0.3 is not
    assert _shares(distribution, Sampling(top_p=0.7)) == pytest.approx([0, 5 / 8, 0, 3 / 8, 0])
    assert _shares(distribution, Sampling(top_p=0.85)) == pytest.approx([1 / 9, 5 / 9, 0, 3 / 9, 0])
    assert _shares(distribution, Sampling(top_p=0.01)) == [0, 1, 0, 0, 0]
    # top-k first: of 5/9, 3/9, 1/9 the first two have 8/9; of the whole distribution they would have 0.8
    assert _shares(distribution, Sampling(top_k=3, top_p=0.85)) == pytest.approx([0, 5 / 8, 0, 3 / 8, 0])
    # a temperature of 1/2 squares the probabilities before top-p
    assert _shares([0.5, 0.25, 0.25], Sampling(temperature=0.5)) == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert _shares([0.5, 0.25, 0.25], Sampling(temperature=0.5, top_p=0.6)) == [1, 0, 0]
    assert _shares([0.1, 0.2, 0.7], Sampling(temperature=1e-300)) == [0, 0, 1]
    assert _shares([0.1, 0.2, 0.7], Sampling(temperature=float("inf"))) == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_top_k_keeps_exactly_k_tokens_of_equal_probability() -> None:
    assert sorted(_shares([0.25] * 4, Sampling(top_k=3))) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_rows_are_filtered_independently() -> None:
    shares = probabilities(torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log(), Sampling(top_p=0.7))
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.0], [0.4, 0.6]]).double())


def test_token_frequencies_match_their_probabilities() -> None:
    """Each count within four standard deviations."""
    distribution, draws = torch.tensor([0.1, 0.5, 0.0, 0.4]), 4000
    generators = [torch.Generator().manual_seed(derived_seed(1, row)) for row in range(draws)]
    counts = choose(distribution.log().expand(draws, -1), Sampling(), generators).bincount(minlength=4)
    deviation = (draws * distribution * (1 - distribution)).sqrt()
    assert ((counts - draws * distribution).abs() <= 4 * deviation).all(), counts


@pytest.mark.parametrize(("drawn", "token"), [(0.0, 1), (1.0 - 2.0**-53, 3)])
def test_no_draw_chooses_a_token_of_probability_0(monkeypatch: pytest.MonkeyPatch, drawn: float, token: int) -> None:
    """The cases are the smallest and the largest number that ``torch.rand`` returns."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([drawn], dtype=torch.float64))
    distribution = torch.tensor([[0.0, 0.3, 0.3, 0.4, 0.0]])
    assert choose(distribution.log(), Sampling(), [torch.Generator()]).tolist() == [token]


def test_rounding_that_reorders_tokens_does_not_change_the_draw() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1))
    rounded = logits + 1e-5 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(logits.argsort(), rounded.argsort())
    for seed in range(100):
        first, second = (choose(each, Sampling(), [torch.Generator().manual_seed(seed)]) for each in (logits, rounded))
        assert first == second


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}])
def test_values_out_of_range_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="give"):
        Sampling(**wrong)  # type: ignore[arg-type]  # the types are right


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = GPT2(SHAPE).eval()
    with torch.no_grad():
        model.ln_f.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, "The", 3, Sampling())
