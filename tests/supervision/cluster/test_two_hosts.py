"""Runs on two hosts: the same result as on one, and the loss of a part of a host, of a host, or of the link."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launched import PROJECT, launch
from two_hosts import Host, HostCommand, TwoHosts, assert_nothing_is_left, small_run, two_hosts

from ds_gpt2.checkpoint.catalog import newest_step, problem_of, scan
from ds_gpt2.config.settings import load_settings
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.journal import Event, read_journal
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences
from ds_gpt2.tools.status.status import read_status

pytestmark = [pytest.mark.ranks, pytest.mark.extended]

STEPS = 24
MAIN = str(PROJECT / "ds_gpt2" / "__main__.py")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts") / "pair") as pair:
        yield pair


_started: list[Started] = []


@pytest.fixture(autouse=True)
def _end_runs() -> Iterator[None]:
    """End runs that a failed test has left: the next test uses the same hosts."""
    yield
    while _started:
        run = _started.pop()
        if run.process.poll() is not None:
            continue
        for process in (process for host in run.hosts.all for process in host.matching("ds_gpt2")):
            with contextlib.suppress(psutil.Error):
                process.kill()
        run.process.kill()
        run.process.communicate()


class Started(HostCommand):
    """A supervised run that host a has started on both hosts."""

    def __init__(
        self,
        hosts: TwoHosts,
        config: Path,
        *words: str,
        verb: str = "train",
        slots: int = 2,
        named: bool = False,
        hostfile: str | None = None,
    ) -> None:
        """
        Args:
            named: hosts are given by name, not by address.
            hostfile: its content, if it is not both hosts with ``slots`` ranks.
        """
        self.hosts = hosts
        self.settings = load_settings(config)
        usual = "".join(f"{host.name if named else host.address} slots={slots}\n" for host in hosts.all)
        path = config.with_name("hosts")
        path.write_text(usual if hostfile is None else hostfile)
        target = str(config) if verb == "train" else str(self.settings.run_dir)
        super().__init__(hosts.a, [sys.executable, MAIN, verb, target, "--hostfile", str(path), *words])
        _started.append(self)

    @property
    def saved(self) -> int:
        return newest_step(self.settings.checkpoint_dir)

    @property
    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.settings.run_dir / METRICS)), default=0)

    def events(self, kind: str) -> list[Event]:
        with contextlib.suppress(OSError):
            return [event for event in read_journal(self.settings.run_dir) if event.kind == kind]
        return []

    def progress(self) -> None:
        """Wait until another checkpoint is saved."""
        saved = self.saved
        self.wait_for(lambda: self.saved > saved)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop the run; check that it is saved and that no process is left."""
        self.program.send_signal(number)
        output = self.end()
        assert self.process.returncode == exit_codes.STOPPED, output
        assert problem_of(scan(self.settings.checkpoint_dir)[0]) is None
        assert_nothing_is_left(self.hosts)

    def ranks(self, host: Host) -> list[psutil.Process]:
        return host.matching("--local_rank=", str(self.settings.run.dir.parent))


Configure = Callable[..., Path]


@pytest.fixture
def configure(tmp_path: Path, write_config: Callable[..., Path]) -> Configure:
    def write(steps: int = 1_000_000, folder: Path = tmp_path, **sections: object) -> Path:
        return write_config(folder, **small_run(folder, steps, 6, **sections))

    return write


def test_a_run_on_two_hosts_equals_the_run_on_one(hosts: TwoHosts, configure: Configure, tmp_path: Path) -> None:
    config = configure(STEPS)
    run = Started(hosts, config)
    output = run.end()
    assert run.process.returncode == exit_codes.DONE, output
    assert f"starting 4 ranks on {hosts.a.address} (2), {hosts.b.address} (2)" in output
    assert_nothing_is_left(run.hosts)
    one = Path(tmp_path / "one")
    words = [f"run.dir={one / 'runs'}", f"checkpoint.dir={one / 'checkpoints'}"]
    assert launch(4, "--config", str(config), *words).code == exit_codes.DONE
    assert curve_differences(run.settings.run_dir, one / "runs" / "test") == []
    newest = scan(run.settings.checkpoint_dir)[0]
    assert newest.step == STEPS
    assert checkpoint_differences(newest.path, one / "checkpoints" / "test" / newest.tag) == []


