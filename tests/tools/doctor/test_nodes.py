"""The checks of the hosts of a run; ``test_two_hosts`` has real hosts."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.tools.doctor.finding import Finding, in_one_line
from ds_gpt2.tools.doctor.nodes import node_findings, node_rows

SHARED = Finding("file system", "warn", "NFS without locks", "mount it with locks")


class FakeLink:
    """The connection to a host on which the doctor finds ``findings``."""

    def __init__(self, findings: list[Finding]) -> None:
        self._findings = findings
        self.requests: list[dict[str, Any]] = []

    def call(self, what: str, seconds: float, **parameters: Any) -> Any:
        self.requests.append(parameters)
        return {"out": json.dumps([{"group": "disk", **vars(finding)} for finding in self._findings]), "err": ""}


def _cluster(**findings: list[Finding]) -> Any:
    hosts = [Host(name, 2) for name in findings]
    nodes = [SimpleNamespace(host=host, link=FakeLink(findings[host.name])) for host in hosts]
    return SimpleNamespace(spec=SimpleNamespace(hosts=hosts), nodes=nodes, accelerator="cpu")


def test_a_finding_of_several_hosts_is_one_line() -> None:
    other = Finding("file system", "warn", "ext4")
    found = [in_one_line(row) for row in node_findings(_cluster(a=[SHARED], b=[SHARED], c=[SHARED, other]), [])]
    assert found[-2:] == [
        "all hosts: file system: NFS without locks; mount it with locks",
        "host c: file system: ext4",
    ]
    found = [in_one_line(row) for row in node_findings(_cluster(a=[SHARED], b=[], c=[SHARED]), [])]
    assert found[-1].startswith("hosts a, c: file system: NFS")
    found = [in_one_line(row) for row in node_findings(_cluster(a=[SHARED]), [])]
    assert found[-1].startswith("host a: file system: NFS")


def test_the_doctor_on_a_host_has_the_device_and_the_environment_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "training")
    cluster = _cluster(a=[])
    node_rows(cluster, ["run.yaml", "run.device=auto", "cluster.hostfile=hosts", "run.seed=3"], is_quick=True)
    (request,) = cluster.nodes[0].link.requests
    words = request["words"]
    assert words[:4] == ["doctor", "run.yaml", "run.seed=3", "run.device=cpu"]
    assert words[words.index("--num_gpus") + 1] == "2" and "cluster.hostfile=hosts" not in words
    assert request["environment"]["AWS_PROFILE"] == "training" and "PATH" not in request["environment"]
