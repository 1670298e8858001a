"""list, verify and prune, on checkpoints that were never trained."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launched import PROJECT

from ds_gpt2 import cli
from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint import manifest as manifest_module
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry, Manifest, encode
from ds_gpt2.checkpoint.naming import epoch_tag, rolling_tag, superseded_tag
from ds_gpt2.commands import checkpoints, runs, train
from ds_gpt2.config import run_location
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.run_dir import exit_report

FILES = {"mp_rank_00_model_states.pt": b"weights" * 100, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": b"x" * 300}
SIZE = sum(map(len, FILES.values()))
SHAPE = {"model.layers": 1, "model.heads": 2, "model.width": 8, "batch.sequence_length": 16}


def write_checkpoint(
    directory: Path, tag: str, step: int, files: dict[str, bytes] | None = None, **fields: Any
) -> Path:
    """A committed checkpoint of small files; ``fields`` replace those of its manifest."""
    path = directory / tag
    path.mkdir(parents=True)
    contents = FILES if files is None else files
    for name, content in contents.items():
        (path / name).write_bytes(content)
    hour_ago = datetime.now().astimezone() - timedelta(hours=3, minutes=12)
    entries = {n: FileEntry(bytes=len(c), sha256=hashlib.sha256(c).hexdigest()) for n, c in contents.items()}
    known: dict[str, Any] = {
        "created": hour_ago.isoformat(timespec="seconds"),
        "epoch": step / 400,
        "state": {"step": step, "val_loss": 4.25, "val_step": step},
        "world_size": 1,
        "identity": SHAPE,
        "settings": {"checkpoint": {"keep_last": 1, "keep_epochs": 1}},
        "versions": {},
        "files": entries,
    }
    (path / "manifest.json").write_bytes(encode(Manifest(**{**known, **fields})))
    return path


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project directory that the commands take for theirs."""
    for module in (checkpoints, run_location, runs, train):
        monkeypatch.setattr(module, "PROJECT_DIR", tmp_path / "project")
    (tmp_path / "project" / "runs").mkdir(parents=True)
    return tmp_path / "project"


@pytest.fixture
def run_with(project: Path) -> Callable[..., Path]:
    """Make a run called ``test`` with checkpoint settings; returns its directory of checkpoints."""

    def make(name: str = "test", **settings: object) -> Path:
        directory = project / "checkpoints" / name
        directory.mkdir(parents=True)
        (project / "runs" / name).mkdir()
        tree = {
            "run": {"name": name, "dir": str(project / "runs")},
            "model": {"preset": "7M"},
            "data": {"dir": "data"},
            "schedule": {"steps": 1000},
            "checkpoint": {"dir": str(project / "checkpoints"), **settings},
        }
        (project / "runs" / name / "config.yaml").write_text(yaml.safe_dump(tree))
        return directory

    return make


@pytest.fixture
def history(run_with: Callable[..., Path]) -> Path:
    """Three rolling checkpoints; the newest ends an epoch and the second is the best."""
    directory = run_with(keep_last=2, keep_epochs=1)
    for step in (100, 200, 300):
        write_checkpoint(directory, rolling_tag(step), step)
    commit.link(Disk(), directory / rolling_tag(300), directory, "epoch_00001")
    commit.link(Disk(), directory / rolling_tag(200), directory, "best_model")
    commit.point_to(Disk(), directory, rolling_tag(200))
    commit.point_to(Disk(), directory, rolling_tag(300))
    return directory


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def in_json(command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, Any]]:
    def call(*arguments: object) -> tuple[int, Any]:
        code, out, _ = command(*arguments, "--json")
        return code, json.loads(out)

    return call


Command = Callable[..., tuple[int, str, str]]
InJson = Callable[..., tuple[int, Any]]


