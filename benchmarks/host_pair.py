"""Two hosts on this machine: namespaces for network, processes, mounts and host name, joined by a link; sshd in each.

It needs Linux, root, iproute2, util-linux and openssh. Missing packages are installed on Debian, but only where systemd
does not run: it would start sshd on all addresses of the machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
}
_SYSTEMD = Path("/run/systemd/system")  # exists while systemd runs
_START_SECONDS = 20.0
_LARGEST_PACKET = 65_536  # bytes: a veth pair passes on what TCP gives it
_BURST_SECONDS = 0.002
_SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@functools.cache
def problem() -> str | None:
    """Return why two hosts cannot be made here; None if they can. Installs what is missing, if services do not run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts need Linux and root"
    if _missing() and (problem := _install()) is not None:
        return problem
    name = f"probe{os.getpid()}"
    try:
        for command in (["ip", "netns", "add", name], ["unshare", "--net", "--pid", "--fork", "--mount", "true"]):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _SEARCH})
            if done.returncode:
                return f"this machine does not allow what two hosts need: {' '.join(command)}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, env={**os.environ, "PATH": _SEARCH})
    return None


def _install() -> str | None:
    """Install the missing packages with apt, unless services run here; return the problem, if any."""
    if shutil.which("apt-get") is None:
        return f"two hosts need the packages {', '.join(_missing())}"
    if _SYSTEMD.exists():
        return f"two hosts need missing packages: `apt-get install {' '.join(_missing())}`"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "--yes", "-o", "DPkg::Lock::Timeout=300"]  # another process of the tests may install, too
    for words in (["install", "--no-install-recommends", *_missing()], ["update"], ["install", *_missing()]):
        done = subprocess.run([*apt, *words], env=environment, capture_output=True, text=True)
        if not (missing := _missing()):
            return None
    return f"two hosts need {', '.join(missing)}, which cannot be installed: {done.stderr.strip()[-200:]}"


def _missing() -> list[str]:
    return sorted({package for program, package in _PACKAGES.items() if shutil.which(program, path=_SEARCH) is None})


@dataclass
class Host:
    """One of the hosts."""

    name: str
    address: str
    namespace: str
    folder: Path
    outer: subprocess.Popen[bytes] | None = None

    @property
    def init(self) -> psutil.Process:
        """The process that is number 1 on the host; all processes of the host end with it."""
        assert self.outer is not None
        return psutil.Process(self.outer.pid).children()[0]

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs ``words`` on this host; ``ssh`` there reaches the other one."""
        enter = ["nsenter", "-t", str(self.init.pid), "--net", "--pid", "--mount", "--uts", f"--wd={Path.cwd()}"]
        return [*enter, "--", "env", f"PATH={self.folder.parent / 'bin'}:{_SEARCH}", *words]

    def run(self, *words: str) -> str:
        """Run ``words`` on this host and return the output."""
        return subprocess.run(self.command(words), check=True, capture_output=True, text=True).stdout

    @contextlib.contextmanager
    def without(self, directory: Path) -> Iterator[None]:
        """Put an empty directory of this host in the place of ``directory``, which is then not shared."""
        self.run("mount", "-t", "tmpfs", "none", str(directory))
        try:
            yield
        finally:
            self.run("umount", str(directory))

    def processes(self) -> list[psutil.Process]:
        """Return the processes of this host, without number 1 and zombies."""
        namespace = os.readlink(f"/proc/{self.init.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                is_here = os.readlink(f"/proc/{process.pid}/ns/pid") == namespace and process.pid != self.init.pid
                if is_here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def matching(self, *words: str) -> list[psutil.Process]:
        """Return the processes of this host with all ``words`` in their command lines."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if all(word in command for word in words):
                    found.append(process)
        return found


