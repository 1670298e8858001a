"""Scalars and timings of training: console, TensorBoard, trackers."""
