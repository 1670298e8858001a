"""Files of a run, written by a test instead of by a training process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.run_dir.heartbeat import Heartbeat, Phase
from ds_gpt2.run_dir.supervisor_record import RECORD, SupervisorRecord
from ds_gpt2.tools.status.status import Status, read_status

HOUR, DAY = 3600.0, 86_400.0
NOW = time.time()

CONFIG = """
run: {name: test, dir: FOLDER/runs}
model: {preset: 7M}
data: {dir: FOLDER/data}
schedule: {steps: 2000, warmup_steps: 1}
checkpoint: {dir: FOLDER/checkpoints, every: 100, min_free_gb: 0}
"""


class RunFiles:
    """The files of a run. Each step takes ten seconds; the newest step ends now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "runs" / "test"
        self.run_dir.mkdir(parents=True)
        self.configure(CONFIG)

    def configure(self, text: str) -> None:
        (self.run_dir / "config.yaml").write_text(text.replace("FOLDER", str(self.folder)), encoding="utf-8")

    def train(self, steps: int, seconds: float = 10.0, **values: float) -> None:
        """Write the records of all steps, each with ``values``."""
        records = [
            {"step": step, "time": NOW - seconds * (steps - step), "train/loss": 10.0 - step / 1000, **values}
            for step in range(1, steps + 1)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")

    def journal(
        self,
        kind: str,
        ago: float,
        step: int | None = None,
        text: str = "as it was",
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Append an event of ``ago`` seconds before now."""
        event = {"time": NOW - ago, "kind": kind, "step": step, "text": text, "facts": facts or {}}
        with (self.run_dir / "journal.jsonl").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(event) + "\n")

    def save(self, step: int, size: int = 1000, state: dict[str, Any] | None = None) -> Path:
        """Commit a checkpoint with one file of ``size`` bytes; return its directory."""
        directory, tag = self.folder / "checkpoints" / "test", rolling_tag(step)
        (directory / (tag + ".tmp")).mkdir(parents=True)
        (directory / (tag + ".tmp") / "model.pt").write_bytes(bytes(size))
        state = {"step": step, "val_loss": 5.5, "val_step": step - 1, **(state or {})}
        files = {"model.pt": FileEntry(bytes=size, sha256="0" * 64)}
        created = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(NOW))
        manifest = Manifest(
            created=created, epoch=0.5, state=state, world_size=1, identity={}, settings={}, versions={}, files=files
        )
        commit.commit(Disk(), directory, tag, manifest)
        return directory / tag

    def supervise(self, state: Any, pid: int | None = None, **values: Any) -> None:
        """Write the record of a supervisor: this process, or the process ``pid``."""
        process = psutil.Process(pid)
        values = {"host": socket.gethostname(), "ranks": 1, **values}
        SupervisorRecord(process.pid, process.create_time(), state=state, **values).write(self.run_dir)
        if values.get("renewed") is not None:
            os.utime(self.run_dir / RECORD, (values["renewed"], values["renewed"]))

    def beat(self, phase: Phase = "training", step: int = 1000) -> Heartbeat:
        """Write a heartbeat of this process as rank 0."""
        heart = Heartbeat(self.run_dir, 0)
        heart.begin_step(step, step)
        heart.enter(phase)
        return heart

    def beat_on_other_host(
        self, phase: Phase, step: int, time: float = NOW, rank: int = 0, host: str | None = None
    ) -> None:
        """Write a heartbeat of a rank that is not a process of this host, of an earlier version without ``host``."""
        (self.run_dir / "heartbeat").mkdir(exist_ok=True)
        file = self.run_dir / "heartbeat" / f"rank_{rank:05d}"
        process = "" if host is None else f" 9.boot {host}"
        file.write_text(f"9 {time} 1 {step} {step} {phase}{process}")
        os.utime(file, (max(NOW, time), max(NOW, time)))

    def status(self, later: float = 0.0) -> Status:
        """Return the status ``later`` seconds after now."""
        return read_status(self.run_dir, NOW + later)

    def problems(self, later: float = 0.0) -> list[str]:
        return [problem.text for problem in self.status(later).problems]


Usage = namedtuple("Usage", "total used free")


def set_free_bytes(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the disk forecast measure ``free`` bytes on every disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