def test_list_tells_all_about_each_checkpoint(history: Path, in_json: InJson) -> None:
    code, rows = in_json("list", "test")
    assert code == exit_report.DONE
    assert [row["tag"] for row in rows] == [
        rolling_tag(300),
        "epoch_00001",
        rolling_tag(200),
        "best_model",
        rolling_tag(100),
    ]
    newest, epoch, second, best, oldest = rows
    created = newest.pop("created")
    assert datetime.fromisoformat(created).tzinfo is not None
    assert newest.pop("age_seconds") == pytest.approx(3 * 3600 + 12 * 60, abs=60)
    assert newest == {
        "tag": rolling_tag(300),
        "kind": "full",
        "step": 300,
        "epoch": 0.75,
        "bytes": size_of(history / rolling_tag(300)),
        "freed_bytes": 0,
        "roles": ["epoch_00001"],
        "val_loss": 4.25,
        "pointers": ["latest"],
        "resumable": True,
        "problem": None,
    }
    assert (epoch["roles"], epoch["pointers"]) == ([rolling_tag(300)], [])
    assert (second["roles"], second["pointers"], best["roles"]) == (
        ["best_model"],
        ["latest_backup"],
        [rolling_tag(200)],
    )
    assert oldest["roles"] == [] and oldest["freed_bytes"] == oldest["bytes"] > SIZE


def test_the_table_has_a_line_for_each(history: Path, command: Command) -> None:
    code, out, _ = command("list", "test")
    assert code == exit_report.DONE
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == [str(history)]
    assert " ".join(lines[3]) == (
        "rolling_step_000300 300 0.75 3h 12m 0.0 MB 0.0 MB 4.2500 resumable; latest; same files as epoch_00001"
    )
    assert [line[0] for line in lines[4:]] == ["epoch_00001", rolling_tag(200), "best_model", rolling_tag(100)]


def test_list_says_what_is_wrong_or_missing_or_unfinished(history: Path, in_json: InJson, command: Command) -> None:
    write_checkpoint(history, "epoch_00002", 400, kind="weights", state={"step": 400})
    name = next(iter(FILES))
    with (history / rolling_tag(200) / name).open("ab") as file:
        file.write(b"!")
    (history / rolling_tag(100) / "manifest.json").write_text("{}")
    (history / "rolling_step_000500.tmp").mkdir()
    (history / "rolling_step_000500.tmp" / name).write_bytes(b"half")
    (history / "rolling_step_000500.tmp" / "manifest.json").touch()  # a moment before it is renamed
    (history / rolling_tag(50)).mkdir()
    (history / "latest.tmp").write_text("x")
    (history / "something else").mkdir()
    rows = {row["tag"]: row for row in in_json("list", "test")[1]}
    assert [*rows] == [
        "epoch_00002",
        rolling_tag(300),
        "epoch_00001",
        rolling_tag(200),
        "best_model",
        rolling_tag(100),
        rolling_tag(50),
        "rolling_step_000500.tmp",
    ]
    weights = rows["epoch_00002"]
    assert (weights["kind"], weights["resumable"], weights["problem"], weights["val_loss"]) == (
        "weights",
        False,
        None,
        None,
    )
    for tag in (rolling_tag(200), "best_model"):
        assert rows[tag]["problem"] == f"{name} has 701 bytes, 700 were written"
        assert not rows[tag]["resumable"]
    damaged = rows[rolling_tag(100)]
    assert (damaged["kind"], damaged["step"], damaged["epoch"]) == ("unknown", 100, None)
    assert damaged["problem"] == "manifest.json is damaged: it cannot be parsed"
    partial = rows["rolling_step_000500.tmp"]
    assert (partial["kind"], partial["bytes"], partial["freed_bytes"], partial["resumable"]) == (
        "unfinished",
        4,
        4,
        False,
    )
    assert partial["problem"] == "being written, or left by a crash"
    assert rows[rolling_tag(50)]["problem"] == "being deleted, or left by a crash"
    table = command("list", "test")[1]
    assert "weights only" in table and "BAD: manifest.json is damaged" in table and "  being written, or" in table


