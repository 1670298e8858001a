"""The DeepSpeed engine, and all of a run's state that is not in a file."""
