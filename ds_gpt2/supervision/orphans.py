"""End ranks that a supervisor has left running because it was killed, or because it had lost their host."""

from __future__ import annotations

from collections.abc import Sequence

from ds_gpt2.distributed.launch_environment import LOOPBACK
from ds_gpt2.run_dir.supervisor_record import AgentRecord, SupervisorRecord, read_supervisor_record
from ds_gpt2.supervision import rank_processes, waiting
from ds_gpt2.supervision.cluster.agent import end, end_previous
from ds_gpt2.supervision.cluster.cluster import Cluster, LeftOver
from ds_gpt2.supervision.cluster.this_machine import is_this_machine
from ds_gpt2.supervision.context import Context
from ds_gpt2.supervision.host_events import report_lost_hosts


def end_orphans(context: Context, cluster: Cluster | None) -> None:
    """Let ranks of an earlier supervisor save and exit; kill them after ``supervisor.stop_seconds``.

    If that used several machines, a stop request ends the waiting.
    """
    previous = read_supervisor_record(context.directories.run_dir)
    if previous is None:
        return
    if previous.agents:
        _end_agents(context, cluster, previous)
    if previous.is_here and not previous.is_running():
        _end_groups(context, previous)


def _end_groups(context: Context, previous: SupervisorRecord) -> None:
    """End what an earlier supervisor has launched on this machine: a launcher that has started no rank yet, too."""
    if groups := rank_processes.groups_of((previous.pid, previous.start)):
        names = ", ".join(map(str, sorted(groups)))
        text = f"found processes of an earlier start (process group {names}): requesting them to save and exit"
        context.reporter.report("orphans", text)
        end(groups, context.settings.supervisor.stop_seconds)


def _end_agents(context: Context, cluster: Cluster | None, previous: SupervisorRecord) -> None:
    """End the agents of an earlier supervisor and their ranks, and report them."""
    report, stop_seconds = context.reporter.report, context.settings.supervisor.stop_seconds
    # In the record of another machine, "localhost" is that machine.
    agents = [agent for agent in previous.agents if previous.is_here or not _is_loopback(agent.host)]
    left = waiting.run_polled(
        context,
        lambda: cluster.end_left_over(agents) if cluster is not None else _end_here(agents, stop_seconds),
    )
    if left is None:
        return
    if left.ended:
        report("orphans", f"ended processes of an earlier start on {', '.join(sorted(left.ended))}")
    if left.unknown and previous.state != "ended":
        names = ", ".join(sorted(left.unknown))
        report("orphans", f"processes of an earlier start may be left on {names}, which this start does not use")
    if cluster is not None:
        report_lost_hosts(context.reporter, cluster, left.problems)


def _end_here(agents: Sequence[AgentRecord], stop_seconds: float) -> LeftOver:
    """End agents on this machine, and the ranks that they have left."""
    left = LeftOver()
    for agent in agents:
        if not is_this_machine(agent.host):
            left.unknown.add(agent.host)
        elif end_previous([agent.pid, agent.start], stop_seconds):
            left.ended.add(agent.host)
    return left


def _is_loopback(host: str) -> bool:
    return host.rpartition("@")[2] in LOOPBACK
