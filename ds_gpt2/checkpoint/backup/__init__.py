"""Backups: copies of checkpoints in another storage."""
