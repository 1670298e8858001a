"""Configuration errors are detected before ranks start or files change: one line and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import write_checkpoint
from file_tree import tree
from fsspec.registry import known_implementations
from launched import Launched

from ds_gpt2 import cli
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.run_location import load_run_settings, write_settings
from ds_gpt2.config.settings import PROJECT_DIR, load_settings
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.run_dir.journal import Journal
from ds_gpt2.supervision import launches
from ds_gpt2.training.preflight import check_source, check_start
from ds_gpt2.training.resume_choice import CheckpointsGoneError, choose_source


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, checks that it fails before ranks start, and returns its error line."""

    def run(*words: str) -> str:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setattr(launches, "Ranks", None)  # starting ranks would fail
        capfd.readouterr()
        assert cli.main([*words, "--num_gpus", "4"]) == exit_codes.MISTAKE
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "999"], "no checkpoint '999'"),
        (["--from", "epoch_00077"], "no checkpoint 'epoch_00077'"),
        (["--from", "/nowhere"], "no checkpoint '/nowhere'"),
        (["schedule.steps=10"], "is at step 12, beyond the 10 steps of the run: increase schedule.steps"),
        (["model.layers=3"], "was made with model.layers 2 (this run has 3)"),
        (["run.seed=7"], "run.seed 1337 (this run has 7)"),
        (["data.dir=/nowhere"], "no data: /nowhere does not exist"),
        (["batch.micro_batch=3"], "cannot be divided"),
        (["deepspeed=/nowhere.json"], "DeepSpeed file not found: /nowhere.json"),
        (["alerts.urls_file=/nowhere"], "/nowhere cannot be read"),
        (["run.name=other"], "run.name of an existing run is determined by its location"),
        (["checkpoint.dir=/dev/null/x"], "no checkpoints in /dev/null/x/test, but it has some in"),
        (["schedule.warmup_steps=20", "schedule.epochs=0.0001"], "schedule.warmup_steps 20 must be below"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_invalid_resume_changes_no_file_of_the_run(
    four_ranks: tuple[Launched, Path], refused: Callable[..., str], words: list[str], message: str
) -> None:
    _, folder = four_ranks
    before = tree(folder)
    assert message in refused("resume", str(folder / "runs" / "test"), *words)
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.dir=/nowhere", "no data"),
        ("model.init_from=/nowhere", "/nowhere"),
        ("batch.sequence_length=32768", "too few for one window"),
        ("checkpoint.dir=/dev/null/x", "cannot write to /dev/null/x/new: /dev/null: Not a directory"),
        ("run.dir=/proc/x", "cannot write to /proc/x/new"),
        ("monitor.dir=/dev/full/x", "cannot write to /dev/full/x/new"),
        ("deepspeed=CSV", "csv_monitor: cannot write to /dev/null/DeepSpeedJobName: /dev/null: Not a directory"),
        (
            "checkpoint.backup.to=/dev/null",
            "checkpoint.backup.to: cannot back up to /dev/null: /dev/null is not a directory",
        ),
        (
            "checkpoint.backup.to=/dev/null/x",
            "checkpoint.backup.to: cannot back up to /dev/null/x: /dev/null is not a directory",
        ),
        ("checkpoint.backup.to=file:///dev/null", "cannot back up to file:///dev/null: /dev/null is not a directory"),
        ("checkpoint.backup.to=foo://x", "checkpoint.backup.to: cannot back up to foo://x: Protocol not known: foo"),
        ("checkpoint.backup.to=nowhere://x", "checkpoint.backup.to: cannot back up to nowhere://x: Install nowhere_fs"),
        ("checkpoint.backup.to=CHECKPOINTS", "overlaps the directory of the checkpoints: give another location"),
        ("checkpoint.backup.to=CHECKPOINTS/new", "overlaps the directory of the checkpoints: give another location"),
    ],
)
def test_an_invalid_start_creates_no_run(
    write_config: Callable[..., Path],
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    message: str,
) -> None:
    needs_a_package = {"class": "nowhere_fs.Nowhere", "err": "Install nowhere_fs to reach it"}
    monkeypatch.setitem(known_implementations, "nowhere", needs_a_package)
    config = write_config(tmp_path / "new")
    checkpoints = load_settings(config).checkpoint.dir
    setting = setting.replace("CHECKPOINTS", str(checkpoints)).replace("=CSV", f"={tmp_path / 'csv.json'}")
    content = json.loads((PROJECT_DIR / "ds_configs" / "zero2_bf16.json").read_text())
    (tmp_path / "csv.json").write_text(
        json.dumps({**content, "csv_monitor": {"enabled": True, "output_path": "/dev/null"}})
    )
    before = tree(tmp_path)
    more = ["batch.tokens_per_step=262144"] if "sequence_length" in setting else []
    assert message in refused("train", str(config), "run.name=new", setting, *more)
    assert tree(tmp_path) == before


