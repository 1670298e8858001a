"""What is compared between hosts, and the network between them. The agents are played by the test."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from ds_gpt2.common import files, shared_directory
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.run_location import CONFIG
from ds_gpt2.run_dir.journal import JOURNAL
from ds_gpt2.supervision.cluster import host_checks, node_checks
from ds_gpt2.supervision.cluster.host_checks import Node, find_network
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import LostHostError

ADDRESSES = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]}


class FakeLink:
    """The connection to the agent of a host."""

    def __init__(self, host: str, **answers: Any) -> None:
        """
        Args:
            answers: by the name of the request; functions are called with its parameters.
        """
        self.host = host
        self._answers: dict[str, Any] = {"listen": 1, "free_port": 2, "resolve": [], **answers}

    def call(self, what: str, seconds: float, **parameters: Any) -> Any:
        answer = self._answers[what]
        return answer(**parameters) if callable(answer) else answer


def _node(host: str, addresses: Mapping[str, list[str]] = ADDRESSES, **answers: Any) -> Node:
    link: Any = FakeLink(host, **answers)
    return Node(Host(host, 1), link, host, None, addresses, {})


def _reached(**interfaces: str) -> dict[str, dict[str, Any]]:
    """Return the answer of a host that reaches addresses of the first, by the name of the interface there."""
    return {ADDRESSES[first][0]: {"interface": own, "round_trip": 1e-4} for first, own in interfaces.items()}


def test_the_first_address_that_all_hosts_reach_is_used() -> None:
    others = [_node("b", reach=_reached(eth0="ens5", ib0="ib0")), _node("c", reach=_reached(ib0="ib1"))]
    network = find_network([_node("a"), *others])
    assert (network.address, network.interfaces) == ("10.1.0.1", ("ib0", "ib0", "ib1"))


def test_the_addresses_of_the_name_of_the_first_host_are_tried_first() -> None:
    asked: list[Any] = []

    def reach(addresses: list[str], **_: object) -> dict[str, dict[str, Any]]:
        asked.append(addresses)
        return _reached(eth0="eth0", ib0="ib0")

    network = find_network([_node("a"), _node("b", resolve=["10.1.0.1", "127.0.1.1"], reach=reach)])
    assert network.address == "10.1.0.1" and asked == [["10.1.0.1", "10.0.0.1"]]


def test_an_interface_must_exist_on_all_hosts() -> None:
    reached = _reached(eth0="eth0", ib0="ib0")
    nodes = [_node("a"), _node("b", reach=reached)]
    assert find_network(nodes, "eth0").interfaces == ("eth0", "eth0")
    nodes.append(_node("c", {"lo": ["127.0.0.1"], "ens5": ["10.0.0.3"]}, reach=reached))
    message = r"^cluster\.interface=eth0: host c has no such interface; it has ens5, lo$"
    with pytest.raises(UserError, match=message):
        find_network(nodes, "eth0")
    with pytest.raises(UserError, match=r"^cluster\.interface=nope0: host a has no such interface"):
        find_network(nodes[:1], "nope0")
    assert find_network(nodes[:1], "eth0").address == "127.0.0.1"


def test_a_host_that_reaches_no_address_is_named() -> None:
    nodes = [_node("a"), _node("b", reach=_reached(eth0="eth0")), _node("c", reach={}), _node("d", reach={})]
    message = (
        r"^host c, d cannot connect to a by IPv4 \(10\.0\.0\.1, 10\.1\.0\.1\), IPv6 is not used: check the firewall"
    )
    with pytest.raises(UserError, match=message):
        find_network(nodes)
    nodes[0] = _node("a", {"lo": ["127.0.0.1"]})
    with pytest.raises(UserError, match=r"\(a has no address besides that of the loopback interface\)"):
        find_network([nodes[0], nodes[2]])


def test_hosts_that_reach_different_addresses_are_listed() -> None:
    nodes = [_node("a"), _node("b", reach=_reached(eth0="eth0")), _node("c", reach=_reached(ib0="ib0"))]
    message = r"^no address of a can be reached from all hosts: b reaches 10\.0\.0\.1; c reaches 10\.1\.0\.1: check"
    with pytest.raises(UserError, match=message):
        find_network(nodes)


def _with_disk(host: str, mark: Any = node_checks.mark) -> Node:
    """Return a node that compares the directories of this machine."""

    def has_marks(directories: list[str], names: list[str]) -> list[list[str]]:
        return shared_directory.has_marks(directories, names, seconds=0)

    return _node(host, mark=mark, has_marks=has_marks, unmark=shared_directory.unmark)


def test_shared_directories_pass_and_no_file_is_left(tmp_path: Path) -> None:
    host_checks.check_shared([_with_disk("a"), _with_disk("b")], [tmp_path / "runs", tmp_path / "checkpoints"])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_shared_is_named_with_both_hosts(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()

    def mark(directories: list[str], name: str) -> list[str]:
        return shared_directory.mark([str(there)] * len(directories), name)

    with pytest.raises(UserError, match=rf"^{here} is not the same directory on a and b: mount a shared file system"):
        host_checks.check_shared([_with_disk("a"), _with_disk("b", mark)], [here])
    assert list(here.iterdir()) == []


def test_nothing_is_left_if_a_host_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = [tmp_path / "runs", tmp_path / "checkpoints"]
    for directory in directories:
        directory.mkdir()
    open_for_writing = files.open_for_writing

    def refuse(path: Path, mode: str) -> BinaryIO:
        if path.parent == directories[1] and path.name.endswith("-1"):  # of host b
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_for_writing(path, mode)

    monkeypatch.setattr(files, "open_for_writing", refuse)
    message = rf"cannot write to {directories[1]}: Read-only file system; check its permissions and its disk$"
    with pytest.raises(UserError, match=message):
        host_checks.check_shared([_with_disk("a"), _with_disk("b")], directories)
    assert [list(directory.iterdir()) for directory in directories] == [[], []]


def test_a_settings_file_that_a_host_lacks_is_named(tmp_path: Path) -> None:
    config = tmp_path / CONFIG
    config.write_text("")

    def problem(config: Path) -> str:
        link: Any = FakeLink("b", ping=lambda: time.time(), exists=False)
        with pytest.raises(UserError) as error:
            host_checks.node_of(Host("b", 1), link, ["--config", str(config)], "cpu")
        return str(error.value)

    expected = f"host b: the settings file {config} does not exist there: copy it, or use a shared directory"
    assert problem(config) == expected
    (tmp_path / JOURNAL).write_text("")  # the directory of a run, which resumes
    expected = f"host b: {tmp_path} is not the same directory on that host and this machine: mount a shared file system"
    assert problem(config).startswith(expected)


def test_the_files_of_a_host_that_has_not_answered_are_deleted(tmp_path: Path) -> None:
    def mark(directories: list[str], name: str) -> list[str]:
        shared_directory.mark(directories, name)
        raise LostHostError("it has not answered the request 'mark' within 60 s")

    with pytest.raises(UserError, match=r"^host b: it has not answered the request 'mark'"):
        host_checks.check_shared([_with_disk("a"), _with_disk("b", mark)], [tmp_path / "runs"])
    assert list(tmp_path.iterdir()) == []
