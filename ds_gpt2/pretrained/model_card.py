"""The model card of an export: what the model is, of what, how long and how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_gpt2.model.shape import ModelShape


def card(
    title: str, shape: ModelShape, parameters: int, facts: Sequence[tuple[str, str]], settings: Mapping[str, Any]
) -> str:
    """``README.md`` as the hub shows it.

    Args:
        parameters: how many the model has, the padding of the vocabulary left out.
        facts: what is known of the training, name and value.
        settings: the run's, section by section.
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
The tokenizer is GPT-2's. Every document began with `<|endoftext|>` in training, so a text from nothing begins with it.

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
