"""Check a machine before a run. Each module checks one subject; ``checks.py`` lists all checks in order."""
