"""Report what happens to a run: on the terminal, in its log, journal and ``supervisor.json``, and by alerts."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import replace

from ds_gpt2.common.files import append_lines
from ds_gpt2.common.lease import Renewal
from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.common.process_identity import start_of
from ds_gpt2.common.terminal import one_line
from ds_gpt2.config.settings import LOG, Settings
from ds_gpt2.run_dir.journal import Event, Journal, Kind, read_journal
from ds_gpt2.run_dir.supervisor_record import AgentRecord, SupervisorRecord, renew
from ds_gpt2.supervision.alerts.alerts import Alerts


class Reporter:
    """The reports of one supervisor. No method raises because of a full disk or a closed terminal."""

    def __init__(self, settings: Settings, run_dir: OpenDirectory, ranks: int) -> None:
        self._run_dir = run_dir
        self._journal = Journal(settings.run_dir)
        self._alerts = Alerts(settings.alerts, settings.run_dir)
        start = start_of(os.getpid()) or ""
        now = time.time()
        self._record = SupervisorRecord(
            os.getpid(), now, socket.gethostname(), "running", ranks, start=start, renewed=now
        )
        self._renewal: Renewal | None = None  # from the first record on: before, it is that of an earlier supervisor

    @property
    def host(self) -> str:
        """The name of this machine, as ``supervisor.json`` has it."""
        return self._record.host

    def report(self, kind: Kind, text: str, step: int | None = None, **facts: object) -> None:
        """Report an event on the terminal, in the run's log and in its journal."""
        with contextlib.suppress(OSError):  # a closed terminal
            print(f"supervisor: {text}", flush=True)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {one_line(text)}\n"
        with contextlib.suppress(OSError):
            append_lines(self._run_dir.path / LOG, line.encode(errors="backslashreplace"))
        self.add_event(kind, text, step, **facts)

    def add_event(self, kind: Kind, text: str, step: int | None = None, **facts: object) -> None:
        """Write an event to the journal only; if that fails, send its alert directly."""
        if (missed := self._journal.write(kind, text, step, **facts)) is not None:
            self._alerts.send_event(missed)

    def journal_size(self) -> int:
        """Return the size of the journal in bytes."""
        return self._journal.size()

    def events_since(self, size: int) -> list[Event]:
        """Return the events that were added since the journal had ``size`` bytes; none if it cannot be read."""
        try:
            return list(read_journal(self._run_dir.path, size))
        except OSError:
            return []

    def catch_up(self) -> None:
        """Send alerts of new events, and write events whose earlier write to the journal failed."""
        self._alerts.send_news()
        with contextlib.suppress(OSError):
            self._journal.write_pending()

    def record_running(self, ranks: int, group: int | None = None, agents: tuple[AgentRecord, ...] = ()) -> None:
        """Record that the run is supervised.

        Args:
            ranks: their number in this launch.
            group: the process group of the ranks on this machine; None while there are none.
            agents: on several hosts.
        """
        self._record = replace(self._record, ranks=ranks, agents=agents)
        self._write(replace(self._record, group=group))

    def record_waiting(self, seconds: float) -> None:
        """Record that the next launch is due in ``seconds``."""
        self._write(replace(self._record, state="waiting", next_start=time.time() + seconds))

    def record_ended(self, code: int) -> None:
        """Record that the supervisor ends with exit code ``code``."""
        self._write(replace(self._record, state="ended", code=code))

    def end_lease(self) -> None:
        """Renew the record's lease no more."""
        if self._renewal is not None:
            self._renewal.close()

    def close(self) -> None:
        """Send the remaining alerts."""
        self.end_lease()
        self._alerts.send_news()
        self._alerts.close()

    def _write(self, record: SupervisorRecord) -> None:
        with contextlib.suppress(OSError):  # a full disk: the run continues
            replace(record, renewed=time.time()).write(self._run_dir.path)
            if self._renewal is None and record.state != "ended":
                self._renewal = Renewal(lambda: renew(self._run_dir.path))
