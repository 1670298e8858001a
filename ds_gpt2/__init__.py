"""Pre-train GPT-2 under a DeepSpeed ZeRO-2 engine, for days, unattended."""

__version__ = "0.1.0"
