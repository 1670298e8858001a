"""Inject faults into a scaled-down copy of a run, and verify that it recovers."""
