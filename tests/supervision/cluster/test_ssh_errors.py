"""What to do about an error of ssh. The lines are those of OpenSSH 9.2."""

from __future__ import annotations

import pytest

from ds_gpt2.supervision.cluster.ssh_errors import advice_on

CHANGED = [
    "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @",
    "Offending ED25519 key in known_hosts:1",
    "Host key for [10.0.0.2]:2222 has changed and you have requested strict checking.",
    "Host key verification failed.",
]
ACCEPT = "accept it with `ssh node1` once by hand"


@pytest.mark.parametrize(
    ("lines", "advice"),
    [
        (["Host key verification failed."], f"ssh: its host key is not known: {ACCEPT}"),
        (
            [
                "No ED25519 host key is known for node1 and you have requested strict checking.",
                "Host key verification failed.",
            ],
            f"ssh: its host key is not known: {ACCEPT}",
        ),
        (
            ["ssh: connect to host node1 port 22: No route to host"],
            "ssh: connect to host node1 port 22: No route to host: check its name, whether it runs an ssh server, and"
            " the network and firewall",
        ),
        (
            ["root@node1: Permission denied (publickey,password).", ""],
            "ssh: root@node1: Permission denied (publickey,password): `ssh node1 true` must work without a password",
        ),
        ([], "ssh: it cannot connect: `ssh node1 true` must work without a password"),
    ],
)
def test_each_error_has_its_advice(lines: list[str], advice: str) -> None:
    assert advice_on("node1", lines) == advice


def test_a_changed_host_key_is_removed_under_the_name_that_ssh_uses() -> None:
    expected = "`ssh-keygen -R '[10.0.0.2]:2222'`, then accept the new one with `ssh node1` once by hand"
    assert advice_on("node1", CHANGED).endswith(f"remove the old one with {expected}")
    printed = 'ssh-keygen -f "known_hosts" -R "[10.0.0.2]:2222"'
    assert f"with `{printed}`, then" in advice_on("node1", [*CHANGED[:2], printed, *CHANGED[2:]])


@pytest.mark.parametrize(
    "line",
    [
        "ssh: Could not resolve hostname node1: Name or service not known",
        "ssh: connect to host node1 port 22: Connection timed out",
        "Connection closed by 10.0.0.2 port 22",
    ],
)
def test_a_host_that_cannot_be_reached_has_nothing_to_do_with_passwords(line: str) -> None:
    advice = advice_on("node1", [line])
    assert advice.startswith("ssh: ") and "ssh: ssh:" not in advice
    assert "network" in advice and "password" not in advice
