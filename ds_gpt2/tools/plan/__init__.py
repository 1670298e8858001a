"""Predict what a run needs before it starts: memory, time, disk space, energy and cost."""
