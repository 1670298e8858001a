"""Observers of training: they look and report, and never change what is trained."""

from ds_gpt2.hooks.hook import Hook
from ds_gpt2.hooks.samples import Samples
from ds_gpt2.hooks.validation import Validation, perplexity

__all__ = ["Hook", "Samples", "Validation", "perplexity"]
