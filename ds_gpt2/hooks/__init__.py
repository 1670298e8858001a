"""Observers of training: they look and report, and never change what is trained."""

from ds_gpt2.hooks.health import Health
from ds_gpt2.hooks.hellaswag import HellaSwag, open_hellaswag
from ds_gpt2.hooks.histograms import Histograms
from ds_gpt2.hooks.hook import Hook, Interrupted
from ds_gpt2.hooks.samples import Samples
from ds_gpt2.hooks.validation import Validation

__all__ = ["Health", "HellaSwag", "Histograms", "Hook", "Interrupted", "Samples", "Validation", "open_hellaswag"]
