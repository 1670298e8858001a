"""Checkpoints on disk: what a run needs to go on, and the pointer to the newest."""
