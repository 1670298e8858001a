"""A launcher that a killed supervisor has left on this machine is ended, even if it has started no rank yet."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from ds_gpt2.common.process_identity import start_of
from ds_gpt2.config.settings import load_settings
from ds_gpt2.run_dir import stop_request
from ds_gpt2.run_dir.journal import read_journal
from ds_gpt2.run_dir.supervisor_record import SupervisorRecord
from ds_gpt2.supervision.context import Context
from ds_gpt2.supervision.orphans import end_orphans
from ds_gpt2.supervision.stop_signals import StopSignals


def test_a_launcher_without_ranks_is_ended(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    settings = load_settings(write_config(tmp_path))
    settings.run_dir.mkdir(parents=True)
    name, _ = stop_request.supervisor_environment().popitem()
    with subprocess.Popen(["sleep", "30"]) as supervisor:
        start = start_of(supervisor.pid) or ""
        environment = {**os.environ, name: f"{supervisor.pid} {start}"}
        with subprocess.Popen(["sleep", "30"], env=environment, start_new_session=True) as launcher:
            SupervisorRecord(supervisor.pid, 1.0, socket.gethostname(), "running", 2, start=start).write(
                settings.run_dir
            )
            context = Context(settings, StopSignals(), 2)
            end_orphans(context, None)
            assert launcher.poll() is None  # its supervisor runs
            supervisor.kill()
            supervisor.wait()
            end_orphans(context, None)
            assert launcher.wait(30) == -signal.SIGTERM
    (event,) = read_journal(settings.run_dir)
    assert event.kind == "orphans" and f"(process group {launcher.pid})" in event.text
