"""Measure how fast a disk makes written data durable, and compare it with the time between two checkpoints."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_gpt2.common.formatting import size
from ds_gpt2.tools.doctor.finding import Finding
from ds_gpt2.tools.resources.machine import existing

_BLOCK = 16 << 20  # bytes written between two fsyncs
_SLOW_SYNC = 0.5  # seconds
_LONG_SAVE = 300.0  # seconds; used while no step of the run has been timed
_DISK_FRACTION = 10  # a test file takes at most one tenth of the free space


@dataclass(frozen=True)
class Speed:
    """The measured speed of a disk."""

    written: int  # bytes
    seconds: float  # until all of them were durable
    sync_seconds: float  # median time until a small write was durable
    worst_sync_seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.written / self.seconds


def speed(directory: Path, checkpoint: int, ranks_limit: float, between_saves: float | None) -> list[Finding]:
    """Measure the disk of ``directory`` and check that saves do not slow down training.

    Args:
        checkpoint: bytes of one checkpoint.
        ranks_limit: bytes per second that all ranks together may write; 0: no limit.
        between_saves: seconds; None if no step has been timed yet.
    """
    measured = measure(directory)
    return [_write_speed(measured, checkpoint, ranks_limit, between_saves), _sync_speed(measured)]


def measure(directory: Path, most_bytes: int = 256 << 20, seconds: float = 2.0) -> Speed:
    """Write a temporary file until either limit is reached, with an fsync after each block, then small writes.

    Raises:
        OSError: the directory is not writable.
    """
    folder = existing(directory)
    blocks = max(1, min(most_bytes, shutil.disk_usage(folder).free // _DISK_FRACTION) // _BLOCK)
    block = os.urandom(_BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        written, start_time = 0, time.monotonic()
        for _ in range(blocks):
            written += file.write(block)
            os.fsync(file)
            taken = time.monotonic() - start_time
            if taken > seconds:
                break
        syncs = list(_small_syncs(file.fileno(), seconds / 4))
    return Speed(written, max(taken, 1e-9), statistics.median(syncs), max(syncs))


def _write_speed(measured: Speed, checkpoint: int, ranks_limit: float, between_saves: float | None) -> Finding:
    rate = min(measured.bytes_per_second, ranks_limit or measured.bytes_per_second)
    save = checkpoint / rate
    found = f"{size(measured.written)} at {measured.bytes_per_second / 1e6:,.0f} MB/s"
    found += f"; a checkpoint takes {_seconds(save)}"
    if rate < measured.bytes_per_second:
        found += f" at {rate / 1e6:,.0f} MB/s (checkpoint.write_mb_per_s)"
    if between_saves is not None:
        found += f", one is due every {_seconds(between_saves)}"
    if save > (_LONG_SAVE if between_saves is None else between_saves / 2):
        fix = "training would wait for the disk: a larger checkpoint.every, or checkpoint.dir on a faster disk"
        return Finding("write speed", "warn", found, fix)
    return Finding("write speed", "ok", found)


def _sync_speed(measured: Speed) -> Finding:
    found = f"a small write is durable after {measured.sync_seconds * 1e3:.1f} ms (median)"
    found += f", at worst {measured.worst_sync_seconds * 1e3:.1f} ms"
    if measured.sync_seconds > _SLOW_SYNC:
        fix = "the disk is busy, or on a slow network: check `iostat -x 1`"
        return Finding("fsync", "warn", found, fix)
    return Finding("fsync", "ok", found)


def _small_syncs(handle: int, seconds: float) -> Iterator[float]:
    """Yield the seconds that each of up to 20 writes of 4 KiB took to be durable."""
    first_start = time.monotonic()
    for number in range(20):
        start = time.monotonic()
        os.pwrite(handle, bytes(4096), number * 4096)
        os.fsync(handle)
        yield time.monotonic() - start
        if time.monotonic() - first_start > seconds:
            return


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
