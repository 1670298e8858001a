"""The text of a crash names its cause."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from ds_gpt2.run_dir.exit_codes import CRASHED
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.supervision.launches import _crash_text

LOST = {0: "RuntimeError: connection closed by peer"}


@pytest.mark.parametrize(
    ("failures", "kills", "text"),
    [
        (LOST, {1: "SIGKILL"}, "rank 1 was killed by SIGKILL; rank 0: RuntimeError: connection closed by peer"),
        ({}, {0: "SIGKILL", 1: "SIGSEGV"}, "rank 0 was killed by SIGKILL; rank 1 was killed by SIGSEGV"),
        ({}, {1: "SIGKILL"}, "rank 1 was killed by SIGKILL"),
        (LOST, {}, "rank 1 exited without an error message; rank 0: RuntimeError: connection closed by peer; STATUS"),
        ({}, {}, "rank 0, 1 exited without an error message; STATUS"),
    ],
)
def test_a_killed_rank_is_named_before_the_errors_that_it_causes(
    failures: dict[int, str], kills: dict[int, str], text: str
) -> None:
    ranks: Any = mock.Mock(count=2, ran_out_of_memory=False, exit_status="STATUS", lost_hosts={})
    ranks.failures.return_value, ranks.kills.return_value = failures, kills
    assert _crash_text(ranks, "exited", Outcome(CRASHED)) == text
