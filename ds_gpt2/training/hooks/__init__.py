"""Hooks: measurements during training, which never change its result."""

from ds_gpt2.training.hooks.averaged_validation import AveragedValidation
from ds_gpt2.training.hooks.evaluations import open_evaluations
from ds_gpt2.training.hooks.hellaswag import HellaSwag, open_hellaswag
from ds_gpt2.training.hooks.histograms import Histograms
from ds_gpt2.training.hooks.hook import Hook, HookFailedError, Interrupted
from ds_gpt2.training.hooks.machine_health import Health
from ds_gpt2.training.hooks.samples import Samples
from ds_gpt2.training.hooks.validation import Validation

__all__ = [
    "AveragedValidation",
    "Health",
    "HellaSwag",
    "Histograms",
    "Hook",
    "HookFailedError",
    "Interrupted",
    "Samples",
    "Validation",
    "open_evaluations",
    "open_hellaswag",
]
