"""TensorBoard over the event files of many runs."""
