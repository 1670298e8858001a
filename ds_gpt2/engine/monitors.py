"""DeepSpeed's monitors (TensorBoard, W&B, CSV, Comet), as the rest of the project uses them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

_SERVICES = ("wandb_monitor", "csv_monitor", "comet_monitor")  # all but TensorBoard


class Monitors:
    """The monitors that DeepSpeed opened from its configuration. On ranks other than 0 none is open."""

    def __init__(self, master: Any) -> None:
        """
        Args:
            master: DeepSpeed's ``MonitorMaster``.
        """
        self._master = master
        # DeepSpeed would log the learning rate itself, with x = samples, and flush at every step.
        self._master.enabled = False

    def replace(self, name: str, backend: Any) -> None:
        """Replace the monitor ``name`` by ``backend``, which has ``write_events``."""
        setattr(self._master, name, backend)

    @property
    def services(self) -> dict[str, Any]:
        """The open monitors other than TensorBoard, by DeepSpeed's name; each has ``write_events``."""
        found = {name: getattr(self._master, name, None) for name in _SERVICES}
        return {name: backend for name, backend in found.items() if backend is not None}

    @property
    def tensorboard(self) -> Any:
        """torch's ``SummaryWriter`` of the TensorBoard monitor; None if it is off."""
        backend = self._master.tb_monitor
        return None if backend is None else backend.summary_writer

    def reopen_tensorboard(self, directory: Path, purge_step: int) -> None:
        """Replace the writer, which has no ``purge_step``: TensorBoard hides older events from that step on."""
        writer = self.tensorboard
        with contextlib.suppress(OSError):
            writer.close()
        self._master.tb_monitor.summary_writer = type(writer)(log_dir=str(directory), purge_step=purge_step)

    def continue_csv(self) -> None:
        """Register the CSV files that already have a header: DeepSpeed writes one per file and process."""
        backend: Any = getattr(self._master, "csv_monitor", None)
        if (directory := getattr(backend, "log_dir", None)) is not None:
            backend.filenames += [file.stem for file in Path(directory).glob("*.csv") if file.stat().st_size]