def test_json_stays_json_whatever_a_manifest_says(run_with: Callable[..., Path], command: Command) -> None:
    directory = run_with()
    for step, created in ((1, "yesterday"), (2, "0001-01-01T00:00:00+14:00"), (3, "2020-01-01T00:00:00")):
        write_checkpoint(directory, rolling_tag(step), step, created=created)
    write_checkpoint(directory, rolling_tag(4), 4, state={"step": 4, "val_step": 4, "val_loss": float("nan")})
    rows = json.loads(command("list", "test", "--json")[1], parse_constant=lambda word: pytest.fail(word))
    assert rows[0]["val_loss"] is None
    assert rows[3]["age_seconds"] is None and rows[1]["age_seconds"] > 1e8
    assert command("list", "test")[0] == exit_report.DONE


def test_the_table_stays_narrow_whatever_a_manifest_says(run_with: Callable[..., Path], command: Command) -> None:
    state = {"step": 4, "val_step": 4, "val_loss": 1.5e300}
    write_checkpoint(run_with(), rolling_tag(4), 4, state=state, epoch=2e200)
    table = command("list", "test")[1]
    assert "1.5e+300" in table and "2e+200" in table and max(map(len, table.splitlines()[1:])) < 150


def test_settings_that_are_no_file_are_named(run_with: Callable[..., Path], command: Command) -> None:
    run_with()
    config = run_with("other").parents[1] / "runs" / "other" / "config.yaml"
    config.unlink()
    os.mkfifo(config)
    code, _, err = command("list", "other")
    assert (code, err) == (
        exit_report.MISTAKE,
        f"error: {config} is not a regular file: restore it from a copy of the run\n",
    )


@pytest.mark.parametrize("where", ["test", "RUN", "CHECKPOINTS", None])
def test_a_run_is_found_by_name_by_directory_and_as_the_newest(
    history: Path, run_with: Callable[..., Path], in_json: InJson, where: str | None
) -> None:
    run_dir = history.parents[1] / "runs" / "test"
    run_with("older")
    os.utime(history.parents[1] / "runs" / "older" / "config.yaml", (1, 1))
    named = {"test": "test", "RUN": run_dir, "CHECKPOINTS": history}
    code, rows = in_json("list", *([named[where]] if where else []))
    assert (code, len(rows)) == (exit_report.DONE, 5)


def test_a_bare_directory_of_checkpoints_is_enough(history: Path, in_json: InJson, tmp_path: Path) -> None:
    backup = shutil.copytree(history, tmp_path / "backup")
    assert len(in_json("list", backup)[1]) == 5
    assert in_json("verify", backup, "--all")[0] == exit_report.DONE
    assert in_json("prune", backup)[1]["deleted"] == [rolling_tag(100)]  # as the manifests' settings say
    assert not (backup / rolling_tag(100)).exists() and (history / rolling_tag(100)).exists()


def test_checkpoints_whose_run_directory_is_gone_are_found_by_its_name(history: Path, in_json: InJson) -> None:
    shutil.rmtree(history.parents[1] / "runs" / "test")
    assert len(in_json("list", "test")[1]) == 5


def test_a_backup_that_is_not_there_is_not_taken_for_the_run_of_its_name(
    history: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "mounted").mkdir()
    for verb in ("list", "verify", "prune"):
        code, _, err = command(verb, tmp_path / "mounted" / "test")
        assert (code, err.count("\n")) == (exit_report.MISTAKE, 1)
        assert f"no run {tmp_path}/mounted/test: known in" in err
    assert (history / rolling_tag(100)).exists()


def test_mistakes_are_one_line(run_with: Callable[..., Path], command: Command) -> None:
    run_with()
    assert command("list", "nothing")[::2] == (
        exit_report.MISTAKE,
        f"error: no run nothing: known in {checkpoints.PROJECT_DIR}/runs are test\n",
    )
    assert command("list", "test") == (
        exit_report.MISTAKE,
        "",
        f"error: no checkpoints in {checkpoints.PROJECT_DIR}/checkpoints/test\n",
    )
    assert command("list", "test", "--json")[:2] == (exit_report.MISTAKE, "[]\n")
    code, _, err = command("verify", "test")
    assert code == exit_report.MISTAKE and err.startswith("error: no checkpoints in ") and err.count("\n") == 1


