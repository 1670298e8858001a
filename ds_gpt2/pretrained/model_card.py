"""The model card of an export: shape, training data, duration and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_gpt2.model.shape import ModelShape


def card(
    title: str, shape: ModelShape, parameters: int, facts: Sequence[tuple[str, str]], settings: Mapping[str, Any]
) -> str:
    """Return the content of ``README.md`` for the hub.

    Args:
        parameters: number of parameters without padding of the vocabulary.
        facts: names and values about the training.
        settings: of the run, by section.
    """
    shape_text = f"{shape.layers} layers, {shape.heads} heads, width {shape.width}, context {shape.sequence_length}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    chosen = "\n".join(
        f"| {section}.{name} | {value} |"
        for section in ("batch", "schedule", "optimizer")
        for name, value in dict(settings.get(section, {})).items()
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [gpt2, ds_gpt2]
---

# {title}

GPT-2 with {parameters / 1e6:.1f} M parameters ({shape_text}), pre-trained with ds_gpt2.
The tokenizer is GPT-2's. In training, every document starts with `<|endoftext|>`; use it as the prompt for free text.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
tokens = tokenizer("The statement", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```

## Settings

| | |
|---|---|
{chosen}
"""
