"""Pre-train GPT-2 with DeepSpeed ZeRO-2, unattended, for days."""

__version__ = "0.1.0"
