"""The command ``drill``: a short drill with real runs, and the parts of which a drill consists."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launched import PROJECT, end_session, start
from small_run import MODEL

from ds_gpt2.commands import drill
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.deepspeed_config import load_deepspeed_file
from ds_gpt2.config.settings import load_settings
from ds_gpt2.data.loader import TrainingData
from ds_gpt2.data.sources import open_sources
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.supervisor_record import AgentRecord, SupervisorRecord
from ds_gpt2.supervision.cluster import link
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.link import AgentLink, StartMethod
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.tools.drill import drill as drill_run
from ds_gpt2.tools.drill import run_hosts, small_disk
from ds_gpt2.tools.drill.compare import curve_differences, differences, expected_ledger
from ds_gpt2.tools.drill.plan import CHANGING, EXACT, DrillPlan
from ds_gpt2.tools.drill.record import WIDTH, Record, SceneResult, header, lines_of
from ds_gpt2.tools.drill.run_hosts import RunHosts, make_unreachable
from ds_gpt2.tools.drill.run_process import FailedError, RunProcess, end_all, marked
from ds_gpt2.tools.drill.scenes.registry import SCENES
from ds_gpt2.tools.drill.scenes.scene import NotDoneError, Recovery, Scene, SceneContext
from ds_gpt2.tools.drill.shrink import tree_for

PLAYED = "kill_rank,flip_byte,nan"


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    drill.add_arguments(parser)
    return parser.parse_args(list(words))


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> tuple[Path, int, str]:
    """Run a drill of some scenes from the command line; return its folder, exit code and output."""
    folder = tmp_path_factory.mktemp("drill")
    process = start([*_command(write_config(folder, model=MODEL)), "--only", PLAYED, "--seed", "3"])
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # the drill kills the processes that it has started
        output, _ = process.communicate(timeout=60)
    return folder, process.returncode, output


def _command(config: Path) -> list[str]:
    return [sys.executable, "-m", "ds_gpt2", "drill", str(config), "--num_gpus=2"]


@pytest.mark.ranks
def test_drill_passes_and_is_recorded(drilled: tuple[Path, int, str]) -> None:
    folder, code, output = drilled
    assert code == exit_codes.DONE, output
    (record,) = (folder / "runs" / "test" / "drill").glob("*/record.json")
    content = json.loads(record.read_text())
    names = ["undisturbed", *PLAYED.split(",")[:2], "bit_for_bit", "nan", "no_process_left"]
    assert [(row["name"], row["verdict"]) for row in content["rows"]] == [(name, "pass") for name in names]
    assert content["passed"] and content["seed"] == 3
    lost = {row["name"]: row for row in content["rows"]}
    assert 0 <= lost["kill_rank"]["lost_steps"] <= 10 and 1 <= lost["flip_byte"]["lost_steps"] <= 5
    assert lost["kill_rank"]["lost_seconds"] > 1
    *lines, where = output.splitlines()
    assert where == f"record: {record.with_name('drill.md')}"
    assert max(map(len, lines)) <= WIDTH
    assert [line.split()[1] for line in lines if line.startswith("pass")] == names
    assert "| pass | kill_rank | SIGKILL to rank" in record.with_name("drill.md").read_text()


def test_drill_leaves_only_its_record(drilled: tuple[Path, int, str]) -> None:
    folder, _, _ = drilled
    assert list((folder / "checkpoints").iterdir()) == []
    assert [path.name for path in (folder / "runs" / "test").iterdir()] == ["drill"]
    (drill_dir,) = (folder / "runs" / "test" / "drill").iterdir()
    assert marked(str(folder / "checkpoints" / f".drill-{drill_dir.name}")) == []


@pytest.mark.ranks
def test_ctrl_c_ends_a_drill_and_its_processes(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    process = start(_command(write_config(tmp_path)))
    deadline = time.monotonic() + 200
    while not any(read_beat(path, 1) for path in tmp_path.glob("runs/test/drill/*/undisturbed")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (drill_dir,) = (tmp_path / "runs" / "test" / "drill").iterdir()
    mark = str(tmp_path / "checkpoints" / f".drill-{drill_dir.name}")
    assert len(marked(mark)) >= 3
    try:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != exit_codes.DONE, output
        assert marked(mark) == []
    finally:
        end_session(process.pid)
        end_all(mark)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_failed_scene_fails_the_drill(tmp_path: Path) -> None:
    def fails(context: SceneContext) -> Recovery:
        raise FailedError("resumed from step 3, although step 20 was done")

    def not_possible(context: SceneContext) -> Recovery:
        raise NotDoneError("needs a second GPU")

    def raises(context: SceneContext) -> Recovery:
        raise KeyError("step")

    context = SceneContext(None, None, random.Random(1), tmp_path)  # type: ignore[arg-type]  # the runs are not used
    rows = [drill_run._play(Scene("one", play), context) for play in (fails, not_possible, raises)]
    assert [row.verdict for row in rows] == ["FAIL", "not done", "FAIL"]
    assert rows[0].text == "resumed from step 3, although step 20 was done" and rows[2].text == "KeyError: 'step'"
    passed = SceneResult("two", "pass", "recovered", 0, 1.0)
    assert _record([passed]).passed
    assert not any(_record([passed, row]).passed for row in rows)
    assert not _record([]).passed


def _record(rows: list[SceneResult]) -> Record:
    return Record("test", 2, "cpu", False, 1, "2026-01-01T00:00:00+0000", [], {}, {}, rows)


def test_printed_lines_have_a_maximum_width() -> None:
    row = SceneResult("kill_supervisor", "not done", "a reason " * 30 + "x" * 200, 123, 4567.8)
    lines = [*header().splitlines(), *lines_of(row)]
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].endswith("     123  4567.8")


def test_the_plan_lists_all_scenes() -> None:
    assert tuple(SCENES) == (*EXACT, *CHANGING)
    assert all(scene.name == name for name, scene in SCENES.items())


def test_an_unknown_scene_is_a_user_error(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    options = parse(str(write_config(tmp_path)), "--only", "nan,meteor", "--num_gpus", "2")
    with pytest.raises(UserError, match="--only meteor: no such scene; known are read_error, exception"):
        drill.run(options)


def test_a_scaled_down_run_retains_the_users_settings(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    config = write_config(
        tmp_path,
        model={"preset": "124M", "dropout": 0.1},
        batch={"tokens_per_step": 524_288, "micro_batch": 16, "sequence_length": 1024},
        schedule={"epochs": 5, "warmup_steps": 715},
        alerts={"command": "wake-me-up"},
        checkpoint={"dir": str(tmp_path / "checkpoints"), "backup": {"to": str(tmp_path)}},
    )
    settings = load_settings(config)
    tree = tree_for(settings, ranks=4, steps=90, whole=False)
    (tmp_path / "shrunk.yaml").write_text(yaml.safe_dump(tree))
    shrunk = load_settings(tmp_path / "shrunk.yaml")
    assert shrunk.model.shape == (4, 12, 96) and shrunk.model.dropout == 0.1
    assert plan_batch(shrunk.batch.tokens_per_step, 2, 64, 4).accumulation == 2
    assert (shrunk.schedule.steps, shrunk.schedule.warmup_steps) == (90, 9)
    assert shrunk.optimizer == settings.optimizer and shrunk.deepspeed == settings.deepspeed
    assert shrunk.alerts.kinds == () and shrunk.alerts.command is None and shrunk.checkpoint.backup.to is None
    whole = tree_for(settings, ranks=4, steps=90, whole=True)
    assert whole["model"] == settings.model.model_dump() and whole["batch"] == settings.batch.model_dump()


def test_a_drill_reaches_all_stages_of_a_mixture(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    sources = {name: {"dir": str(tmp_path / name), "weight": 0.5} for name in "abc"}
    stages = [{"from_step": 60_000, "mixture": [sources["b"]]}, {"from_step": 80_000, "mixture": [sources["c"]]}]
    config = write_config(tmp_path, data={"dir": None, "mixture": [sources["a"], sources["b"]], "stages": stages})
    tree = tree_for(load_settings(config), ranks=2, steps=60, whole=False)
    assert [stage["from_step"] for stage in tree["data"]["stages"]] == [21, 41]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"a": [1, torch.ones(2)]}, {"a": [1, torch.ones(2)]}, []),
        ({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([float("nan")])}, []),
        ({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 1e-38])}, ["x.a differs"]),
        ({"a": torch.zeros(2)}, {"a": -torch.zeros(2)}, ["x.a differs"]),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.bfloat16)}, ["x.a differs"]),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(1, 2)}, ["x.a differs"]),
        ({"a": 1.0}, {"a": 1.0000000000000002}, ["x.a is 1.0000000000000002, not 1.0"]),
        ({"a": [1]}, {"a": [1, 2]}, ["x.a has 2 entries, not 1"]),
        ({"a": 1}, {"b": 1}, ["x has other keys"]),
        (int, float, ["x is <class 'float'>, not <class 'int'>"]),
        ({"a": RankLayout("cpu", 2)}, {"a": RankLayout("cpu", 3)}, ["x.a.ranks is 3, not 2"]),
    ],
)
def test_differences_of_nested_states(one: object, other: object, expected: list[str]) -> None:
    assert differences(one, other, "x") == expected


def test_curves_that_differ_in_one_value(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": step, "time": step, "train/loss": 1 / step, "perf/step_ms": 1.0} for step in (1, 2, 3)
    ]
    other = copy.deepcopy(records)
    for record in other:
        record |= {"time": 7.5, "perf/step_ms": 2.0}
    one_dir, other_dir = _metrics(tmp_path / "one", records), _metrics(tmp_path / "other", other)
    assert curve_differences(one_dir, other_dir) == []
    other[2]["train/loss"] += 1e-16
    assert curve_differences(one_dir, _metrics(other_dir, other)) == [
        f"metrics.jsonl[2].train/loss is {1 / 3 + 1e-16!r}, not {1 / 3!r}"
    ]
    assert curve_differences(one_dir, _metrics(other_dir, other[:2])) == ["metrics.jsonl has 2 entries, not 3"]


def _metrics(run_dir: Path, records: list[dict[str, Any]]) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir


def test_expected_ledger_equals_that_of_training(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    settings = load_settings(write_config(tmp_path))
    plan = plan_batch(settings.batch.tokens_per_step, 2, 64, 2)
    windows = open_sources(settings.data).windows("train", 64)
    data = TrainingData(windows, plan, 0, settings.run.seed, torch.device("cpu"))
    state = TrainState()
    state.exclude([2])
    for _ in range(3):
        state.advance(plan.tokens_per_step, True, data.windows_of(state.next_batch).tobytes())
    assert expected_ledger(settings, 4, [1, 3, 4]) == state.ledger
    assert expected_ledger(settings, 4, [1, 2, 3]) != state.ledger


@pytest.mark.ranks
def test_waiting_fails_if_the_run_ends_first(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    settings = load_settings(write_config(tmp_path))
    run = RunProcess(tmp_path / "no.yaml", settings, RankLayout("cpu", 2), tmp_path / "output", "a mark", timeout=60)
    run.start()
    with pytest.raises(FailedError, match="a checkpoint: the run ended before, exit code 2"):
        run.wait_for("a checkpoint", lambda: run.events(0, "save"))


@pytest.fixture
def namespace_command() -> tuple[str, ...]:
    """Return the prefix that runs a command in its own mount namespace."""
    found = small_disk.namespace_command()
    if found is None:  # where it is not allowed, the drill limits the size of files instead, and reports that
        pytest.skip("needs root or user namespaces")
    return found


def test_fill_leaves_no_space_for_a_checkpoint(tmp_path: Path, namespace_command: tuple[str, ...]) -> None:
    code = (
        f"import subprocess, sys; sys.path.insert(0, {str(PROJECT)!r})\n"
        "from pathlib import Path; from ds_gpt2.tools.drill import small_disk\n"
        "folder = Path(sys.argv[1])\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'none', str(folder)], check=True)\n"
        "filler = small_disk.fill(folder); small_disk.fill(folder)\n"
        "try: (folder / 'more').write_bytes(bytes(20000)); print('not full')\n"
        "except OSError as error: print(error.strerror)\n"
        "filler.unlink(); (folder / 'more').write_bytes(bytes(20000)); print((folder / 'more').stat().st_size)\n"
    )
    command = [*namespace_command, sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["No space left on device", "20000"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_copies_the_files_of_the_directory_in_and_out(
    tmp_path: Path, namespace_command: tuple[str, ...]
) -> None:
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank_00000").write_text("before")
    code = (
        f"import sys; sys.path.insert(0, {str(PROJECT)!r})\n"
        "from pathlib import Path; from ds_gpt2.tools.drill import small_disk\n"
        "folder = Path(sys.argv[1]); beat = folder / 'heartbeat' / 'rank_00000'\n"
        "with small_disk.mounted_on_run_dir(folder, 2 << 20):\n"
        "    small_disk.fill_up(folder); print(beat.read_text()); beat.write_text('after')\n"
        "    try: (folder / 'more').write_bytes(b'x'); print('not full')\n"
        "    except OSError as error: print(error.strerror)\n"
    )
    command = [*namespace_command, sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["before", "No space left on device"], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.stat().st_size) == ["heartbeat"]
    assert (tmp_path / "heartbeat" / "rank_00000").read_text() == "after"


def test_drill_disables_trackers_and_csv_files(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    content = json.loads((PROJECT / "ds_configs" / "zero2_bf16.json").read_text())
    wandb = {"enabled": True, "project": "p", "api_key": "s3cr3t"}
    outside = {"wandb": wandb, "csv_monitor": {"enabled": True, "output_path": "/data"}}
    (tmp_path / "ds.json").write_text(json.dumps({**content, **outside}))
    settings = load_settings(write_config(tmp_path, deepspeed=str(tmp_path / "ds.json")))
    (tmp_path / "drill").mkdir()
    plan = DrillPlan(settings, RankLayout("cpu", 1))
    run = drill_run._run_process(plan, "undisturbed", 20, (tmp_path / "drill", tmp_path))
    drilled = load_deepspeed_file(run.settings.deepspeed)
    assert drilled["wandb"] == {"enabled": False}
    assert drilled["csv_monitor"] == {"enabled": False}
    assert drilled["optimizer"] == content["optimizer"]


def test_scenes_of_hosts_and_of_one_machine(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    config, hostfile = str(write_config(tmp_path)), tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\nnode2 slots=3\n")
    plan = drill._plan(parse(config, "--hostfile", str(hostfile)))
    assert plan.layout.ranks == 5 and [host.name for host in plan.hosts] == ["localhost", "node2"]
    assert set(EXACT + CHANGING) - set(plan.names) == {"disk_full", "run_dir_full", "other_ranks"}
    with pytest.raises(UserError, match="--only disk_full: a disk that is filled is seen on one machine only"):
        drill._plan(parse(config, "--hostfile", str(hostfile), "--only", "disk_full"))
    alone = drill._plan(parse(config, "--num_gpus", "2"))
    assert set(EXACT + CHANGING) - set(alone.names) == {"node"}
    with pytest.raises(UserError, match="--only node: needs --hostfile"):
        drill._plan(parse(config, "--num_gpus", "2", "--only", "node"))


def test_the_ranks_of_this_machine_are_those_of_its_place_in_the_hostfile(tmp_path: Path) -> None:
    hosts = RunHosts([Host("192.0.2.201", 2), Host("localhost", 3), Host("192.0.2.202", 1)], "ssh", tmp_path)
    assert hosts.local_ranks == [2, 3, 4]
    assert [host.name for host in hosts.others] == ["192.0.2.201", "192.0.2.202"]


def test_the_supervisor_cannot_connect_to_an_unreachable_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "start_command", lambda host, way: [way, host])
    hosts = RunHosts([], "ssh", tmp_path)
    make_unreachable(tmp_path)
    assert link.start_command("node1", "ssh") == ["ssh", "node1"]
    with contextlib.suppress(FailedError), hosts.unreachable(Host("node1", 1)):
        assert link.start_command("node1", "ssh") == ["false"]
        assert link.start_command("node2", "srun") == ["srun", "node2"]
        raise FailedError("the scene has failed")
    assert link.start_command("node1", "ssh") == ["ssh", "node1"]


def test_a_host_that_cannot_be_connected_leaves_no_connection_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[AgentLink] = []

    def connect(host: str, way: StartMethod) -> AgentLink:
        if started:
            raise UserError("ssh cannot be started: Resource temporarily unavailable")
        started.append(AgentLink(host, way))
        return started[0]

    monkeypatch.setattr(run_hosts, "AgentLink", connect)
    hosts = [Host("node1", 1), Host("node2", 1)]
    with pytest.raises(UserError, match="cannot be started"), RunHosts(hosts, "local", tmp_path).connected(hosts):
        pass
    assert started[0].wait(0)


@pytest.mark.ranks
def test_only_the_agent_and_the_ranks_of_the_run_are_killed_on_a_host(tmp_path: Path) -> None:
    """The host is this machine, the agents are those of two runs."""
    hosts = RunHosts([], "local", tmp_path)
    host = Host("node1", 1)
    with hosts.connected([host]) as drills, hosts.connected([host]) as runs, hosts.connected([host]) as others:
        agent = runs["node1"].agent
        assert agent is not None
        record = SupervisorRecord(1, 1.0, "host", "running", 1, agents=(AgentRecord("node1", *agent),))
        record.write(tmp_path)
        assert hosts.kill_on(drills["node1"], tmp_path)
        assert runs["node1"].wait(10) and others["node1"].is_open
        assert not hosts.kill_on(drills["node1"], tmp_path)
