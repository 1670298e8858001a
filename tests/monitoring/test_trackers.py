"""W&B, Comet and CSV get every step, however the run ends. The real packages are used in offline mode."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from launched import Launched, end_session, launch, start
from wandb.proto.wandb_internal_pb2 import Record

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.monitoring import tracker_checks, tracker_process, trackers
from ds_gpt2.run_dir.heartbeat import read_beat
from ds_gpt2.run_dir.metrics import read_metrics
from ds_gpt2.run_dir.stop_request import supervisor_environment
from ds_gpt2.supervision.launcher import TRAIN, RankLayout, start_command

STEPS = 30
DEEPSPEED = json.loads((PROJECT_DIR / "ds_configs" / "zero2_bf16.json").read_text())


def offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configure the trackers to write below ``folder``; return a DeepSpeed file that enables all of them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder / "wandb_dir"))
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(folder / "comet"))
    (folder / "wandb_dir").mkdir(exist_ok=True)
    blocks = {
        "wandb": {"enabled": True, "project": "tests"},
        "comet": {"enabled": True, "online": False},
        "csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "mine"},
    }
    path = folder / "ds.json"
    path.write_text(json.dumps({**DEEPSPEED, **blocks}))
    return path


def wandb_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each offline W&B run by its directory, in the order of their starts."""
    found = {}
    for file in sorted(folder.glob("wandb_dir/wandb/offline-run-*/*.wandb")):
        rows = []
        for data in wandb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        found[file.parent.name] = rows
    return found


def wandb_exit_codes(folder: Path) -> dict[str, int]:
    """Return the exit code of each offline W&B run, in the order of their starts."""
    return {
        file.parent.name: record.exit.exit_code
        for file in sorted(folder.glob("wandb_dir/wandb/offline-run-*/*.wandb"))
        for record in map(Record.FromString, wandb_records(file.read_bytes()))
        if record.WhichOneof("record_type") == "exit"
    }


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file, which has LevelDB's log format after a header of seven bytes."""
    assert data[:4] == b":W&B"
    block, position, parts = 32_768, 7, b""
    while position + 7 <= len(data):
        if (left := block - position % block) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if not kind:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            yield parts
            parts = b""


def comet_values(folder: Path, metric: str) -> list[list[tuple[int, float]]]:
    """Return (step, value) of a metric for each offline Comet archive, the oldest first."""
    found = []
    for file in sorted(folder.glob("comet/*.zip"), key=lambda file: file.stat().st_mtime):
        with zipfile.ZipFile(file) as archive:
            messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
        found.append([(one["step"], one["metricValue"]) for one in metrics if one["metricName"] == metric])
    return found


def csv_rows(folder: Path) -> list[list[str]]:
    with (folder / "csv" / "mine" / "train_loss.csv").open(newline="") as file:
        return list(csv.reader(file))


def losses(folder: Path) -> dict[int, float]:
    return {one["step"]: one["train/loss"] for one in read_metrics(folder / "runs" / "test" / "metrics.jsonl")}


