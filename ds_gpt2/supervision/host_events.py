"""Report which hosts of a run have stopped to answer, and which answer again."""

from __future__ import annotations

from collections.abc import Mapping

from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.reporter import Reporter


def report_lost_hosts(
    reporter: Reporter, cluster: Cluster, reasons: Mapping[str, str], step: int | None = None
) -> None:
    """Report the hosts that have stopped to answer since the last report.

    Args:
        reasons: host -> why it is lost, where that is known.
        step: the newest step.
    """
    for host, reason in cluster.newly_lost(reasons).items():
        reporter.report("host_lost", f"host {host} is lost: {reason}", step, host=host, reason=reason)


def reconnect(reporter: Reporter, cluster: Cluster) -> dict[str, str]:
    """Connect to the hosts that do not answer and report the changes; return those that still do not, and why."""
    report_lost_hosts(reporter, cluster, {})
    before = set(cluster.away) - set(cluster.cut_off)
    away = cluster.reconnect()
    for host in sorted(before - set(cluster.away)):
        reporter.report("host_back", f"host {host} answers again", host=host)
    return away
