"""Do the ranks find each other, and how fast are they together? Started for real, as a run is."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from ds_gpt2.common import safe_json
from ds_gpt2.supervision.launcher import RankLayout, Ranks
from ds_gpt2.tools.doctor.row import Finding

ALL_REDUCE = Path(__file__).with_name("all_reduce.py")
SECONDS = 120.0  # until all must be done; four ranks on two cores take 12

_HANGS = {
    "importing": "does not get through its imports",
    "joining": "does not meet the others",
    "summing": "does not get through an all-reduce",
}
_FIXES = {
    "cpu": "gloo goes over 127.0.0.1: look for a firewall on lo, and at GLOO_SOCKET_IFNAME",
    "cuda": "try NCCL_P2P_DISABLE=1 (consumer cards, IOMMU), look with NCCL_DEBUG=INFO; /dev/shm needs 1 GB",
}
_LIBRARIES = {"cpu": "gloo", "cuda": "NCCL"}
_SLOW_FIXES = {
    "cpu": "other programs want the cores: end them",
    "cuda": "GPUs may not reach each other: `nvidia-smi topo -m`, other slots, an NVLink bridge",
}
_SLOW_SECONDS = {"cpu": 0.1, "cuda": 0.002}  # for the smallest
_SLOW_BYTES = {"cpu": 0.0, "cuda": 1e9}  # a second, for the largest


def round_trip(place: RankLayout, seconds: float = SECONDS, script: Path = ALL_REDUCE) -> list[Finding]:
    """One row for the meeting, and one for each rank; whatever happens, no process of it is left.

    Args:
        seconds: after which it counts as hung, and is ended.
        script: what each rank runs.
    """
    with tempfile.TemporaryDirectory(prefix="ds_gpt2-doctor-") as name:
        folder = Path(name)
        begun = time.monotonic()
        in_time = _run(Ranks([name], place, folder / "outcome", {}, script), begun + seconds)
        taken = time.monotonic() - begun
        records = [_record(folder / f"rank_{rank}.json") for rank in range(place.ranks)]
    if any(record.get("phase") != "done" for record in records):
        limit = "" if in_time else f"not done after {seconds:.0f} s, ended: "
        return [Finding("ranks", "fail", limit + _story(records), _FIXES[place.accelerator])]
    if not all(record["right"] for record in records):
        fix = "a link, a card or its memory is broken: try fewer ranks until the sum is right"
        return [Finding("ranks", "fail", "an all-reduce gave a wrong sum", fix)]
    meeting = f"{place.ranks} started, met over {_LIBRARIES[place.accelerator]}, summed and ended in {taken:.1f} s"
    return [Finding("ranks", "ok", meeting), *(_speed(place, rank, record) for rank, record in enumerate(records))]


def _run(ranks: Ranks, deadline: float) -> bool:
    """Whether all had ended by the deadline; afterwards nobody is left."""
    try:
        while not ranks.have_exited:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True
    finally:
        while not ranks.have_exited:
            ranks.kill()
            time.sleep(0.05)


def _record(file: Path) -> dict[str, Any]:
    """What a rank has left; nothing if it was not even started."""
    try:
        record = safe_json.read(file)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _story(records: list[dict[str, Any]]) -> str:
    """How far the ranks got; where some tell why they failed, the others failed in their wake."""
    errors = [f"rank {rank}: {record['error']}" for rank, record in enumerate(records) if "error" in record]
    stuck = [
        f"rank {rank} {_HANGS.get(record.get('phase', ''), 'was not started')}"
        for rank, record in enumerate(records)
        if record.get("phase") != "done"
    ]
    return errors[0] if errors else ", ".join(stuck)


def _speed(place: RankLayout, rank: int, record: dict[str, Any]) -> Finding:
    """Latency, and bandwidth as nccl-tests counts it on the bus: 2 (n - 1) / n bytes pass for each byte summed."""
    times = {int(size): float(seconds) for size, seconds in record["seconds"].items()}
    smallest, *larger = sorted(times)
    on_bus = {size: 2 * (place.ranks - 1) / place.ranks * size / times[size] for size in larger}
    rates = ", ".join(f"{size >> 20} MiB at {rate / 1e9:.2f} GB/s" for size, rate in on_bus.items())
    found = f"{smallest} bytes in {times[smallest] * 1e3:.2f} ms, {rates} on the bus"
    late = times[smallest] > _SLOW_SECONDS[place.accelerator]
    slow = on_bus[larger[-1]] < _SLOW_BYTES[place.accelerator]
    if place.ranks > 1 and (late or slow):
        return Finding(f"rank {rank}", "warn", found, _SLOW_FIXES[place.accelerator])
    return Finding(f"rank {rank}", "ok", found)
