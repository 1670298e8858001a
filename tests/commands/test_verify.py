"""``verify``, on checkpoints that were never trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import FILES, write_checkpoint

from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint import manifest as manifest_module
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import FileEntry
from ds_gpt2.checkpoint.naming import epoch_tag, rolling_tag, superseded_tag
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.run_dir import exit_codes

Command = Callable[..., tuple[int, str, str]]
InJson = Callable[..., tuple[int, Any]]


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
def test_verify_selects_checkpoints(history: Path, command: Command, words: list[str], tags: list[str]) -> None:
    assert command("verify", *words)[:2] == (exit_codes.DONE, "".join(f"{tag}: ok\n" for tag in tags))


def test_verify_accepts_the_path_of_a_checkpoint(history: Path, command: Command, tmp_path: Path) -> None:
    copy = shutil.copytree(history / rolling_tag(100), tmp_path / "copy for the paper")
    assert command("verify", copy)[:2] == (exit_codes.DONE, "copy for the paper: ok\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test", "100", "--all"], "--all includes every checkpoint: remove 100 or --all"),
        (["DATA", "10", "--deep"], "DATA is a dataset, of which every shard is verified: remove 10 and --deep"),
        (["DATA", "--deep"], "DATA is a dataset, of which every shard is verified: remove --deep"),
        (["COPY", "100"], "COPY is one checkpoint: remove 100, or give its run and 100"),
    ],
)
def test_an_argument_that_would_have_no_effect_is_refused(
    history: Path, command: Command, dataset_dir: Path, words: list[str], message: str
) -> None:
    paths = {"DATA": str(dataset_dir), "COPY": str(history / rolling_tag(100))}
    code, out, error = command("verify", *(paths.get(word, word) for word in words))
    assert (code, out) == (exit_codes.MISTAKE, "")
    expected = message.replace("DATA", paths["DATA"]).replace("COPY", paths["COPY"])
    assert error == f"error: {expected}\n"


def test_verify_skips_superseded_checkpoints_by_default(history: Path, command: Command) -> None:
    write_checkpoint(history, superseded_tag(900), 900)
    assert command("verify", "test")[1] == f"{rolling_tag(300)}: ok\n"


def test_an_unknown_tag_lists_similar_tags(history: Path, command: Command) -> None:
    code, _, err = command("verify", "test", "rolling_step_000101")
    assert code == exit_codes.MISTAKE
    assert "no checkpoint 'rolling_step_000101' in" in err and rolling_tag(100) in err


def test_verify_reports_damage_with_exit_code_one(history: Path, command: Command, in_json: InJson) -> None:
    name = next(iter(FILES))
    (history / rolling_tag(100) / name).write_bytes(b"W" + FILES[name][1:])
    problem = f"{name} is damaged: sha256 mismatch"
    assert command("verify", "test", "100")[:2] == (exit_codes.CRASHED, f"{rolling_tag(100)}: {problem}\n")
    code, verdicts = in_json("verify", "test", "--all")
    assert code == exit_codes.CRASHED
    assert [verdict["ok"] for verdict in verdicts] == [True, True, True, True, False]
    assert verdicts[-1] == {"tag": rolling_tag(100), "step": 100, "ok": False, "problem": problem}
    assert command("verify", "test")[0] == exit_codes.DONE  # the newest is good


def test_a_hard_linked_file_is_read_once(history: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = manifest_module.problem_of

    def recording(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
        read.append(checkpoint / name)
        return original(checkpoint, name, entry)

    monkeypatch.setattr(manifest_module, "problem_of", recording)
    assert command("verify", "test", "--all")[0] == exit_codes.DONE
    assert len(read) == 3 * len(FILES)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Call a function once, just before the first file is read."""

    def arrange(action: Callable[[], object]) -> None:
        original, left = manifest_module.problem_of, [action]

        def reading(checkpoint: Path, name: str, entry: FileEntry) -> str | None:
            if left:
                left.pop()()
            return original(checkpoint, name, entry)

        monkeypatch.setattr(manifest_module, "problem_of", reading)

    return arrange


Meanwhile = Callable[[Callable[[], object]], None]


def test_a_best_model_that_is_replaced_meanwhile_is_good(history: Path, command: Command, meanwhile: Meanwhile) -> None:
    newer = write_checkpoint(history, rolling_tag(400), 400, {name: content[::-1] for name, content in FILES.items()})
    meanwhile(lambda: commit.link(Disk(), newer, history, "best_model"))
    assert command("verify", "test", "best")[:2] == (exit_codes.DONE, "best_model: ok\n")


