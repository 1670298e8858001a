"""The files of ``runs/<run>``: each has a module that writes and reads it."""
