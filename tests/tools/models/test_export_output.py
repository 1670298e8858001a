"""Leftovers of exports whose process has died."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from ds_gpt2.tools.models.export_output import atomic_output, temporary_paths


def _export(out: Path) -> None:
    with atomic_output(out, 0) as unfinished:
        unfinished.write_text("the export")


def test_leftovers_are_removed_although_the_pid_was_reused(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    running = temporary_paths(out, os.getppid())[0]
    reused = running.with_name(f"{running.name.rpartition('-')[0]}-123.4567")  # another start time
    for path in (running, reused):
        path.write_text("not complete")
    _export(out)
    assert sorted(tmp_path.iterdir()) == sorted([out, running])


def test_names_of_earlier_versions_are_recognized(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, running = (tmp_path / f".out.pt.unfinished-{socket.gethostname()}-{pid}" for pid in (ended.pid, os.getppid()))
    for path in (dead, running):
        path.write_text("not complete")
    _export(out)
    assert sorted(tmp_path.iterdir()) == sorted([out, running])
