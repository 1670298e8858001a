"""How the process of a rank ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from launched import PROJECT


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        ("lambda: 3", 3, ""),
        ("lambda: 1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("lambda: sys.exit(2)", 2, ""),
    ],
)
def test_a_rank_ends_with_its_code_and_its_traceback(main: str, code: int, said: str) -> None:
    """An exit handler that waits must not hold up a rank that has failed; only SystemExit runs them."""
    handler = "" if code == 2 else "atexit.register(time.sleep, 60)\n"
    program = f"import atexit, sys, time\nfrom ds_gpt2 import outcome\n{handler}outcome.run_process({main})"
    begun = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=50)
    assert (result.returncode, result.stderr.endswith(said)) == (code, True)
    assert time.monotonic() - begun < 40
