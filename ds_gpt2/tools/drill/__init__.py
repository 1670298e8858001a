"""The rehearsal: what may go wrong in a month, done on purpose, and what became of the run."""
