"""A lease is renewed until it is closed, whatever happens to its disk."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

from ds_gpt2.common.lease import Renewal, file_time


def test_a_lease_is_renewed_until_it_is_closed_also_after_a_failure() -> None:
    calls, third = itertools.count(1), threading.Event()

    def renew() -> None:
        if next(calls) == 3:
            third.set()
        raise OSError("the server is away")

    renewal = Renewal(renew, 0.01)
    assert third.wait(10)
    renewal.close()
    time.sleep(0.05)
    count = next(calls)
    time.sleep(0.1)
    assert next(calls) == count + 1


def test_the_clock_of_the_files_is_asked_without_leaving_a_file(tmp_path: Path) -> None:
    assert abs(file_time(tmp_path) - time.time()) < 5
    assert abs(file_time(tmp_path / "absent") - time.time()) < 5
    assert list(tmp_path.iterdir()) == []