def test_a_run_on_one_host_is_forked_onto_two(hosts: TwoHosts, configure: Configure, tmp_path: Path) -> None:
    config = configure(12)
    done = launch(4, "--config", str(config))
    assert done.code == exit_codes.DONE, done.output
    run = Started(hosts, config, "--fork", f"{tmp_path / 'runs' / 'test'}:6", "run.name=fork")
    output = run.end()
    assert run.process.returncode == exit_codes.DONE, output
    assert "run fork: forked from test at step 6 (rolling_step_000006)" in output
    assert_nothing_is_left(run.hosts)
    parent, fork = (list(read_metrics(tmp_path / "runs" / name / METRICS)) for name in ("test", "fork"))
    assert [record["step"] for record in fork] == list(range(7, 13))
    assert [record["train/loss"] for record in fork] == [record["train/loss"] for record in parent[6:]]


@pytest.mark.parametrize("how", ["one rank", "all ranks"])
def test_killed_ranks_of_the_other_host_are_restarted(hosts: TwoHosts, configure: Configure, how: str) -> None:
    run = Started(hosts, configure())
    run.wait_for(lambda: run.saved >= 6)
    for process in run.ranks(hosts.b)[: 1 if how == "one rank" else None]:
        process.kill()
    run.wait_for(lambda: len(run.events("start")) == 2)
    crash = run.events("crash")[0]
    assert "was killed by SIGKILL" in crash.text and ("rank 2" in crash.text or "rank 3" in crash.text)
    run.progress()
    run.stop(signal.SIGINT)


def test_a_run_survives_the_loss_of_an_agent_and_of_a_connection(hosts: TwoHosts, configure: Configure) -> None:
    run = Started(hosts, configure())
    run.wait_for(lambda: run.saved >= 6)
    (agent,) = hosts.b.matching("cluster/agent.py")
    agent.kill()
    run.wait_for(lambda: len(run.events("start")) == 2)
    run.progress()
    assert len(run.ranks(hosts.b)) == 2
    for process in hosts.b.matching("sshd-session: root@notty") or hosts.b.matching("sshd: root@notty"):
        process.kill()
    run.wait_for(lambda: len(run.events("start")) == 3)
    run.progress()
    lost = [event.text.partition(" (")[0] for event in run.events("host_lost")]  # ssh may add a line of its own
    assert lost == [f"host {hosts.b.address} is lost: the connection to its agent has ended"] * 2
    assert len(run.events("host_back")) == 2
    run.stop()


def test_a_run_continues_without_a_host_and_takes_it_back(hosts: TwoHosts, configure: Configure) -> None:
    run = Started(hosts, configure())
    run.wait_for(lambda: run.saved >= 6)
    hosts.kill(hosts.b)
    run.wait_for(lambda: len(run.events("start")) == 2)
    assert "10.77" in run.events("launch")[1].text and hosts.b.address not in run.events("launch")[1].text
    assert len(run.ranks(hosts.a)) == 2
    run.progress()
    hosts.start_host(hosts.b)
    run.ranks(hosts.a)[0].kill()
    run.wait_for(lambda: len(run.events("start")) == 3)
    assert [event.text for event in run.events("host_back")] == [f"host {hosts.b.address} answers again"]
    assert len(run.ranks(hosts.b)) == 2
    run.stop()


def test_a_run_waits_for_as_many_hosts_as_the_user_wants(hosts: TwoHosts, configure: Configure) -> None:
    run = Started(hosts, configure(cluster={"min_nodes": 2}))
    run.wait_for(lambda: run.saved >= 6)
    hosts.kill(hosts.b)
    run.wait_for(lambda: run.events("few_hosts"))
    assert run.events("few_hosts")[0].text.startswith("1 host of 2 answer, cluster.min_nodes is 2: waiting for more")
    assert run.ranks(hosts.a) == []
    hosts.start_host(hosts.b)
    run.wait_for(lambda: len(run.events("start")) == 2)
    run.progress()
    run.stop()


def test_a_cut_link_ends_the_ranks_within_seconds_and_the_run_continues(hosts: TwoHosts, configure: Configure) -> None:
    run = Started(hosts, configure())
    run.wait_for(lambda: run.saved >= 6)
    cut = time.monotonic()
    hosts.link("down")
    try:
        run.wait_for(lambda: len(run.events("start")) == 2, seconds=120)  # the collectives would wait for 10 minutes
        assert "has not answered for" in run.events("host_lost")[0].text
        time.sleep(max(0.0, cut + 60 - time.monotonic()))
    finally:
        hosts.link("up")
    run.progress()
    run.ranks(hosts.a)[0].kill()
    run.wait_for(lambda: len(run.events("start")) == 3)
    assert len(run.ranks(hosts.b)) == 2
    run.progress()
    run.stop(signal.SIGINT)


