"""The checks of the hosts of a run: each is checked as a machine that trains alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.cluster.host_checks import Node, on_all
from ds_gpt2.supervision.cluster.link import LostHostError
from ds_gpt2.tools.doctor.checks import supervisor_checks
from ds_gpt2.tools.doctor.finding import Finding, Row, failure, run_check

# Findings of checks of the session in which the supervisor runs begin with these words: an agent has another session.
_OF_THE_SUPERVISOR = ("terminal", "logout", "time limit", "port ")
_QUICK_SECONDS = 60.0
_FULL_SECONDS = 3600.0  # every byte of the data is read


def node_findings(cluster: Cluster, words: Sequence[str]) -> list[Finding]:
    """Run the quick checks of the doctor on all hosts at the same time; the names of the findings include the host.

    Args:
        words: the settings file and the overrides.
    """
    rows = node_rows(cluster, words, is_quick=True)
    of_hosts = [replace(row.finding, name=f"host {row.host}: {row.finding.name}") for row in rows]
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
    settings = [word for word in words if not word.startswith("cluster.")]
    world_size = sum(host.slots for host in cluster.spec.hosts)
    alone = ["cluster.hostfile=null", "cluster.launch=ssh", "--json", "--world_size", str(world_size)]
    command = ["doctor", *settings, *alone, *(["--quick"] if is_quick else [])]
    seconds = _QUICK_SECONDS if is_quick else _FULL_SECONDS
    rows = on_all(lambda node: _rows(node, [*command, "--num_gpus", str(node.host.slots)], seconds), cluster.nodes)
    return [row for found in rows for row in found]


def _rows(node: Node, command: Sequence[str], seconds: float) -> list[Row]:
    """Run the doctor on a host; what prevents that is a finding."""
    host = node.host.name
    try:
        done = node.link.call("command", seconds, words=list(command))
        rows = [
            Row(row["group"], Finding(row["name"], row["status"], row["found"], row["fix"]), host)
            for row in json.loads(done["out"])
        ]
    except (LostHostError, UserError) as error:
        return [Row("host", failure("checks", UserError(str(error).removeprefix(f"host {host}: "))), host)]
    except ValueError:
        return [Row("host", Finding("checks", "fail", f"the doctor failed there: {done['err'].strip()}"), host)]
    return [row for row in rows if not row.finding.name.startswith(_OF_THE_SUPERVISOR)]
