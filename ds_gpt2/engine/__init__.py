"""The DeepSpeed engine, and all state of a run that is not in a file."""