@pytest.mark.ranks
def test_every_step_reaches_every_tracker_across_a_resume(
    tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed = offline(tmp_path, monkeypatch)
    config = write_config(
        tmp_path,
        deepspeed=str(deepspeed),
        batch={"tokens_per_step": 4 * 16, "micro_batch": 2, "sequence_length": 16},
        schedule={"steps": STEPS, "warmup_steps": 3},
        checkpoint={"dir": str(tmp_path / "checkpoints"), "every": 20},
        samples={"every": 0},
        validation={"every": 0},
    )
    stopped = stop_after(8, tmp_path, config)
    assert stopped.code == 1, stopped.output  # DeepSpeed's launcher replaces any other exit code than 0 by 1
    assert stopped.left_over == []
    at = max(losses(tmp_path))
    assert 8 <= at < STEPS
    (first,) = wandb_rows(tmp_path).values()
    assert [(row["_step"], row["step"], row["train/loss"]) for row in first] == triples(losses(tmp_path))
    assert comet_values(tmp_path, "train/loss") == [list(losses(tmp_path).items())]
    assert csv_rows(tmp_path) == [["step", "loss"], *pairs(losses(tmp_path))]

    result = launch(1, "--config", str(config), "--resume")
    assert result.code == 0, result.output
    assert result.left_over == []
    assert list(losses(tmp_path)) == list(range(1, STEPS + 1))
    runs = wandb_rows(tmp_path)
    assert len({name.rsplit("-", 1)[1] for name in runs}) == 1, "a resume started another W&B run"
    assert [row for rows in runs.values() for row in rows if row["step"] != row["_step"]] == []
    assert [(row["step"], row["train/loss"]) for rows in runs.values() for row in rows] == list(
        losses(tmp_path).items()
    )
    assert list(chain.from_iterable(comet_values(tmp_path, "train/loss"))) == list(losses(tmp_path).items())
    assert csv_rows(tmp_path) == [["step", "loss"], *pairs(losses(tmp_path))], "a header in the middle, or rows lost"
    keys = {zip_key(file) for file in (tmp_path / "comet").glob("*.zip")}
    assert len(keys) == 1, "a resume started another Comet experiment"


# Open the trackers of a folder like rank 0, write steps to them, and end as ``ending`` says.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
from ds_gpt2.monitoring import tracker_checks, trackers
folder, first, last, start, ending = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
trackers.tracker_process.__file__ = sys.argv[6]
content = json.loads((folder / "ds.json").read_text())
opened = trackers.open_trackers(content, folder, "mine", start, 2)
for step in range(first, last + 1):
    for tracker in opened.values():
        tracker.write_events([("train/loss", 1 / step, step), ("x", float(step), step)])
if ending == "killed":
    time.sleep(1)  # until everything is in the pipe
    os.kill(os.getpid(), signal.SIGKILL)
trackers.finish(opened.values(), failed=ending == "failed")
os._exit(0)
"""


def rank(
    folder: Path,
    first: int,
    last: int,
    start: int = 0,
    ending: str = "finished",
    tracker_program: str | Path = tracker_process.__file__,
) -> str:
    """Send the steps from ``first`` to ``last``; return the output."""
    words = [str(word) for word in (folder, first, last, start, ending, tracker_program)]
    result = subprocess.run(
        [sys.executable, "-c", RANK, *words],
        cwd=PROJECT_DIR,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # the output ends when the tracker processes end
    assert result.returncode == (-signal.SIGKILL if ending == "killed" else 0), result.stdout
    return result.stdout


@pytest.mark.ranks
def test_a_kill_loses_no_row_and_repeated_steps_are_retained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    rank(tmp_path, 1, 30, ending="killed")
    steps = list(range(1, 31))
    assert [(row["_step"], row["step"], row["x"]) for row in one(wandb_rows(tmp_path))] == [(n, n, n) for n in steps]
    assert comet_values(tmp_path, "x") == [[(n, n) for n in steps]]
    rank(tmp_path, 21, 40, start=20, ending="failed")
    first, second = wandb_rows(tmp_path)
    assert first.rsplit("-", 1)[1] == second.rsplit("-", 1)[1] == wandb_id(tmp_path)
    assert [row["step"] for row in wandb_rows(tmp_path)[second]] == list(range(21, 41))
    assert comet_values(tmp_path, "x")[1] == [(n, n) for n in range(21, 41)]
    rank(tmp_path, 1, 2)
    assert wandb_id(tmp_path) not in first, "a new run continued the old W&B run"
    assert list(wandb_exit_codes(tmp_path).values()) == [1, 1, 0]


@pytest.mark.ranks
def test_a_copied_run_is_another_run_at_the_tracker_and_a_moved_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tmp_path / "original"
    original.mkdir()
    for name in ("config.yaml", "journal.jsonl"):
        (original / name).touch()
    offline(original, monkeypatch)
    (original / "ds.json").write_text(json.dumps({"wandb": {"enabled": True}}))
    rank(original, 1, 2)
    before = wandb_id(original)
    copied = shutil.copytree(original, tmp_path / "copied", symlinks=True)
    assert f"this run is a copy of the run in {original}" in rank(copied, 3, 4, start=2)
    assert wandb_id(copied) != before == wandb_id(original)
    moved = original.rename(tmp_path / "moved")
    rank(moved, 3, 4, start=2)
    assert wandb_id(moved) == before
    copied_again = shutil.copytree(moved, tmp_path / "again", symlinks=True)
    rank(copied_again, 5, 6, start=4)
    assert wandb_id(copied_again) != before


@pytest.mark.ranks
def test_wandb_accepts_repeated_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    process = subprocess.Popen(
        [sys.executable, str(PROJECT_DIR / "ds_gpt2" / "monitoring" / "tracker_process.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    request = {"tracker": "wandb", "id": "a" * 8, "name": "mine", "arguments": {"project": "p"}, "finish_seconds": 30}
    request["directory"] = str(tmp_path)
    lines = [request, *({"rows": {str(step): {"x": step}}} for step in (1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8))]
    process.communicate("".join(json.dumps(line) + "\n" for line in lines).encode(), timeout=60)
    rows = [(row["_step"], row["step"]) for row in one(wandb_rows(tmp_path))]
    assert rows == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 2), (6, 3), (7, 4), (8, 5), (9, 6), (10, 7), (11, 8)]


def one(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    (rows,) = runs.values()
    return rows


def wandb_id(folder: Path) -> str:
    return str(json.loads((folder / trackers.IDS).read_text())["wandb"])


@pytest.mark.ranks
def test_comet_values_are_thinned_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = offline(tmp_path, monkeypatch)
    comet = {"enabled": True, "online": False, "samples_log_interval": 20}
    path.write_text(json.dumps({"comet": comet}))
    rank(tmp_path, 1, 30)  # of 2 samples each
    assert [step for step, _ in comet_values(tmp_path, "x")[0]] == [1, 11, 21]
    assert not (tmp_path / "wandb_dir" / "wandb").exists()


@pytest.mark.ranks
def test_an_unavailable_service_is_recorded_offline_and_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(tmp_path, monkeypatch)
    unused_address = "http://127.0.0.1:9"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", unused_address)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("COMET_API_KEY", SECRET)
    monkeypatch.setenv("COMET_URL_OVERRIDE", unused_address)
    monkeypatch.setenv("COMET_GET_OR_ADD_EXPERIMENT_RETRY_CONNECT", "1")  # four attempts take 20 s
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_DIR))
    impatient = tmp_path / "impatient.py"
    impatient.write_text(IMPATIENT)
    (tmp_path / "ds.json").write_text(json.dumps({"wandb": {"enabled": True}, "comet": {"enabled": True}}))
    output = rank(tmp_path, 1, 30, tracker_program=impatient)
    assert "W&B cannot be reached (" in output and "this start is recorded offline" in output
    assert "Comet cannot be reached (" in output
    assert SECRET not in output
    assert [row["step"] for row in one(wandb_rows(tmp_path))] == list(range(1, 31))
    assert len(comet_values(tmp_path, "x")[0]) == 30


SECRET = "s3cr3t" * 7
# The process of a tracker with a shorter time limit for W&B's server.
IMPATIENT = """
from ds_gpt2.monitoring import tracker_process
tracker_process._INIT_SECONDS = 3.0
tracker_process._leave()
tracker_process.main()
"""


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"wandb": {"enabled": True}}, 'enables "wandb", but W&B has no valid API key: run `wandb login`, set WANDB'),
        ({"comet": {"enabled": True}}, 'enables "comet", but Comet has no API key: set COMET_API_KEY'),
        ({"wandb": {"enabled": "perhaps"}}, r"wandb\.enabled: Input should be a valid boolean"),
        ({"comet": []}, "comet: Input should be a valid dictionary"),
    ],
)
def test_an_invalid_setup_is_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: dict[str, Any], message: str
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=message):
        tracker_checks.check(blocks)


@pytest.mark.parametrize(
    ("block", "variable", "value", "message"),
    [
        ("wandb", "WANDB_MODE", "oflline", "the environment variable WANDB_MODE=oflline is not valid (Input should be"),
        ("wandb", "WANDB_RUN_ID", "a/b:c", "the environment variable WANDB_RUN_ID=a/b:c is not valid (Run ID cannot"),
        ("wandb", "WANDB_PROJECT", "a/b", "the environment variable WANDB_PROJECT=a/b is not valid (Invalid project"),
        ("wandb", "WANDB_BASE_URL", "here", "the environment variable WANDB_BASE_URL=here is not valid (Input should"),
        ("comet", "COMET_START_ONLINE", "perhaps", "COMET_START_ONLINE, or online in ~/.comet.config, is not valid"),
    ],
)
def test_an_invalid_environment_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as error:
        tracker_checks.check({block: {"enabled": True}})
    assert message in str(error.value) and "API key" not in str(error.value)


@pytest.mark.ranks
def test_local_tracker_files_are_in_the_runs_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    for name in ("WANDB_DIR", "COMET_OFFLINE_DIRECTORY"):
        monkeypatch.delenv(name)
    before = set(PROJECT_DIR.iterdir())
    rank(tmp_path, 1, 3)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert len(list((tmp_path / "comet").glob("*.zip"))) == 1
    assert set(PROJECT_DIR.iterdir()) == before, "a file was written to the project directory"


@pytest.mark.parametrize(("block", "package"), [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_directory_with_the_packages_name_is_not_the_package(tmp_path: Path, block: str, package: str) -> None:
    (tmp_path / package).mkdir()
    path, arguments = [str(tmp_path)], f"{block!r}, {package!r}"
    code = f"import sys, ds_gpt2.monitoring.tracker_checks as t; sys.path = {path!r}; t._check_package({arguments})"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, capture_output=True, text=True)
    assert f'enables "{block}", but {package} is not installed: {sys.executable} -m pip install' in result.stderr


@pytest.mark.ranks
def test_a_valid_setup_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    tracker_checks.check(json.loads((tmp_path / "ds.json").read_text()))
    tracker_checks.check({"wandb": {"enabled": False}, "comet": {}})


def stop_after(step: int, folder: Path, config: Path) -> Launched:
    """Train on one rank, and send SIGTERM after the end of ``step``."""
    process = start(start_command(RankLayout("cpu", 1), TRAIN, ["--config", str(config)]))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        found = read_beat(folder / "runs" / "test", 0)
        if found is not None and found.step > step:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    return Launched(process.returncode, output, end_session(process.pid))


def zip_key(file: Path) -> str:
    with zipfile.ZipFile(file) as archive:
        return str(json.loads(archive.read("experiment.json"))["offline_id"])


def triples(values: dict[int, float]) -> list[tuple[int, int, float]]:
    return [(step, step, value) for step, value in values.items()]


def pairs(values: dict[int, float]) -> list[list[str]]:
    return [[str(step), str(value)] for step, value in values.items()]


def test_json_that_a_library_prints_is_not_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text("""print('5\\n"text"\\n[1]\\n{"opened": "here"}', flush=True)\n""")
    monkeypatch.setattr(tracker_process, "__file__", str(program))
    tracker = trackers.Tracker("printing", {})
    tracker.wait_opened()
    assert tracker.location == "here"


def test_a_tracker_is_not_a_process_of_the_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finishes by itself; what a dead supervisor has left is found by this variable and ended."""
    for name, value in supervisor_environment().items():
        monkeypatch.setenv(name, value)
    program = tmp_path / "program.py"
    program.write_text("""import os, json; print(json.dumps({"opened": os.environ.get("DS_GPT2_SUPERVISOR", "")}))""")
    monkeypatch.setattr(tracker_process, "__file__", str(program))
    tracker = trackers.Tracker("printing", {})
    tracker.wait_opened()
    assert tracker.location == ""