def test_a_checkpoint_that_is_deleted_meanwhile_is_omitted_from_all(
    history: Path, command: Command, meanwhile: Meanwhile
) -> None:
    meanwhile(lambda: commit.remove(Disk(), history, rolling_tag(100)))
    code, out, _ = command("verify", "test", "--all")
    assert code == exit_codes.DONE and rolling_tag(100) not in out and out.count(": ok\n") == 4


def test_a_requested_checkpoint_that_is_deleted_meanwhile_is_an_error(
    history: Path, command: Command, meanwhile: Meanwhile
) -> None:
    meanwhile(lambda: commit.remove(Disk(), history, rolling_tag(100)))
    assert command("verify", "test", "100")[:2] == (
        exit_codes.CRASHED,
        f"{rolling_tag(100)}: was deleted while it was read\n",
    )


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def _real_files(folder: Path, damage: Callable[[dict[str, Any], dict[str, Any]], None]) -> dict[str, bytes]:
    """Return the files that DeepSpeed saves for a tiny model, with the contents that verify reads."""
    module = {name: tensor.bfloat16() for name, tensor in GPT2(ModelShape(1, 2, 8, 16), 0.0).state_dict().items()}
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(100), "seen": torch.zeros(1, 5, dtype=torch.uint8)}
    count = sum(tensor.numel() for tensor in module.values())
    moments["exp_avg"] = torch.zeros(count)
    optimizer = {
        "single_partition_of_fp32_groups": [torch.zeros(count)],
        "base_optimizer_state": {"state": {0: moments}},
        "groups": [(1, moments)],
    }
    damage(module, moments)
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
    ("damage", "problem"),
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
def test_verify_deep_finds_damage_with_valid_checksums(
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[dict[str, Any], dict[str, Any]], None],
    problem: str,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = write_checkpoint(tmp_path / "run", rolling_tag(1), 1, _real_files(tmp_path, damage))
    assert command("verify", path)[0] == exit_codes.DONE
    code, out, _ = command("verify", path, "--deep")
    assert code == (exit_codes.DONE if problem == "ok" else exit_codes.CRASHED)
    assert out.startswith(f"{rolling_tag(1)}: ") and out.endswith(f"{problem}\n")


def test_verify_deep_verifies_weights_only_checkpoints(
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


def test_verify_deep_runs_no_code_and_requires_all_files(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    files = _real_files(tmp_path, _spoil_nothing)
    torch.save({"step": _Code(tmp_path / "owned")}, tmp_path / "evil.pt")
    evil = write_checkpoint(tmp_path / "run", rolling_tag(1), 1, {**files, "a.pt": (tmp_path / "evil.pt").read_bytes()})
    code, out, _ = command("verify", evil, "--deep")
    assert code == exit_codes.CRASHED and out.startswith(f"{rolling_tag(1)}: a.pt cannot be loaded safely: ")
    assert not (tmp_path / "owned").exists()
    short = write_checkpoint(tmp_path / "run", rolling_tag(2), 2, files, world_size=2)
    missing = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert command("verify", short, "--deep")[1] == f"{rolling_tag(2)}: manifest.json does not list {missing}\n"
    other = write_checkpoint(tmp_path / "run", rolling_tag(3), 3, files, identity={})
    assert "it cannot be compared with manifest.json" in command("verify", other, "--deep")[1]


def test_a_file_in_the_place_of_a_checkpoint_is_reported(history: Path, in_json: InJson, command: Command) -> None:
    shutil.rmtree(history / rolling_tag(300))
    (history / rolling_tag(300)).write_text("a file")
    problem = "is a file, not the directory of a checkpoint: delete it, or restore the directory from a copy"
    code, verdicts = in_json("verify", "test", "--all")
    expected = {"tag": rolling_tag(300), "step": 300, "ok": False, "problem": problem}
    assert (code, [verdict for verdict in verdicts if not verdict["ok"]]) == (exit_codes.CRASHED, [expected])
    assert f"{rolling_tag(300)}: {problem}\n" in command("verify", "test", "--all")[1]
    assert command("verify", "test", rolling_tag(300))[2] == f"error: {history / rolling_tag(300)} {problem}\n"
    (row,) = [row for row in in_json("list", "test")[1] if row["tag"] == rolling_tag(300)]
    assert (row["kind"], row["resumable"], row["problem"]) == ("unfinished", False, problem)
