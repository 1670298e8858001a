"""Is this machine ready for a run? Each file looks at one theme; ``checks.py`` says what is looked at, and when."""
