"""The checks of the hosts of a run: each is checked as a machine that trains alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from ds_gpt2.common.errors import UserError
from ds_gpt2.supervision.cluster.cluster import Cluster
from ds_gpt2.supervision.cluster.host_checks import Node, on_all
from ds_gpt2.tools.doctor.finding import Finding, failure

_OF_THE_HEAD = {"terminal", "logout", "time limit", "port"}  # checks of the machine where the supervisor runs


def node_findings(cluster: Cluster, words: Sequence[str]) -> list[Finding]:
    """Run the quick checks of the doctor on all hosts at the same time; the names of the findings include the host.

    Args:
        words: the settings file and the overrides.
    """
    settings = [word for word in words if not word.startswith("cluster.")]
    rows = on_all(lambda node: _findings(node, settings), cluster.nodes)
    return [row for found in rows for row in found]


def _findings(node: Node, words: Sequence[str]) -> list[Finding]:
    alone = ("cluster.hostfile=null", "cluster.launch=ssh", "--quick", "--json", "--num_gpus", str(node.host.slots))
    prefix = f"host {node.host.name}: "
    try:
        done = node.call("command", words=["doctor", *words, *alone])
        rows = [Finding(row["name"], row["status"], row["found"], row["fix"]) for row in json.loads(done["out"])]
    except UserError as error:
        return [failure(f"{prefix}checks", error)]
    except ValueError:
        return [Finding(f"{prefix}checks", "fail", f"the doctor failed there: {done['err'].strip()}")]
    is_head = node.link.is_local
    return [replace(row, name=prefix + row.name) for row in rows if is_head or row.name not in _OF_THE_HEAD]
