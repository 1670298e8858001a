"""Start the ranks as training does, and check that they connect, sum correctly, and how fast an all-reduce is."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_gpt2.common import files, safe_json
from ds_gpt2.common.errors import UserError, reason_of
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.launched_ranks import LaunchedRanks
from ds_gpt2.supervision.launcher import RankLayout, Ranks
from ds_gpt2.supervision.supervised_run import SupervisedRun
from ds_gpt2.tools.doctor.finding import Finding, failure

ALL_REDUCE = Path(__file__).with_name("all_reduce.py")
TIMEOUT = 120.0  # seconds for the whole check; four ranks on two cores take 12 seconds

_HANGS = {
    "importing": "did not finish its imports",
    "joining": "did not connect to the others",
    "summing": "did not finish an all-reduce",
}
_FIXES = {
    "cpu": "gloo uses 127.0.0.1: check for a firewall on lo, and check GLOO_SOCKET_IFNAME",
    "cuda": "try NCCL_P2P_DISABLE=1 (consumer GPUs, IOMMU); NCCL_DEBUG=INFO shows details; /dev/shm needs 1 GB",
}
_FIX_OF_HOSTS = (
    "fix what the checks of hosts and network have found; all ports must be open between the hosts; with GPUs,"
    " NCCL_DEBUG=INFO shows details"
)
_SLOW_FIX_OF_HOSTS = "the slowest link between the hosts limits this: see network above"
_LIBRARIES = {"cpu": "gloo", "cuda": "NCCL"}
_SLOW_FIXES = {
    "cpu": "other programs use the cores: stop them",
    "cuda": "GPUs may have no peer-to-peer access: `nvidia-smi topo -m`, other slots, an NVLink bridge",
}
_SLOW_LATENCY = {"cpu": 0.1, "cuda": 0.002}  # seconds, for the smallest size
_SLOW_BANDWIDTH = {"cpu": 0.0, "cuda": 1e9}  # bytes per second, for the largest size


def check_ranks(layout: RankLayout, timeout: float = TIMEOUT, script: Path = ALL_REDUCE) -> list[Finding]:
    """Start the ranks; return a finding about the connection, and one about the speed of each rank.

    No process is left, also after an error.

    Args:
        timeout: seconds after which the ranks count as hung and are killed.
        script: what each rank runs.
    """
    with tempfile.TemporaryDirectory(prefix="ds_gpt2-doctor-") as name:
        folder = Path(name)
        fixes = _FIXES[layout.accelerator], _SLOW_FIXES[layout.accelerator]
        return _check(lambda: Ranks([name], layout, folder / "outcome", {}, script), layout, folder, timeout, fixes)


def check_ranks_on_hosts(cluster: Cluster, timeout: float = TIMEOUT) -> list[Finding]:
    """Do the same with the ranks of all hosts; no process is left on any of them.

    Args:
        timeout: seconds after which the ranks count as hung and are killed.
    """
    layout = RankLayout(cluster.accelerator, cluster.slots)
    parent = files.nearest_existing(cluster.spec.run_dir)  # a directory of all hosts
    try:
        with tempfile.TemporaryDirectory(prefix=".ds_gpt2-doctor-", dir=parent) as name:
            run = SupervisedRun((name,), layout, script=ALL_REDUCE)
            fixes = _FIX_OF_HOSTS, _SLOW_FIX_OF_HOSTS
            return _check(lambda: cluster.launch(run, Path(name)), layout, Path(name), timeout, fixes)
    except OSError as error:
        return [Finding("ranks", "unknown", f"{parent} cannot be written: {reason_of(error)}")]
    except UserError as error:
        return [failure("ranks", error)]


def _check(
    start: Callable[[], LaunchedRanks], layout: RankLayout, folder: Path, timeout: float, fixes: tuple[str, str]
) -> list[Finding]:
    """Start the ranks, which write their records to ``folder``, and judge the records.

    Args:
        fixes: if the ranks fail, and if they are slow.
    """
    start_time = time.monotonic()
    ranks = start()
    in_time = _run(ranks, start_time + timeout)
    taken = time.monotonic() - start_time
    records = [_record(folder / f"rank_{rank}.json") for rank in range(layout.ranks)]
    if lost := ranks.lost_hosts:
        return [Finding("ranks", "fail", "; ".join(f"host {host}: {why}" for host, why in lost.items()), fixes[0])]
    if any(record.get("phase") != "done" for record in records):
        limit = "" if in_time else f"not done after {timeout:.0f} s, killed: "
        return [Finding("ranks", "fail", limit + _failure(records), fixes[0])]
    if not all(record["right"] for record in records):
        fix = "a link, a GPU or its memory is faulty: try fewer ranks until the sum is right"
        return [Finding("ranks", "fail", "an all-reduce gave a wrong sum", fix)]
    found = f"{layout.ranks} started, connected over {_LIBRARIES[layout.accelerator]}, summed and exited"
    first = Finding("ranks", "ok", f"{found} in {taken:.1f} s")
    return [first, *(_speed(layout, rank, record, fixes[1]) for rank, record in enumerate(records))]


def _run(ranks: LaunchedRanks, deadline: float) -> bool:
    """Wait for the ranks and return whether all ended by the deadline; kill those that did not."""
    try:
        while not ranks.have_exited:
            if time.monotonic() > deadline or ranks.lost_hosts:
                return False
            time.sleep(0.05)
        return True
    finally:
        while not ranks.have_exited:
            ranks.kill()
            time.sleep(0.05)


def _record(file: Path) -> dict[str, Any]:
    """Return the record that a rank has written; an empty one if the rank was not started."""
    try:
        record = safe_json.read(file)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _failure(records: list[dict[str, Any]]) -> str:
    """Return the first error of a rank, which makes the others fail; without one, the phase that each rank reached."""
    errors = [f"rank {rank}: {record['error']}" for rank, record in enumerate(records) if "error" in record]
    stuck = [
        f"rank {rank} {_HANGS.get(record.get('phase', ''), 'was not started')}"
        for rank, record in enumerate(records)
        if record.get("phase") != "done"
    ]
    return errors[0] if errors else ", ".join(stuck)


def _speed(layout: RankLayout, rank: int, record: dict[str, Any], slow_fix: str) -> Finding:
    """Check latency and bus bandwidth, which nccl-tests defines as 2 (n - 1) / n bytes for each byte summed.

    Args:
        slow_fix: what may help if it is slow.
    """
    times = {int(size): float(seconds) for size, seconds in record["seconds"].items()}
    smallest, *larger = sorted(times)
    on_bus = {size: 2 * (layout.ranks - 1) / layout.ranks * size / times[size] for size in larger}
    rates = ", ".join(f"{size >> 20} MiB at {rate / 1e9:.2f} GB/s" for size, rate in on_bus.items())
    found = f"{smallest} bytes in {times[smallest] * 1e3:.2f} ms, {rates} on the bus"
    late = times[smallest] > _SLOW_LATENCY[layout.accelerator]
    slow = on_bus[larger[-1]] < _SLOW_BANDWIDTH[layout.accelerator]
    if layout.ranks > 1 and (late or slow):
        return Finding(f"rank {rank}", "warn", found, slow_fix)
    return Finding(f"rank {rank}", "ok", found)
