"""Helpers without knowledge of training: errors, files, formatting, the terminal."""