def test_a_directory_that_cannot_be_read_is_named(
    history: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    code, _, err = command("list", "test")
    assert code == exit_report.MISTAKE
    assert err.startswith("error: the checkpoints of test cannot be read: ") and "Permission denied" in err


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        (["test"], [rolling_tag(300)]),
        (["test", "latest"], [rolling_tag(300)]),
        (["test", "auto"], [rolling_tag(300)]),
        (["test", "latest_backup"], [rolling_tag(200)]),
        (["test", "best"], ["best_model"]),
        (["test", "100"], [rolling_tag(100)]),
        (["test", "epoch_00001"], ["epoch_00001"]),
        (["best_model"], ["best_model"]),
        (["test", "--all"], [rolling_tag(300), "epoch_00001", rolling_tag(200), "best_model", rolling_tag(100)]),
    ],
)
def test_verify_looks_at_what_it_is_told(history: Path, command: Command, words: list[str], tags: list[str]) -> None:
    assert command("verify", *words)[:2] == (exit_report.DONE, "".join(f"{tag}: ok\n" for tag in tags))


def test_verify_takes_the_path_of_a_checkpoint(history: Path, command: Command, tmp_path: Path) -> None:
    copy = shutil.copytree(history / rolling_tag(100), tmp_path / "kept for the paper")
    assert command("verify", copy)[:2] == (exit_report.DONE, "kept for the paper: ok\n")


def test_verify_prefers_the_history_to_what_was_superseded(history: Path, command: Command) -> None:
    write_checkpoint(history, superseded_tag(900), 900)
    assert command("verify", "test")[1] == f"{rolling_tag(300)}: ok\n"


def test_an_unknown_tag_lists_near_ones(history: Path, command: Command) -> None:
    code, _, err = command("verify", "test", "rolling_step_000101")
    assert code == exit_report.MISTAKE
    assert "no checkpoint 'rolling_step_000101' in" in err and rolling_tag(100) in err


def test_verify_says_what_is_wrong_and_exits_with_one(history: Path, command: Command, in_json: InJson) -> None:
    name = next(iter(FILES))
    (history / rolling_tag(100) / name).write_bytes(b"W" + FILES[name][1:])
    wrong = f"{name} is damaged: sha256 mismatch"
    assert command("verify", "test", "100")[:2] == (exit_report.CRASHED, f"{rolling_tag(100)}: {wrong}\n")
    code, verdicts = in_json("verify", "test", "--all")
    assert code == exit_report.CRASHED
    assert [verdict["ok"] for verdict in verdicts] == [True, True, True, True, False]
    assert verdicts[-1] == {"tag": rolling_tag(100), "step": 100, "ok": False, "problem": wrong}
    assert command("verify", "test")[0] == exit_report.DONE  # the newest is as good as ever