def test_a_supervisor_that_was_stopped_restarts_its_ranks(hosts: TwoHosts, configure: Configure) -> None:
    """SIGSTOP, as Ctrl+Z in a terminal; then a second start on the other host, which is refused."""
    run = Started(hosts, configure())
    run.wait_for(lambda: run.saved >= 6)
    run.program.suspend()
    try:
        run.wait_for(lambda: run.events("stop"))
        time.sleep(5)
    finally:
        run.program.resume()
        psutil.Process(run.process.pid).resume()  # nsenter, which stops together with the program
    run.wait_for(lambda: len(run.events("start")) == 2)
    run.progress()
    (stop,), (crash,) = run.events("stop"), run.events("crash")
    assert stop.text.startswith("stopped because the connection to the supervisor was lost at step ")
    where = f"the ranks on {hosts.a.address}, {hosts.b.address} were ended: this supervisor was stopped (SIGSTOP)"
    assert crash.text.startswith(where) and run.events("host_lost") == run.events("host_back") == []
    for words in (["resume", str(run.settings.run_dir)], ["train", str(run.settings.run_dir / "config.yaml")]):
        code, output = _on_host(hosts.b, sys.executable, MAIN, *words)
        assert code == exit_codes.MISTAKE and output.count("\n") == 1, output
        assert "error: run test is supervised by process" in output and "on host-a, last seen" in output
    run.stop()


def test_a_killed_supervisor_leaves_a_saved_run_and_no_process(hosts: TwoHosts, configure: Configure) -> None:
    config = configure()
    run = Started(hosts, config)
    run.wait_for(lambda: run.saved >= 6)
    run.program.kill()
    run.process.wait()
    step = run.step
    assert_nothing_is_left(run.hosts)
    assert run.saved >= step and problem_of(scan(run.settings.checkpoint_dir)[0]) is None
    again = Started(hosts, config, f"schedule.steps={run.saved + 4}", verb="resume")
    output = again.end()
    assert again.process.returncode == exit_codes.DONE, output
    assert_nothing_is_left(again.hosts)


def test_a_run_whose_head_is_lost_is_resumed_elsewhere_after_its_lease(hosts: TwoHosts, configure: Configure) -> None:
    """File locks do not tell: the system frees those of a lost host at once here, a file server may never do so."""
    run = Started(hosts, configure(supervisor={"stop_seconds": 5}))
    run.wait_for(lambda: run.saved >= 6)
    status = read_status(run.settings.run_dir, time.time())
    assert (status.state, [host.ranks for host in status.hosts]) == ("running", [2, 2])
    hosts.kill(hosts.a)
    run.process.wait()
    lost = time.monotonic()
    words = [sys.executable, MAIN, "resume", str(run.settings.run_dir), "cluster.hostfile=null", "--num_gpus", "2"]
    words.append(f"schedule.steps={run.saved + 4}")
    try:
        code, output = _on_host(hosts.b, *words)
        assert code == exit_codes.MISTAKE, output
        assert "is supervised by process" in output and "on host-a, last seen" in output
        time.sleep(max(0.0, lost + 65 - time.monotonic()))
        _, seen = _on_host(hosts.b, sys.executable, MAIN, "status", str(run.settings.run_dir), "--json")
        assert '"state": "dead"' in seen and "the supervisor on host-a is gone, or that machine" in seen
        code, output = _on_host(hosts.b, *words)
        assert code == exit_codes.DONE, output
    finally:
        hosts.start_host(hosts.a)
    assert_nothing_is_left(run.hosts)


def _on_host(host: Host, *words: str) -> tuple[int, str]:
    """Run a command on a host; return its exit code and output."""
    command = HostCommand(host, words)
    output = command.end()
    return command.process.returncode, output


def test_ranks_that_cannot_save_are_killed_after_the_supervisor(hosts: TwoHosts, configure: Configure) -> None:
    """The ranks of host b are stopped (SIGSTOP), so that those of host a wait for them."""
    config = configure(supervisor={"stop_seconds": 5})
    run = Started(hosts, config)
    run.wait_for(lambda: run.saved >= 6)
    saved = run.saved
    for process in run.ranks(hosts.b):
        process.suspend()
    run.program.kill()
    run.process.wait()
    assert_nothing_is_left(run.hosts)
    again = Started(hosts, config, f"schedule.steps={run.saved + 4}", verb="resume")
    output = again.end()
    assert again.process.returncode == exit_codes.DONE, output
    assert f"resumed from {run.settings.checkpoint_dir}/rolling_step_" in output and again.saved > saved
    assert_nothing_is_left(again.hosts)