def test_a_complete_first_save_without_its_final_name_is_resumed(
    four_ranks: tuple[Launched, Path], tmp_path: Path
) -> None:
    """As after a crash between the last two steps of a commit. The ranks finish the commit before they resume."""
    folder = shutil.copytree(four_ranks[1], tmp_path / "copy")
    settings = load_run_settings(folder / "runs" / "test")
    batch = settings.batch
    plan = plan_batch(batch.tokens_per_step, batch.micro_batch, batch.sequence_length, 4)
    newest = settings.checkpoint_dir / "rolling_step_000012"
    for path in [path for path in settings.checkpoint_dir.iterdir() if path.is_dir() and path != newest]:
        shutil.rmtree(path)
    newest.rename(newest.with_name(f"{newest.name}.tmp"))
    for wanted in ("latest", "auto", "12", newest.name):
        check_start(settings, plan, wanted)
    (newest.with_name(f"{newest.name}.tmp") / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"run test has no checkpoints in .*, but it has some in "):
        check_start(settings, plan, "latest")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "CONFIG"], "move .*runs/test away or choose another run.name"),
        (["resume", "RUN"], "mount or restore it"),
    ],
)
def test_a_run_whose_checkpoints_are_missing_is_not_changed(
    four_ranks: tuple[Launched, Path], refused: Callable[..., str], tmp_path: Path, words: list[str], message: str
) -> None:
    folder = shutil.copytree(four_ranks[1], tmp_path / "copy")
    text = (folder / "run.yaml").read_text().replace(str(four_ranks[1]), str(folder))
    (folder / "run.yaml").write_text(text)
    shutil.rmtree(folder / "checkpoints")
    away = four_ranks[1] / "checkpoints"
    away.rename(away.with_name("away"))  # the checkpoints of the original run
    before = tree(folder)
    try:
        given = {"CONFIG": str(folder / "run.yaml"), "RUN": str(folder / "runs" / "test")}
        line = refused(*[given.get(word, word) for word in words])
        assert "run test was saved at step 12, but there is no checkpoint in" in line and re.search(message, line)
    finally:
        away.with_name("away").rename(away)
    assert tree(folder) == before


