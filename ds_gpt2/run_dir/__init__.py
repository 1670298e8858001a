"""The files in ``runs/<run>``: one module per file, which writes and reads it."""