class TwoHosts:
    """Hosts a (10.77.x.1) and b (10.77.x.2)."""

    def __init__(self, folder: Path, number: int = 0) -> None:
        """
        Args:
            number: of this pair, below 200: pairs with different numbers may exist at the same time.
        """
        self.folder = folder
        self._tag = f"t{os.getpid() % 100_000}n{number}"
        network = f"10.77.{number + os.getpid() % 50}"
        self.a, self.b = (
            Host(f"host-{letter}", f"{network}.{place}", f"{self._tag}{letter}", folder / letter)
            for place, letter in enumerate("ab", 1)
        )

    @property
    def all(self) -> tuple[Host, Host]:
        return self.a, self.b

    def start(self, names: Mapping[str, str] | None = None) -> None:
        """Make the hosts, the link and the keys.

        Args:
            names: host name -> further lines of /etc/hosts there.
        """
        (self.folder / "bin").mkdir(parents=True)
        key = self.folder / "key"
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        config = f"Host *\n  IdentityFile {key}\n  StrictHostKeyChecking no\n  UserKnownHostsFile {self.folder}/known\n"
        (self.folder / "ssh_config").write_text(config)
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{self.folder}/ssh_config" "$@"\n')
        wrapper.chmod(0o755)
        for host in self.all:
            _do("ip", "netns", "add", host.namespace)
        _do("ip", "link", "add", "eth0", "netns", self.a.namespace, "type", "veth", "peer", "name", "eth0",
            "netns", self.b.namespace)  # fmt: skip
        for host in self.all:
            _do("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _do("ip", "-n", host.namespace, "link", "set", device, "up")
            own = (names or {}).get(host.name, "")
            others = "".join(f"{each.address} {each.name}\n" for each in self.all if own == "" or each is not host)
            host.folder.mkdir()
            (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{own}\n{others}")
            self.start_host(host)

    def start_host(self, host: Host) -> None:
        """Start the processes of a host, as a boot does."""
        host_key = host.folder / "host_key"
        if not host_key.exists():
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key))
        (host.folder / "sshd_config").write_text(
            f"ListenAddress {host.address}:22\nHostKey {host_key}\nAuthorizedKeysFile {self.folder}/key.pub\n"
            "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
        )
        # Without the disks that other tests have mounted, which could not unmount them otherwise.
        forget = "awk '$1 ~ /^.dev.loop/ {print $2}' /proc/mounts | xargs --no-run-if-empty umount --lazy"
        boot = (
            f"{forget}; hostname {host.name}; mkdir -p /run/sshd; mount --bind '{host.folder}/hosts' /etc/hosts;"
            f" exec {shutil.which('sshd', path=_SEARCH)} -D -e -f '{host.folder}/sshd_config'"
        )
        unshare = ["unshare", "--pid", "--fork", "--mount", "--uts", "--mount-proc", "--kill-child"]
        with (host.folder / "sshd.log").open("ab") as log:
            host.outer = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{host.namespace}", *unshare, "bash", "-c", boot],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers(host):
            assert time.monotonic() < deadline, (host.folder / "sshd.log").read_text()
            time.sleep(0.1)

    def _answers(self, host: Host) -> bool:
        listening = subprocess.run(
            ["nsenter", f"--net=/run/netns/{host.namespace}", "cat", "/proc/net/tcp"], capture_output=True, text=True
        )
        return ":0016 " in listening.stdout

    def link(self, state: str) -> None:
        """Cut the link (``down``) or connect it (``up``)."""
        _do("ip", "-n", self.b.namespace, "link", "set", "eth0", state)

    def limit(self, rate: float | None) -> None:
        """Limit what each host sends to the other.

        Args:
            rate: bits per second; None: no limit.
        """
        for host in self.all:
            qdisc = ["tc", "-n", host.namespace, "qdisc"]
            subprocess.run([*qdisc, "del", "dev", "eth0", "root"], capture_output=True)
            if rate is not None:
                burst = max(2 * _LARGEST_PACKET, rate / 8 * _BURST_SECONDS)  # bytes
                _do(*qdisc, "add", "dev", "eth0", "root", "tbf", "rate", f"{rate:.0f}bit",
                    "burst", f"{burst:.0f}", "latency", "50ms")  # fmt: skip

    def kill(self, host: Host) -> None:
        """End all processes of a host, as a loss of power does."""
        host.init.kill()
        assert host.outer is not None
        host.outer.wait()

    def stop(self) -> None:
        """End both hosts and remove the link."""
        for host in self.all:
            if host.outer is not None and host.outer.poll() is None:
                with contextlib.suppress(psutil.Error, IndexError):
                    host.init.kill()
                host.outer.kill()
                host.outer.wait()
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "PATH": _SEARCH})