def test_a_run_that_was_never_saved_may_start_again(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    settings = load_settings(write_config(tmp_path))
    settings.run_dir.mkdir(parents=True)
    journal = Journal(settings.run_dir)
    assert choose_source(settings, "auto") is None
    journal.write("start", "started", 0)
    (settings.run_dir / "metrics.jsonl").write_text('{"step": 3}\n')
    assert choose_source(settings, "auto") is None
    journal.write("save", "saved", 6)
    with pytest.raises(CheckpointsGoneError, match="saved at step 6"):
        choose_source(settings, "auto")
    journal.write("start", "begun anew", 0)
    assert choose_source(settings, "auto") is None
    (settings.run_dir / "journal.jsonl").unlink()
    with pytest.raises(CheckpointsGoneError, match="saved at step 3"):  # according to the metrics; the journal is lost
        choose_source(settings, "auto")


def test_the_refusal_of_a_new_run_suggests_a_command_that_works(
    tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(write_config(tmp_path), {"run.dir": str(tmp_path / "my runs")})
    tag = settings.checkpoint_dir / "rolling_step_000006"
    tag.mkdir(parents=True)
    (tag / "manifest.json").write_text("any content")
    wrong = (
        f"run test already has checkpoints in {settings.checkpoint_dir}, the newest is rolling_step_000006: resume it"
    )

    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            choose_source(settings, None)
        return str(refused.value)

    end = "; ds_gpt2/train.py: --resume latest), or choose another run.name"
    assert refusal() == f"{wrong} (`./launch.sh train CONFIG run.name=test --auto`{end}"
    settings.run_dir.mkdir(parents=True)
    (settings.run_dir / "config.yaml").write_text("")
    assert refusal() == f"{wrong} (`./launch.sh resume '{settings.run_dir}'`{end}"
    monkeypatch.setattr("ds_gpt2.config.run_location.PROJECT_DIR", tmp_path)
    monkeypatch.setattr("ds_gpt2.config.run_location.RUNS", "my runs")
    assert refusal() == f"{wrong} (`./launch.sh resume test`{end}"


def test_a_resume_with_a_file_in_the_place_of_its_checkpoint_names_the_file(
    tmp_path: Path, write_config: Callable[..., Path], refused: Callable[..., str]
) -> None:
    settings = load_settings(write_config(tmp_path))
    settings.run_dir.mkdir(parents=True)
    write_settings(settings)
    settings.checkpoint_dir.mkdir(parents=True)
    (settings.checkpoint_dir / "rolling_step_000035").write_text("")
    problem = f"{settings.checkpoint_dir}/rolling_step_000035 is a file, not the directory of a checkpoint: delete it"
    line = refused("resume", str(settings.run_dir))
    assert line.startswith(f"error: nothing to resume: {problem}")
    Journal(settings.run_dir).write("save", "saved", 35)
    line = refused("resume", str(settings.run_dir))
    assert f"was saved at step 35, but there is no checkpoint in {settings.checkpoint_dir}: {problem}" in line


def test_the_checkpoints_are_searched_once_for_what_to_resume_from(
    tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(write_config(tmp_path))
    write_checkpoint(settings.checkpoint_dir, "rolling_step_000006", 6, identity={})
    searched = []

    def search(selector: str) -> int:
        searched.append(selector)
        return 9

    monkeypatch.setattr("ds_gpt2.checkpoint.catalog.step_limit", search)  # ``candidates`` calls it once
    check_start(settings, plan_batch(settings.batch.tokens_per_step, 2, settings.batch.sequence_length, 1), "before:9")
    assert searched == ["before:9"]


def test_a_resume_from_before_a_step_takes_no_later_checkpoint(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    settings = load_settings(write_config(tmp_path))
    for step in (4, 8):
        write_checkpoint(settings.checkpoint_dir, f"rolling_step_{step:06d}", step, identity={})
    check_source(settings, "before:5")
    with pytest.raises(UserError, match="is from before step 4: the oldest is rolling_step_000004; choose one"):
        check_source(settings, "before:4")


def test_batches_that_a_checkpoint_was_trained_on_cannot_be_left_out(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    settings = load_settings(write_config(tmp_path))
    state = {"step": 8, "batch": 10, "left_out": [3, 4]}
    write_checkpoint(settings.checkpoint_dir, "rolling_step_000008", 8, identity={}, state=state)
    check_source(settings, "latest", [3, 11, 12])
    with pytest.raises(UserError, match=r"--leave_out 9-10: rolling_step_000008 was trained .* --from before:9"):
        check_source(settings, "latest", [3, 9, 10, 11])


@pytest.mark.parametrize("source", ["latest", "999"])
def test_a_resume_without_checkpoints_does_not_announce_another_micro_batch(
    tmp_path: Path,
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    batch = {"tokens_per_step": 256, "micro_batch": 16, "sequence_length": 16}  # fits one rank, not four
    settings = load_settings(write_config(tmp_path, batch=batch))
    settings.run_dir.mkdir(parents=True)
    write_settings(settings)
    Journal(settings.run_dir).write("save", "saved", 35)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cli.main(["resume", str(settings.run_dir), "--from", source]) == exit_codes.MISTAKE
    out, err = capsys.readouterr()
    expected = "was saved at step 35, but there is no checkpoint" if source == "latest" else "no checkpoint '999'"
    assert out == "" and expected in err and err.count("\n") == 1


def test_unreadable_records_are_reported_in_one_line(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    settings = load_settings(write_config(tmp_path))
    (settings.run_dir / "journal.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"journal\.jsonl cannot be read: Is a directory; move it away, or restore"):
        choose_source(settings, "auto")


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics_replaced.jsonl", "journal.jsonl", "starts.jsonl"])
def test_a_directory_in_place_of_a_file_of_the_run_is_reported_before_the_start(
    write_config: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "runs" / "test"
    (run_dir / name).mkdir(parents=True)
    (run_dir / "config.yaml").write_text(write_config(tmp_path).read_text())
    before = tree(tmp_path)
    message = f"{run_dir / name} is not a regular file: move it away, or restore the file from a copy of the run"
    assert refused("resume", str(run_dir)) == f"error: {message}\n"
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("runs/test/metrics.jsonl", "run.name"),
        ("runs/test/dataset.json", "run.name"),
        ("checkpoints/test/latest", "checkpoint.dir"),
        ("checkpoints/test/run.json", "checkpoint.dir"),
        ("checkpoints/test/rolling_step_000001/x", "checkpoint.dir"),
    ],
)
def test_a_new_run_does_not_start_among_foreign_files(
    write_config: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, file: str, setting: str
) -> None:
    config = write_config(tmp_path)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / "runs" / "test").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "test" / "console.log").touch()  # allowed in a new run's directory
    (tmp_path / file).write_text("of another program")
    before = tree(tmp_path)
    name = Path(file).parts[2]
    assert f"has {name}, which does not belong to this run: choose another {setting}" in refused("train", str(config))
    assert tree(tmp_path) == before


def test_a_run_with_checkpoints_is_not_started_again(
    four_ranks: tuple[Launched, Path], refused: Callable[..., str]
) -> None:
    _, folder = four_ranks
    before = tree(folder)
    assert "already has checkpoints" in refused("train", str(folder / "run.yaml"))
    assert tree(folder) == before
