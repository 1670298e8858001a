"""End ranks that a supervisor has left running because it was killed."""

from __future__ import annotations

import time

from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.context import Context


def end_orphans(context: Context, cluster: Cluster | None) -> None:
    """Let ranks of an earlier supervisor save and exit; kill them after ``supervisor.stop_seconds``."""
    previous = read_supervisor_record(context.directories.run_dir)
    if previous is not None and cluster is not None:
        cluster.end_left_over(previous.agents)
    if previous is None or previous.group is None or previous.host != context.reporter.host:
        return
    if not rank_processes.ranks_of(previous.group) or previous.is_running():
        return
    text = f"found processes of an earlier start (process group {previous.group}): requesting them to save and exit"
    context.reporter.report("orphans", text)
    rank_processes.request_stop(previous.group)
    deadline = time.monotonic() + context.settings.supervisor.stop_seconds
    while rank_processes.members(previous.group):
        time.sleep(0.1)
        if time.monotonic() > deadline:
            rank_processes.kill(previous.group)
