import torch

from ds_gpt2.generate import generate
from ds_gpt2.model import GPT2, ModelShape
from ds_gpt2.tokenizer import END_OF_TEXT


def _generate(model: GPT2, seed: int = 0, tokens: int = 20, prompt: str = "The", top_k: int = 50) -> str:
    dice = torch.Generator().manual_seed(seed)
    return generate(model, prompt, tokens, temperature=1.0, top_k=top_k, generator=dice)


def _model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(ModelShape(layers=2, heads=2, width=32, sequence_length=16)).eval()


def test_the_dice_decide_and_training_randomness_is_untouched() -> None:
    model = _model()
    before = torch.get_rng_state()
    first = _generate(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == _generate(model, seed=1)
    assert first != _generate(model, seed=2)
    assert first.startswith("The")


def test_one_candidate_is_greedy_and_longer_than_the_context_is_fine() -> None:
    model = _model()
    assert _generate(model, seed=1, tokens=40, top_k=1) == _generate(model, seed=2, tokens=40, top_k=1)


def test_an_empty_prompt_begins_a_document() -> None:
    assert _generate(_model(), prompt="").startswith("<|endoftext|>")


def test_it_stops_at_the_end_of_the_text() -> None:
    model = _model()
    with torch.no_grad():
        model.wte.weight.zero_()
        model.wte.weight[END_OF_TEXT] = 5.0
        model.ln_f.bias.fill_(1.0)
    assert _generate(model) == "The"
