"""Published results of GPT-2 124M, to compare a run with."""

from __future__ import annotations

from ds_gpt2.config.settings import Settings

# Validation loss of llm.c's GPT-2 124M on FineWeb, 524,288 tokens per step (its published log, karpathy/llm.c
# discussion 481). On FineWeb-Edu the values differ, but the curve has the same shape.
REFERENCE = "llm.c-124M-on-FineWeb"
REFERENCE_TOKENS_PER_STEP = 524_288
REFERENCE_CURVE = {
    2_000: 3.859,
    4_000: 3.618,
    6_000: 3.507,
    8_000: 3.443,
    10_000: 3.392,
    14_000: 3.315,
    18_000: 3.275,
}

# HellaSwag, length-normalized accuracy, as llm.c measures it (discussion 481): OpenAI's weights, and its own.
REFERENCE_HELLASWAG = {"OpenAI GPT-2 124M": 0.2945, "llm.c 124M": 0.299}


def is_comparable_to_reference(settings: Settings) -> bool:
    """Return whether a run has the model and the batch size of the reference run."""
    return settings.model.preset == "124M" and settings.batch.tokens_per_step == REFERENCE_TOKENS_PER_STEP
