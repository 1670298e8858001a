"""Utilities that do not depend on training: errors, files, formatting, the terminal."""
