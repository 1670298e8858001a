"""Complete runs on four ranks with DeepSpeed's launcher, and the files that they write."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launched import Run, launch
from small_run import MODEL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.kill_soak import curve_problems
from benchmarks.reference import train_reference
from ds_gpt2 import train
from ds_gpt2.checkpoint import manifest
from ds_gpt2.checkpoint.catalog import problem_of, scan
from ds_gpt2.checkpoint.commit import read_pointer
from ds_gpt2.checkpoint.naming import PARTIAL
from ds_gpt2.config.settings import ScheduleSettings
from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file, unpickle
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences, differences
from ds_gpt2.training.lr_schedule import LearningRate

pytestmark = pytest.mark.ranks

STEPS = 12


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs" / "test" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def resumed(four_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Resume a copy of the run whose newest checkpoint has a flipped bit, from the checkpoint before.

    That checkpoint is in the state that a crash just before the last rename of its commit would leave.
    """
    _, original = four_ranks
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("resumed") / "copy"))
    partition = folder / "checkpoints" / "test" / "rolling_step_000012" / partition_file(2)
    content = bytearray(partition.read_bytes())
    content[len(content) // 2] ^= 4
    partition.write_bytes(content)
    # After copying, best_model is no longer a link to the damaged checkpoint, and would verify.
    shutil.rmtree(folder / "checkpoints" / "test" / "best_model")
    previous = folder / "checkpoints" / "test" / "rolling_step_000006"
    previous.rename(previous.with_name(previous.name + PARTIAL))
    directories = [f"run.dir={folder / 'runs'}", f"checkpoint.dir={folder / 'checkpoints'}"]
    return launch(4, "--config", str(folder / "run.yaml"), "--resume", "auto", *directories), folder


def test_a_run_exits_with_code_0_and_leaves_no_process(four_ranks: Run) -> None:
    launched, _ = four_ranks
    assert launched.code == 0, launched.output
    assert launched.left_over == []


def test_the_console_shows_every_step_and_no_other_output(four_ranks: Run) -> None:
    launched, folder = four_ranks
    lines = launched.output.splitlines()
    assert "run test: 4 ranks on the CPU with 1 thread each, gloo" in lines
    steps = [line for line in lines if re.match(r"step +\d+/12 ", line)]
    assert len(steps) == STEPS
    number = r"[\d.,e+-]+"
    shape = rf"step +\d+/12  loss {number}  lr {number}  grad {number}  {number} ms  {number} tok/s  eta [\d hms]+"
    assert all(re.fullmatch(shape, line) for line in steps)
    expected = ("run ", "verifying ", "model ", "step ", "done at step 12 of 12; checkpoint ")
    assert [line for line in lines if not line.startswith(expected)] == []
    logged = (folder / "runs" / "test" / "train.log").read_text()
    assert all(line in logged for line in lines)


def test_metrics_have_every_step_once_with_the_scheduled_learning_rate(four_ranks: Run) -> None:
    records = metrics(four_ranks[1])
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    rate = LearningRate(ScheduleSettings(steps=STEPS, warmup_steps=3, max_lr=3e-3, min_lr=3e-4), STEPS)
    assert [record["train/lr"] for record in records] == [rate(step) for step in range(1, STEPS + 1)]
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5
    assert records[0]["train/loss"] == pytest.approx(math.log(50_257), abs=0.3)
    assert records[-1]["train/tokens"] == STEPS * 16 * 64
    assert all(record["perf/tokens_per_s"] > 0 and record["perf/step_ms"] > 0 for record in records)
    validated = {record["step"]: record["val/loss"] for record in records if "val/loss" in record}
    assert list(validated) == [6, 12]
    assert validated[12] < validated[6]
    assert [record["step"] for record in records if "samples/0" in record] == [6, 12]
    assert records[-1]["samples/0"].startswith("The statement")
    correct = [30 * record["hellaswag/acc_norm"] for record in records if "hellaswag/acc_norm" in record]
    assert len(correct) == 2 and correct == pytest.approx([round(count) for count in correct])


def test_tensorboard_has_the_same_values_by_step(four_ranks: Run) -> None:
    folder = four_ranks[1]
    assert curve_problems(folder / "runs" / "test") == []
    events = EventAccumulator(str(folder / "runs" / "test" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val/loss", "perf/tokens_per_s", "perf/goodput", "update_ratio/h.1"} < set(tags["scalars"])
    texts = {tag for tag in tags["tensors"] if tag.endswith("/text_summary")}
    assert texts == {f"{tag}/text_summary" for tag in ("samples/0", "config", "marks/start", "marks/best")}
    matrices = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    names = ["wte.weight", "wpe.weight"] + [f"h.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in matrices]
    assert set(tags["histograms"]) == {f"{kind}/{name}" for kind in ("param", "grad") for name in names}
    shown = events.Histograms("param/wte.weight")
    assert [event.step for event in shown] == [6, 12]
    assert shown[-1].histogram_value.num == 50_304 * 32


def test_checkpoints_consist_of_deepspeeds_files_and_latest_names_the_newest(four_ranks: Run) -> None:
    directory = four_ranks[1] / "checkpoints" / "test"
    assert [found.tag for found in scan(directory)] == ["rolling_step_000012", "best_model", "rolling_step_000006"]
    assert [problem_of(found) for found in scan(directory)] == [None, None, None]
    assert (read_pointer(directory, "latest"), read_pointer(directory, "latest_backup")) == (
        "rolling_step_000012",
        "rolling_step_000006",
    )
    assert not list(directory.glob("*.tmp"))
    names = {path.name for path in (directory / "rolling_step_000012").iterdir()}
    partitions = {f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(4)}
    assert names == {"mp_rank_00_model_states.pt", "manifest.json", *partitions}
    assert (directory / "zero_to_fp32.py").exists()
    saved = manifest.read(directory / "rolling_step_000012")
    assert (saved.step, saved.state["tokens"], saved.world_size) == (12, 12 * 1024, 4)
    assert saved.val_loss == metrics(four_ranks[1])[-1]["val/loss"]
    assert (directory / "best_model" / "manifest.json").stat().st_nlink == 2


def test_deepspeeds_zero_to_fp32_reads_checkpoints(four_ranks: Run) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(four_ranks[1] / "checkpoints" / "test"))
    assert weights["wte.weight"].dtype == torch.float32
    assert weights["wte.weight"].shape == (50_304, 32)


def test_the_run_directory_records_each_start(four_ranks: Run) -> None:
    run_dir = four_ranks[1] / "runs" / "test"
    start = json.loads((run_dir / "starts.jsonl").read_text())
    assert (start["from_step"], start["world_size"]) == (0, 4)
    assert set(start["versions"]) == {"ds_gpt2", "python", "torch", "deepspeed"}
    assert "--config" in start["command"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["schedule"]["steps"] == STEPS


def test_a_resume_gives_identical_metrics(four_ranks: Run, resumed: Run) -> None:
    launched, folder = resumed
    assert launched.code == 0, launched.output
    assert (
        "rolling_step_000012 cannot be used: bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt is damaged"
        in launched.output
    )
    assert "finished the commit of rolling_step_000006" in launched.output
    assert f"resumed from {folder}/checkpoints/test/rolling_step_000006, step 6 of 12" in launched.output
    assert [found.tag for found in scan(folder / "checkpoints" / "test")] == [
        "rolling_step_000012",
        "best_model",
        "superseded_step_000012",
        "rolling_step_000006",
    ]
    assert curve_differences(*(directory / "runs" / "test" for directory in (four_ranks[1], folder))) == []


def test_a_resume_gives_identical_weights(four_ranks: Run, resumed: Run) -> None:
    one, other = (folder / "checkpoints" / "test" / "rolling_step_000012" for _, folder in (four_ranks, resumed))
    assert checkpoint_differences(one, other) == []


def test_curves_in_tensorboard_do_not_overlap_after_a_resume(resumed: Run) -> None:
    assert curve_problems(resumed[1] / "runs" / "test") == []


def test_evaluation_and_monitoring_change_nothing(
    four_ranks: Run, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    """Without hooks the weights, moments and random states of the run are identical, bit for bit."""
    never = {name: {"every": 0} for name in ("validation", "samples", "histograms", "hellaswag")}
    config = write_config(tmp_path, model=MODEL, monitor={"tensorboard": False}, **never)
    assert launch(4, "--config", str(config)).code == 0
    for name in (MODEL_FILE, *map(partition_file, range(4))):
        with_hooks, without_hooks = (
            unpickle(folder / "checkpoints" / "test" / "rolling_step_000012" / name)
            for folder in (four_ranks[1], tmp_path)
        )
        for state in (with_hooks, without_hooks):
            del state["ds_config"]  # contains paths
            if name == MODEL_FILE:
                assert state.pop("ds_gpt2")["state"]["step"] == STEPS  # the rest depends on validations
        assert differences(with_hooks, without_hooks, name) == []


def test_training_follows_a_plain_pytorch_loop(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """The loop has fp32 masters, bf16 arithmetic, torch's cross entropy and AdamW, no DeepSpeed, and the same data."""
    config = write_config(tmp_path, validation={"every": 0}, samples={"every": 0})
    launched = launch(2, "--config", str(config))
    assert launched.code == 0, launched.output
    ours = [record["train/loss"] for record in metrics(tmp_path)]
    assert ours == pytest.approx(train_reference(config, steps=STEPS), rel=2e-3)


def test_an_error_in_the_data_of_one_rank_ends_all_ranks_with_one_line(
    tmp_path: Path, dataset_dir: Path, write_config: Callable[..., Path]
) -> None:
    """A token id out of range in a shard of one rank: exit code 2, one line, no traceback, no process left."""
    data = Path(shutil.copytree(dataset_dir, tmp_path / "data"))
    shard = data / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[5000:5002] = b"\xff\xff"
    shard.write_bytes(content)
    launched = launch(2, "--config", str(write_config(tmp_path, data={"dir": str(data)})))
    assert launched.code == 2, launched.output
    assert launched.left_over == []
    assert launched.output.count("error:") == 1
    assert "train_000000.bin has token id 65535 at position 1988" in launched.output
    assert "Traceback" not in launched.output


def test_print_config_shows_the_merged_settings_and_does_not_train(
    tmp_path: Path, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--run_name", "other", "--checkpoint_freq", "7", "--eval_freq", "3", "--use_tensorboard", "false"]
    folders = ["--checkpoint_dir", str(tmp_path / "ck"), "--tensorboard_dir", str(tmp_path / "tb"), "--local_rank=0"]
    config = str(write_config(tmp_path))
    assert train.main(["--config", config, *flags, *folders, "schedule.steps=99", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["run"]["name"], shown["checkpoint"]["every"], shown["validation"]["every"]) == ("other", 7, 3)
    assert (shown["schedule"]["steps"], shown["monitor"]["tensorboard"]) == (99, False)
    assert (shown["checkpoint"]["dir"], shown["monitor"]["dir"]) == (str(tmp_path / "ck"), str(tmp_path / "tb"))
    assert not (tmp_path / "runs").exists()
