"""Status of a run, computed within a second: files are read from their ends."""
