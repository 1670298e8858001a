"""Exit codes of the commands and of the ranks."""

from __future__ import annotations

DONE = 0
CRASHED = 1  # any other failure
MISTAKE = 2  # an error of the user, e.g. in the settings: a restart does not help
STOPPED = 3  # stopped on request, checkpoint saved
ROLLBACK = 4  # only from the ranks to the supervisor; without a supervisor it is a crash
