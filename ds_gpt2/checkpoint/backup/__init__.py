"""Copies of checkpoints in another storage."""