def test_a_hang_is_found_and_the_stacks_of_all_hosts_are_written(hosts: TwoHosts, configure: Configure) -> None:
    run = Started(hosts, configure(supervisor={"hang_seconds": 8, "hang_factor": 5, "backoff_seconds": 0.5}))
    run.wait_for(lambda: run.saved >= 6)
    run.ranks(hosts.b)[0].suspend()
    run.wait_for(lambda: run.events("hang"))
    hang = run.events("hang")[0]
    assert ("rank 2" in hang.text or "rank 3" in hang.text) and "its process is stopped" in hang.text
    stacks = sorted(path.name for path in Path(hang.facts["stacks"]).iterdir())
    assert stacks == [f"rank_{rank:05d}.txt" for rank in range(4)]
    run.wait_for(lambda: len(run.events("start")) == 2)
    run.stop()


def test_two_runs_on_the_same_hosts_do_not_touch_each_other(
    hosts: TwoHosts, configure: Configure, tmp_path: Path
) -> None:
    first = Started(hosts, configure(), slots=1)
    second = Started(hosts, configure(folder=tmp_path / "other"), slots=1)
    first.wait_for(lambda: first.saved >= 6)
    second.wait_for(lambda: second.saved >= 6)
    first.program.terminate()
    output = first.end()
    assert first.process.returncode == exit_codes.STOPPED, output
    second.progress()
    assert [kind for kind in ("start", "crash", "host_lost") for _ in second.events(kind)] == ["start"]
    second.stop()


def test_a_run_whose_directories_are_moved_resumes_there(hosts: TwoHosts, configure: Configure, tmp_path: Path) -> None:
    run = Started(hosts, configure())
    run.wait_for(lambda: run.saved >= 6)
    old, moved = run.settings.run_dir, tmp_path / "moved"
    checkpoints = run.settings.checkpoint_dir
    moved.mkdir()
    for directory in (old.parent, checkpoints.parent):
        directory.rename(moved / directory.name)
    run_dir, moved_checkpoints = (moved / path.relative_to(tmp_path) for path in (old, checkpoints))

    def starts() -> list[int | None]:
        return [event.step for event in read_journal(run_dir) if event.kind == "start"]

    run.wait_for(lambda: len(starts()) == 2)
    saved = newest_step(moved_checkpoints)
    run.wait_for(lambda: newest_step(moved_checkpoints) > saved)
    run.program.terminate()
    output = run.end()
    assert run.process.returncode == exit_codes.STOPPED, output
    assert f"{old} was moved to {run_dir}: resuming there" in output and not old.exists()
    assert_nothing_is_left(hosts)


def test_names_that_resolve_to_the_loopback_interface_on_their_own_host(configure: Configure, tmp_path: Path) -> None:
    """As Debian's installer writes them."""
    names = {name: f"127.0.1.1 {name}" for name in ("host-a", "host-b")}
    with two_hosts(tmp_path / "pair", number=60, names=names) as hosts:
        config = configure(4)
        run = Started(hosts, config, named=True)
        output = run.end()
        assert run.process.returncode == exit_codes.DONE, output


@pytest.fixture
def refused(hosts: TwoHosts, configure: Configure) -> Callable[..., str]:
    """Return a function that starts a run and returns its error, the only line besides the first."""

    def start(*words: str, hostfile: str | None = None) -> str:
        run = Started(hosts, configure(4), *words, hostfile=hostfile)
        output = run.end()
        assert run.process.returncode == exit_codes.MISTAKE, output
        first, *errors = output.splitlines()
        assert first == "connecting to 2 hosts ..." and len(errors) == 1, output
        assert not run.settings.run_dir.exists()
        assert_nothing_is_left(run.hosts)
        return errors[0]

    return start


def test_a_host_that_does_not_answer_is_named(hosts: TwoHosts, refused: Callable[..., str]) -> None:
    absent = hosts.b.address.removesuffix("2") + "77"
    start_time = time.monotonic()
    error = refused(hostfile=f"{hosts.a.address} slots=2\n{absent} slots=2\n")
    assert error.startswith(f"error: host {absent}: ssh: ") and time.monotonic() - start_time < 15
    assert error.endswith("check its name, whether it runs an ssh server, and the network and firewall")


