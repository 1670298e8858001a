"""Text from a model: temperature and top-k sampling."""

from __future__ import annotations

import torch

from ds_gpt2.model import GPT2
from ds_gpt2.tokenizer import END_OF_TEXT, gpt2


@torch.no_grad()
def generate(
    model: GPT2, prompt: str, tokens: int, *, temperature: float, top_k: int, generator: torch.Generator
) -> str:
    """Continue ``prompt`` by up to ``tokens`` tokens, or to the end of the text; returns prompt and continuation.

    Args:
        generator: the only source of randomness, on the model's device; the global one is not touched.
    """
    device = model.wte.weight.device
    encoding = gpt2()
    text = torch.tensor([encoding.encode_ordinary(prompt) or [END_OF_TEXT]], device=device)
    for _ in range(tokens):
        context = text[:, -model.shape.sequence_length :]
        scores = model.logits(context)[0, -1].float() / temperature
        best, candidates = scores.topk(min(top_k, len(scores)))
        chosen = candidates[torch.multinomial(best.softmax(-1), 1, generator=generator)]
        if chosen.item() == END_OF_TEXT:
            break
        text = torch.cat([text, chosen[None]], dim=1)
    return encoding.decode(text[0].tolist())
