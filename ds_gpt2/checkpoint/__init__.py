"""Checkpoints: save, resume, verify, retain; the commit protocol; backups."""
