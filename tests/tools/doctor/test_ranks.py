"""The check that starts real ranks."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.doctor import ranks


@pytest.mark.ranks
def test_hanging_ranks_are_killed(script: Path) -> None:
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[-1]) / f'rank_{os.environ[\"RANK\"]}.json'\n"
        "file.write_text(json.dumps({'phase': 'joining'}))\ntime.sleep(600)\n"
    )
    rows = ranks.check_ranks(RankLayout("cpu", 2), timeout=6.0, script=script)
    assert [(row.name, row.status) for row in rows] == [("ranks", "fail")]
    state = "(did not connect to the others|was not started)"  # "was not started" on a busy machine
    assert re.fullmatch(f"not done after 6 s, killed: rank 0 {state}, rank 1 {state}", rows[0].found)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(script) in command for command in commands)


@pytest.mark.ranks
def test_ranks_that_cannot_connect_report_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    rows = ranks.check_ranks(RankLayout("cpu", 1))
    assert [(row.name, row.status) for row in rows] == [("ranks", "fail")]
    assert "nosuch0" in rows[0].found
    assert "GLOO_SOCKET_IFNAME" in rows[0].fix
