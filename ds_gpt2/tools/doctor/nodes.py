"""The checks of the hosts of a run: each is checked as a machine that trains alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace

from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.cluster.environment import passed_on
from ds_gpt2.supervision.cluster.host_checks import Node, on_all
from ds_gpt2.supervision.cluster.link import LostHostError
from ds_gpt2.tools.doctor.checks import supervisor_checks
from ds_gpt2.tools.doctor.finding import Finding, Row, failure, run_check

# Findings of checks of the session in which the supervisor runs begin with these words: an agent has another session.
_OF_THE_SUPERVISOR = ("terminal", "logout", "time limit", "port ")
_QUICK_SECONDS = 60.0
_FULL_SECONDS = 3600.0  # every byte of the data is read


def node_findings(cluster: Cluster, words: Sequence[str]) -> list[Finding]:
    """Run the quick checks of the doctor on all hosts at the same time.

    Args:
        words: the settings file and the overrides.

    Returns:
        The findings of this machine and of the hosts; the same finding of several hosts only once, such as that of a
        shared directory. Its name includes the hosts.
    """
    hosts: dict[Finding, list[str | None]] = {}
    for row in node_rows(cluster, words, is_quick=True):
        hosts.setdefault(row.finding, []).append(row.host)
    of_hosts = [replace(each, name=f"{_names(names, cluster)}: {each.name}") for each, names in hosts.items()]
    return [*(row.finding for row in supervisor_rows(is_quick=True)), *of_hosts]


def supervisor_rows(is_quick: bool) -> list[Row]:
    """Run the checks of this machine as that of the supervisor."""
    selected = [check for check in supervisor_checks() if check.quick or not is_quick]
    return [Row("this machine", finding) for check in selected for finding in run_check(check)]


def node_rows(cluster: Cluster, words: Sequence[str], is_quick: bool) -> list[Row]:
    """Run the doctor on all hosts that answer at the same time; return its findings, host after host.

    Args:
        words: the settings file and the overrides.
        is_quick: only the quick checks.
    """
    settings = [word for word in words if not word.startswith(("cluster.", "run.device="))]
    settings.append(f"run.device={cluster.accelerator}")
    world_size = sum(host.slots for host in cluster.spec.hosts)
    alone = ["cluster.hostfile=null", "cluster.launch=ssh", "--json", "--world_size", str(world_size)]
    command = ["doctor", *settings, *alone, *(["--quick"] if is_quick else [])]
    seconds = _QUICK_SECONDS if is_quick else _FULL_SECONDS
    rows = on_all(lambda node: _rows(node, [*command, "--num_gpus", str(node.host.slots)], seconds), cluster.nodes)
    return [row for found in rows for row in found]


def _names(hosts: Sequence[str | None], cluster: Cluster) -> str:
    """Return some of the hosts of a cluster as text."""
    if len(hosts) > 1 and len(hosts) == len(cluster.nodes):
        return "all hosts"
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(filter(None, hosts))}"


def _rows(node: Node, command: Sequence[str], seconds: float) -> list[Row]:
    """Run the doctor on a host; what prevents that is a finding."""
    host = node.host.name
    try:
        done = node.link.call("command", seconds, words=list(command), environment=passed_on(os.environ))
        rows = [
            Row(row["group"], Finding(row["name"], row["status"], row["found"], row["fix"]), host)
            for row in json.loads(done["out"])
        ]
    except (LostHostError, UserError) as error:
        return [Row("host", failure("checks", UserError(str(error).removeprefix(f"host {host}: "))), host)]
    except ValueError:
        return [Row("host", Finding("checks", "fail", f"the doctor failed there: {done['err'].strip()}"), host)]
    return [row for row in rows if not row.finding.name.startswith(_OF_THE_SUPERVISOR)]