def test_a_file_of_two_names_is_read_once(history: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = manifest_module.problem_of

    def recording(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
        read.append(checkpoint / name)
        return original(checkpoint, name, entry)

    monkeypatch.setattr(manifest_module, "problem_of", recording)
    assert command("verify", "test", "--all")[0] == exit_report.DONE
    assert len(read) == 3 * len(FILES)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something happen once, just before the first file is read."""

    def arrange(happens: Callable[[], object]) -> None:
        original, left = manifest_module.problem_of, [happens]

        def reading(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
            if left:
                left.pop()()
            return original(checkpoint, name, entry)

        monkeypatch.setattr(manifest_module, "problem_of", reading)

    return arrange


Meanwhile = Callable[[Callable[[], object]], None]


def test_a_best_model_that_is_replaced_meanwhile_is_not_called_bad(
    history: Path, command: Command, meanwhile: Meanwhile
) -> None:
    newer = write_checkpoint(history, rolling_tag(400), 400, {name: content[::-1] for name, content in FILES.items()})
    meanwhile(lambda: commit.link(Disk(), newer, history, "best_model"))
    assert command("verify", "test", "best")[:2] == (exit_report.DONE, "best_model: ok\n")


def test_a_checkpoint_that_is_deleted_meanwhile_is_none_of_all(
    history: Path, command: Command, meanwhile: Meanwhile
) -> None:
    meanwhile(lambda: commit.remove(Disk(), history, rolling_tag(100)))
    code, out, _ = command("verify", "test", "--all")
    assert code == exit_report.DONE and rolling_tag(100) not in out and out.count(": ok\n") == 4


def test_a_named_checkpoint_that_is_deleted_meanwhile_is_not_good(
    history: Path, command: Command, meanwhile: Meanwhile
) -> None:
    meanwhile(lambda: commit.remove(Disk(), history, rolling_tag(100)))
    assert command("verify", "test", "100")[:2] == (
        exit_report.CRASHED,
        f"{rolling_tag(100)}: was deleted while it was looked at\n",
    )


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def _real_files(folder: Path, spoil: Callable[[dict[str, Any], dict[str, Any]], None]) -> dict[str, bytes]:
    """What DeepSpeed saves for a tiny model, as far as it matters here."""
    module = {name: tensor.bfloat16() for name, tensor in GPT2(ModelShape(1, 2, 8, 16), 0.0).state_dict().items()}
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(100), "seen": torch.zeros(1, 5, dtype=torch.uint8)}
    count = sum(tensor.numel() for tensor in module.values())
    moments["exp_avg"] = torch.zeros(count)
    optimizer = {
        "single_partition_of_fp32_groups": [torch.zeros(count)],
        "base_optimizer_state": {"state": {0: moments}},
        "groups": [(1, moments)],
    }
    spoil(module, moments)
    model = {"module": module, "dp_world_size": 1, "ds_gpt2": {"state": {"step": 1}}}
    for name, content in zip(FILES, (model, {"optimizer_state_dict": optimizer}), strict=True):
        torch.save(content, folder / name)
    return {name: (folder / name).read_bytes() for name in FILES}


def _spoil_nothing(module: dict[str, Any], moments: dict[str, Any]) -> None:
    pass


def _spoil_a_moment(module: dict[str, Any], moments: dict[str, Any]) -> None:
    moments["exp_avg"][50] = float("nan")


def _spoil_a_weight(module: dict[str, Any], moments: dict[str, Any]) -> None:
    module["ln_f.weight"][0] = float("inf")


def _spoil_a_shape(module: dict[str, Any], moments: dict[str, Any]) -> None:
    module["wte.weight"] = module["wte.weight"][:50_257]


def _lose_a_tensor(module: dict[str, Any], moments: dict[str, Any]) -> None:
    del module["h.0.mlp.c_fc.bias"]


def _add_a_tensor(module: dict[str, Any], moments: dict[str, Any]) -> None:
    module["h.1.mlp.c_fc.bias"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_spoil_nothing, "ok"),
        (
            _spoil_a_moment,
            "optimizer_state_dict: base_optimizer_state: state: 0: exp_avg has numbers that are not finite",
        ),
        (_spoil_a_weight, "mp_rank_00_model_states.pt: module: ln_f.weight has numbers that are not finite"),
        (_spoil_a_shape, "wte.weight has shape (50257, 8), expected (50304, 8) according to manifest.json"),
        (_lose_a_tensor, "h.0.mlp.c_fc.bias is missing"),
        (_add_a_tensor, "h.1.mlp.c_fc.bias is not a tensor of this model"),
    ],
)
def test_verify_deep_sees_what_hashes_cannot(
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[dict[str, Any], dict[str, Any]], None],
    problem: str,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = write_checkpoint(tmp_path / "run", rolling_tag(1), 1, _real_files(tmp_path, spoil))
    assert command("verify", path)[0] == exit_report.DONE
    code, out, _ = command("verify", path, "--deep")
    assert code == (exit_report.DONE if problem == "ok" else exit_report.CRASHED)
    assert out.startswith(f"{rolling_tag(1)}: ") and out.endswith(f"{problem}\n")


def test_verify_deep_knows_what_holds_weights_only(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    weights = GPT2(ModelShape(1, 2, 8, 16), 0.0).state_dict()
    for step, problem in ((1, "ok"), (2, "fp32_weights.pt: wpe.weight is missing")):
        torch.save(weights, tmp_path / "fp32_weights.pt")
        files = {"fp32_weights.pt": (tmp_path / "fp32_weights.pt").read_bytes()}
        path = write_checkpoint(tmp_path / "run", epoch_tag(step), step, files, kind="weights", world_size=4)
        assert command("verify", path, "--deep")[1] == f"{epoch_tag(step)}: {problem}\n"
        weights.pop("wpe.weight", None)
    empty = write_checkpoint(tmp_path / "run", epoch_tag(3), 3, {}, kind="weights")
    assert command("verify", empty, "--deep")[1].endswith("manifest.json does not list fp32_weights.pt\n")


def test_verify_deep_runs_no_code_and_misses_no_file(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    files = _real_files(tmp_path, _spoil_nothing)
    torch.save({"step": _Code(tmp_path / "owned")}, tmp_path / "evil.pt")
    evil = write_checkpoint(tmp_path / "run", rolling_tag(1), 1, {**files, "a.pt": (tmp_path / "evil.pt").read_bytes()})
    code, out, _ = command("verify", evil, "--deep")
    assert code == exit_report.CRASHED and out.startswith(f"{rolling_tag(1)}: a.pt cannot be loaded safely: ")
    assert not (tmp_path / "owned").exists()
    short = write_checkpoint(tmp_path / "run", rolling_tag(2), 2, files, world_size=2)
    missing = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert command("verify", short, "--deep")[1] == f"{rolling_tag(2)}: manifest.json does not list {missing}\n"
    other = write_checkpoint(tmp_path / "run", rolling_tag(3), 3, files, identity={})
    assert "it cannot be compared with manifest.json" in command("verify", other, "--deep")[1]


def test_prune_deletes_what_no_policy_keeps(history: Path, in_json: InJson, command: Command) -> None:
    size = size_of(history / rolling_tag(100))
    (history / "rolling_step_000050.tmp").mkdir()
    expected = {"directory": str(history), "dry_run": True, "deleted": [rolling_tag(100)], "freed_bytes": size}
    assert in_json("prune", "test", "--dry-run") == (exit_report.DONE, {**expected, "failures": []})
    said = command("prune", "test", "--dry-run")[1]
    assert said == f"{rolling_tag(100)} would be deleted\n0.0 MB would be freed\n"
    assert (history / rolling_tag(100) / "manifest.json").exists()
    assert in_json("prune", "test") == (exit_report.DONE, {**expected, "dry_run": False, "failures": []})
    left = {path.name for path in history.iterdir() if path.is_dir()}
    assert left == {rolling_tag(300), rolling_tag(200), "epoch_00001", "best_model", "rolling_step_000050.tmp"}
    assert command("prune", "test")[1] == "0.0 MB freed\n"


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_prune_counts_what_really_becomes_free(
    run_with: Callable[..., Path], in_json: InJson, options: list[str]
) -> None:
    """Step 100 is deleted under both of its names; step 200 lives on as the best; only the former gives bytes back."""
    directory = run_with(keep_last=1, keep_epochs=1)
    for step in (100, 200, 300, 400):
        write_checkpoint(directory, rolling_tag(step), step)
    commit.link(Disk(), directory / rolling_tag(100), directory, "epoch_00001")
    commit.link(Disk(), directory / rolling_tag(400), directory, "epoch_00004")
    commit.link(Disk(), directory / rolling_tag(200), directory, "best_model")
    size = size_of(directory / rolling_tag(100))
    result = in_json("prune", "test", *options)[1]
    assert sorted(result["deleted"]) == ["epoch_00001", rolling_tag(100), rolling_tag(200)]
    assert result["freed_bytes"] == size


def test_prune_protects_the_newest_two_that_verify(history: Path, in_json: InJson) -> None:
    """With the newest bad, step 100 is one of the two: the policies alone would let it go."""
    (history / rolling_tag(300) / next(iter(FILES))).write_bytes(FILES[next(iter(FILES))].upper())
    assert in_json("prune", "test")[1]["deleted"] == []
    write_checkpoint(history, rolling_tag(50), 50)
    assert in_json("prune", "test")[1]["deleted"] == [rolling_tag(50)]


def test_prune_takes_nothing_where_bad_ones_leave_fewer_than_two_good(history: Path, command: Command) -> None:
    write_checkpoint(history, superseded_tag(250), 250)
    for step in (200, 300):
        (history / rolling_tag(step) / "manifest.json").write_text("{}")
    code, _, err = command("prune", "test")
    assert code == exit_report.MISTAKE
    assert f"3 checkpoints in {history} are bad and only 1 good: nothing is deleted" in err
    assert (history / rolling_tag(100)).exists() and (history / superseded_tag(250)).exists()


def test_prune_does_not_mind_who_deletes_first(history: Path, in_json: InJson, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(history, rolling_tag(50), 50)
    original, left = commit.remove, [rolling_tag(50), rolling_tag(100)]

    def remove(disk: Disk, directory: Path, tag: str) -> None:
        shutil.rmtree(directory / left.pop())  # first that after it, then this one
        original(disk, directory, tag)

    monkeypatch.setattr(commit, "remove", remove)
    code, result = in_json("prune", "test")
    assert (code, result["deleted"], result["failures"]) == (exit_report.DONE, [rolling_tag(50)], [])


def test_prune_does_not_mind_who_deletes_faster(
    history: Path, in_json: InJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Disk.unlink

    def unlink(self: Disk, path: Path) -> None:
        original(self, path)
        shutil.rmtree(path.parent)  # the run, between two of our operations

    monkeypatch.setattr(Disk, "unlink", unlink)
    code, result = in_json("prune", "test")
    assert (code, result["deleted"], result["failures"]) == (exit_report.DONE, [rolling_tag(100)], [])


def test_prune_tells_what_it_could_not_delete(history: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Disk, path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Disk, "unlink", refuse)
    code, out, _ = command("prune", "test")
    assert code == exit_report.CRASHED
    assert out.startswith(f"could not delete {rolling_tag(100)}: [Errno 30] Read-only file system")
    assert out.endswith("0.0 MB freed\n")


def test_prune_needs_to_know_what_to_keep(tmp_path: Path, project: Path, command: Command) -> None:
    for step in range(1, 5):
        write_checkpoint(tmp_path / "bare", rolling_tag(step), step, settings={"checkpoint": {"keep_lots": 5}})
    code, _, err = command("prune", tmp_path / "bare")
    assert code == exit_report.MISTAKE and f"nothing says what to keep in {tmp_path}/bare" in err
    assert len(list((tmp_path / "bare").iterdir())) == 4


def test_the_settings_in_force_count_not_those_of_the_manifests(run_with: Callable[..., Path], in_json: InJson) -> None:
    directory = run_with(keep_last=3)
    for step in range(1, 6):
        write_checkpoint(directory, rolling_tag(step), step)  # their manifests say keep_last=1
    for name in (directory, "test"):
        assert in_json("prune", name, "--dry-run")[1]["deleted"] == [rolling_tag(1), rolling_tag(2)]


@pytest.mark.parametrize("words", [["list"], ["verify", "--all"], ["prune", "--dry-run"]])
def test_the_commands_start_at_once(tmp_path: Path, words: list[str]) -> None:
    """Without PyTorch and DeepSpeed, which take seconds; in less than one of processor time."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, rolling_tag(step), step)
    code = (
        "import sys; from ds_gpt2 import cli; code = cli.main(sys.argv[1:]);"
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules]); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, words[0], str(tmp_path), *words[1:]]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (result.returncode, result.stderr) == (exit_report.DONE, "")
    assert result.stdout.endswith("\n[]\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
