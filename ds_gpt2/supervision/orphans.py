"""End ranks that a supervisor has left running because it was killed."""

from __future__ import annotations

from ds_gpt2.run_dir.supervisor_record import read_supervisor_record
from ds_gpt2.supervision import rank_processes
from ds_gpt2.supervision.cluster.agent import end
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.context import Context


def end_orphans(context: Context, cluster: Cluster | None) -> None:
    """Let ranks of an earlier supervisor save and exit; kill them after ``supervisor.stop_seconds``."""
    previous = read_supervisor_record(context.directories.run_dir)
    if previous is not None and cluster is not None:
        cluster.end_left_over(previous.agents)
    if previous is None or not previous.is_here or previous.is_running():
        return
    if groups := rank_processes.groups_of((previous.pid, previous.start)):
        names = ", ".join(map(str, sorted(groups)))
        text = f"found processes of an earlier start (process group {names}): requesting them to save and exit"
        context.reporter.report("orphans", text)
        end(groups, context.settings.supervisor.stop_seconds)