def test_a_host_without_the_key_is_named(hosts: TwoHosts, refused: Callable[..., str]) -> None:
    public = hosts.folder / "key.pub"
    public.rename(hosts.folder / "away")
    try:
        error = refused()
    finally:
        (hosts.folder / "away").rename(public)
    assert error.startswith(f"error: host {hosts.b.address}: ssh: ") and "Permission denied" in error


@pytest.mark.parametrize("which", ["runs", "checkpoints"])
def test_a_directory_that_is_not_shared_is_refused(
    hosts: TwoHosts, refused: Callable[..., str], tmp_path: Path, which: str
) -> None:
    directory = tmp_path / which
    directory.mkdir()
    with hosts.b.without(directory):
        error = refused()
    assert error.startswith(f"error: {directory / 'test'} is not the same directory on {hosts.a.address} and")
    assert list(directory.iterdir()) == []


def test_a_run_whose_directories_a_host_cannot_use_is_not_resumed(
    hosts: TwoHosts, configure: Configure, tmp_path: Path
) -> None:
    config = configure(4)
    run = Started(hosts, config)
    output = run.end()
    assert run.process.returncode == exit_codes.DONE, output
    run_dir, checkpoints = run.settings.run_dir, run.settings.checkpoint_dir
    files = sorted(run_dir.iterdir())

    def refused() -> str:
        again = Started(hosts, config, "schedule.steps=8", verb="resume")
        output = again.end()
        assert again.process.returncode == exit_codes.MISTAKE, output
        assert sorted(run_dir.iterdir()) == files
        return output.splitlines()[-1]

    with hosts.b.without(run_dir.parent):
        error = refused()
    assert error.startswith(f"error: host {hosts.b.address}: {run_dir} is not the same directory on that host and this")
    hosts.b.run("mount", "--bind", str(checkpoints), str(checkpoints))
    try:
        hosts.b.run("mount", "-o", "remount,ro,bind", str(checkpoints))
        error = refused()
    finally:
        hosts.b.run("umount", str(checkpoints))
    where = f"error: host {hosts.b.address}: cannot write to {checkpoints}: Read-only file system"
    assert error == f"{where}; check its permissions and its disk"


def test_other_code_on_a_host_is_refused(hosts: TwoHosts, refused: Callable[..., str], tmp_path: Path) -> None:
    module, other = PROJECT / "ds_gpt2" / "common" / "formatting.py", tmp_path / "other.py"
    other.write_text(module.read_text() + "\n")
    hosts.b.run("mount", "--bind", str(other), str(module))
    try:
        error = refused()
    finally:
        hosts.b.run("umount", str(module))
    assert error.startswith("error: the code of ds_gpt2: ") and error.endswith(": make them equal")


def test_other_data_on_a_host_is_refused(
    hosts: TwoHosts, refused: Callable[..., str], dataset_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    hosts.b.run("mount", "--bind", str(tmp_path / "empty"), str(dataset_dir))
    try:
        error = refused()
    finally:
        hosts.b.run("umount", str(dataset_dir))
    assert error.startswith(f"error: host {hosts.b.address}: no data: ")


def test_a_damaged_copy_of_the_data_on_a_host_is_refused(
    hosts: TwoHosts, configure: Configure, dataset_dir: Path, tmp_path: Path
) -> None:
    """The copy has the same index, and the shards have the right size."""
    copy = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    shard = copy / open_dataset(copy).split("train")[0].file
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    config = configure(4)
    hosts.b.run("mount", "--bind", str(copy), str(dataset_dir))
    try:
        good = Started(hosts, config)
        output = good.end()
        assert good.process.returncode == exit_codes.DONE, output
        shard.write_bytes(content)
        damaged = Started(hosts, config, "schedule.steps=8", verb="resume")
        output = damaged.end()
    finally:
        hosts.b.run("umount", str(dataset_dir))
    assert damaged.process.returncode == exit_codes.MISTAKE, output
    assert f"{shard.name} was changed (checksum mismatch)" in output
    records = sorted(path.name for path in good.settings.run_dir.glob("data_checked*"))
    assert records == ["data_checked.json", "data_checked_host-b.json"]


def test_an_interface_that_does_not_exist_is_named(hosts: TwoHosts, refused: Callable[..., str]) -> None:
    error = refused("cluster.interface=ib9")
    assert error == f"error: cluster.interface=ib9: host {hosts.a.address} has no such interface; it has eth0, lo"
