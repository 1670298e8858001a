"""The command line: verbs that start no ranks, arguments, errors, and launch.sh."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import PROJECT, Run, launch, run

from ds_gpt2 import cli
from ds_gpt2.commands import quickstart
from ds_gpt2.config.batch_plan import plan_batch
from ds_gpt2.config.settings import known_keys, load_settings
from ds_gpt2.data.dataset import open_dataset
from ds_gpt2.data.prepare import datasets
from ds_gpt2.run_dir import exit_codes


def test_prepare_text_writes_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("A line of text.\n" * 5000)
    assert cli.main(["prepare", "text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == exit_codes.DONE
    dataset = open_dataset(tmp_path / "out")
    assert dataset.source == "a.txt"
    printed = capsys.readouterr().out
    assert f"{dataset.tokens('train'):,} training and {dataset.tokens('val'):,} validation tokens" in printed


def test_prepare_text_names_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "text", str(tmp_path / "gone.txt")]) == exit_codes.MISTAKE
    assert capsys.readouterr().err == f"error: no such text file or directory: {tmp_path / 'gone.txt'}\n"


def test_prepare_does_not_advise_to_remove_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("A line of text.\n" * 5000)
    assert cli.main(["prepare", "text", str(file), "--out", str(file)]) == exit_codes.MISTAKE
    expected = f"error: {file} is not a directory: give --out DIR, one that does not exist or is empty\n"
    assert capsys.readouterr().err == expected


@pytest.mark.ranks
def test_a_dataset_is_named_after_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "PROJECT_DIR", tmp_path)
    for name in ("my corpus.txt", "essays/a.txt", "sample.txt", "x.jsonl.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("A line of text.\n" * 5000)
    monkeypatch.chdir(tmp_path / "essays")
    for words in (["my corpus.txt"], ["essays"], ["sample.txt"], ["x.jsonl.txt", "essays"]):
        assert cli.main(["prepare", "text", *(str(tmp_path / word) for word in words)]) == exit_codes.DONE
    assert cli.main(["prepare", "text", "."]) == exit_codes.MISTAKE  # resolves to essays, which exists
    names = ["essays", "my-corpus", "sample-text", "x.jsonl-and-1-more"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == names


def test_prepare_text_reports_skipped_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": "some <|endoftext|> words"}', "{}", '{"text": "more words"}', '{"text": "and more"}']
    (tmp_path / "a.ndjson").write_text("\n".join(lines))
    assert cli.main(["prepare", "text", str(tmp_path / "a.ndjson"), "--out", str(tmp_path / "out")]) == exit_codes.DONE
    printed = capsys.readouterr().out
    assert "skipped 1 document, damaged or without text" in printed
    assert "the text contains <|endoftext|> 1 time, tokenized as ordinary characters: see --separator" in printed


@pytest.mark.ranks
def test_prepare_sample_reuses_an_existing_dataset(tmp_path: Path) -> None:
    arguments = ["prepare", "sample", "--out", str(tmp_path / "sample")]
    assert cli.main(arguments) == exit_codes.DONE
    written = (tmp_path / "sample" / "dataset.json").stat().st_mtime_ns
    assert cli.main(arguments) == exit_codes.DONE
    assert (tmp_path / "sample" / "dataset.json").stat().st_mtime_ns == written
    assert open_dataset(tmp_path / "sample").tokens("train") > 3_000_000


def test_a_second_quickstart_is_a_new_run(tmp_path: Path) -> None:
    overrides = {"checkpoint.dir": str(tmp_path)}
    assert quickstart._with_unused_name(overrides)["run.name"] == "quickstart"
    for name in ("quickstart", "quickstart-2"):
        (tmp_path / name / "rolling_step_000001").mkdir(parents=True)
        (tmp_path / name / "rolling_step_000001" / "manifest.json").write_text("any content")
    assert quickstart._with_unused_name(overrides)["run.name"] == "quickstart-3"
    assert quickstart._with_unused_name({**overrides, "run.name": "mine"})["run.name"] == "mine"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 16, 40])
def test_quickstart_works_on_any_number_of_gpus(ranks: int) -> None:
    settings = load_settings(PROJECT / "ds_configs" / "quickstart.yaml")
    fitted = load_settings(PROJECT / "ds_configs" / "quickstart.yaml", quickstart._batch_for(settings, ranks)).batch
    plan = plan_batch(fitted.tokens_per_step, fitted.micro_batch, fitted.sequence_length, ranks)
    assert (
        0.5 <= plan.tokens_per_step / settings.batch.tokens_per_step <= max(1.5, ranks / 8)
    )  # from 8 ranks: one window per rank
    if ranks in (1, 2, 4):
        assert fitted == settings.batch


@pytest.mark.ranks
def test_train_refuses_an_existing_run(four_ranks: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(four_ranks[1] / "run.yaml")]) == exit_codes.MISTAKE
    printed = capsys.readouterr().err
    assert "run test already has checkpoints in " in printed
    assert "the newest is rolling_step_000012: resume it" in printed


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["model.width=64"], "was made with model.width 32 (this run has 64)"),
        (["batch.tokens_per_step=2048"], "was made with batch.tokens_per_step 1024 (this run has 2048)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(four_ranks: Run, extra: list[str], message: str) -> None:
    config = four_ranks[1] / "run.yaml"
    result = run(
        [sys.executable, str(PROJECT / "ds_gpt2" / "train.py"), "--config", str(config), "--resume", "latest", *extra]
    )
    assert result.code == exit_codes.MISTAKE, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output


@pytest.mark.ranks
def test_resume_by_directory_trains_to_the_new_end(four_ranks: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(four_ranks[1], tmp_path / "copy"))
    directories = [f"run.dir={folder / 'runs'}", f"checkpoint.dir={folder / 'checkpoints'}"]
    resume = [sys.executable, "-m", "ds_gpt2", "resume", str(folder / "runs" / "test")]
    result = run([*resume, "--num_gpus=1", "--from", "6", "schedule.steps=8", *directories])
    assert result.code == exit_codes.DONE, result.output
    assert "step 6 of 8" in result.output
    assert "done at step 8 of 8" in result.output


def _shell(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch.sh as cron does: with a minimal environment, from another directory."""
    base = {"PATH": "/usr/bin:/bin", **environment}
    command = [str(PROJECT / "launch.sh"), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=base, capture_output=True, text=True, timeout=60)


def test_launch_sh_works_from_any_directory_with_a_minimal_environment(tmp_path: Path) -> None:
    result = _shell(tmp_path, "--version", DS_GPT2_PYTHON=sys.executable)
    assert (result.returncode, result.stdout) == (0, "ds_gpt2 0.1.0\n"), result.stderr


def test_launch_sh_works_through_a_link_and_in_a_path_with_spaces(tmp_path: Path) -> None:
    project = tmp_path / "a project"
    shutil.copytree(PROJECT / "ds_gpt2", project / "ds_gpt2")
    shutil.copy(PROJECT / "launch.sh", project)
    (tmp_path / "link").symlink_to(project / "launch.sh")
    environment = {"PATH": "/usr/bin:/bin", "DS_GPT2_PYTHON": sys.executable}
    command = [str(tmp_path / "link"), "train", "nothing"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == exit_codes.MISTAKE
    assert result.stderr.startswith("error: config not found: nothing")


def test_launch_sh_works_from_the_parent_of_a_clone(tmp_path: Path) -> None:
    """There ``ds_gpt2`` is the directory of the clone, not the package."""
    shutil.copytree(PROJECT / "ds_gpt2", tmp_path / "ds_gpt2" / "ds_gpt2")
    shutil.copy(PROJECT / "launch.sh", tmp_path / "ds_gpt2")
    environment = {"PATH": "/usr/bin:/bin", "DS_GPT2_PYTHON": sys.executable}
    command = ["ds_gpt2/launch.sh", "--version"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "ds_gpt2 0.1.0\n"), result.stderr


def test_launch_sh_reports_a_missing_python(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("env", "bash", "dirname", "cat", "cksum", "readlink", "rm"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    project = tmp_path / "project"
    shutil.copytree(PROJECT / "ds_gpt2", project / "ds_gpt2")
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(PROJECT / name, project)
    result = subprocess.run(
        [str(project / "launch.sh"), "quickstart"], env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == exit_codes.MISTAKE
    assert result.stderr.startswith("error: no Python 3.10 to 3.13")
    assert not (project / ".venv").exists()


def test_every_setting_is_documented() -> None:
    guide = (PROJECT / "docs" / "settings.md").read_text()
    assert [key for key in known_keys() if f"`{key}`" not in guide] == []


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli._VERBS:
        with pytest.raises(SystemExit) as exited:
            cli.main([verb, "--help"])
        assert exited.value.code == 0
    assert "usage: ./launch.sh quickstart" in capsys.readouterr().out
    assert cli.main(["test"]) == exit_codes.MISTAKE
    capsys.readouterr()
    for arguments in (["quickstart", "--num_gpus", "0"], ["prepare", "sample", "--workers", "-1"]):
        assert cli.main(arguments) == exit_codes.MISTAKE
        printed = capsys.readouterr()
        assert printed.err.startswith("error: argument --") and printed.err.count("\n") == 1 and printed.out == ""


def test_ci_runs_the_tests_only() -> None:
    lines = (PROJECT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set "))]
    assert commands == ['cd "$(dirname "$0")/.."', "exec ./launch.sh test --all"]
    assert "`test --all`" in (PROJECT / "README.md").read_text(encoding="utf-8")
    assert os.access(PROJECT / ".ci" / "run", os.X_OK)


@pytest.mark.ranks
def test_deepspeed_starts_train_py_as_a_file(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """From another directory, with the package not on the module search path."""
    config = write_config(tmp_path, schedule={"steps": 1, "warmup_steps": 0}, monitor={"tensorboard": False})
    result = launch(
        1, "--config", str(config), "checkpoint.every=0", "samples.every=0", "validation.every=0", accelerator=""
    )
    assert result.code == exit_codes.DONE, result.output
    assert "done at step 1 of 1" in result.output


def test_a_closed_pipe_is_not_an_error(dataset_dir: Path) -> None:
    """As with ``| head``."""
    command = [sys.executable, str(PROJECT / "ds_gpt2" / "__main__.py"), "inspect", str(dataset_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == exit_codes.CRASHED


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out is an empty path: give a path"),
        ("$UNSET_HERE/x", "--out=$UNSET_HERE/x: the environment variable $UNSET_HERE is not set"),
        ("~nobody-of-that-name/x", "--out=~nobody-of-that-name/x: "),
    ],
)
@pytest.mark.parametrize("words", [["prepare", "text", "FILE"], ["prepare", "sample"], ["export"], ["report"]])
def test_a_path_that_cannot_be_expanded_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], out: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    words = [str(tmp_path / "a.txt") if word == "FILE" else word for word in words]
    assert cli.main([*words, f"--out={out}"]) == exit_codes.MISTAKE
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_paths_of_arguments_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", "my")
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "$b.txt"):
        (tmp_path / name).write_text("A line of text.\n" * 5000)
    assert cli.main(["prepare", "text", "~/a.txt", "$b.txt", "--out=~/$HERE/data"]) == exit_codes.DONE
    assert open_dataset(tmp_path / "my" / "data").source == "a.txt, $b.txt"
    assert cli.main(["verify", "~/${HERE}/data"]) == cli.main(["inspect", "$HOME/my/data"]) == exit_codes.DONE


@pytest.mark.parametrize(
    "words", [["prepare", "text", "NAME"], ["list", "NAME"], ["inspect", "NAME"], ["eval", "NAME"], ["train", "NAME"]]
)
def test_an_error_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    name = "/tmp/no\nsuch\x1b[31m\x07\u2028file"
    assert cli.main([name if word == "NAME" else word for word in words]) == exit_codes.MISTAKE
    error = capsys.readouterr().err
    assert error.endswith("\n") and error[:-1].isprintable()


def test_an_error_of_the_file_system_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(number: int) -> Callable[[object], int]:
        def run(options: object) -> int:
            raise OSError(number, os.strerror(number), "/some/file\x1b")

        return run

    for number, code in ((errno.ENAMETOOLONG, 2), (errno.EACCES, 2), (errno.EIO, 1), (errno.ENOSPC, 1)):
        monkeypatch.setattr("ds_gpt2.commands.notes.run", fail(number))
        assert cli.main(["notes", "run"]) == code
        assert capsys.readouterr().err == f"error: /some/file\\x1b: {os.strerror(number)}\n"


@pytest.mark.parametrize("verb", ["status", "list", "notes", "report", "tensorboard", "generate", "eval"])
@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/x", "/dev/null/x"])
def test_invalid_names_are_one_line_errors(verb: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, name]) == exit_codes.MISTAKE
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.out == ""


def test_too_many_worker_processes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "text", "file.txt", "--workers", "100000"]) == exit_codes.MISTAKE
    assert "argument --workers: 100000 processes on " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train k.yaml a=b --num_gpus 2 c.d=8 --json", "unknown option --json; see `./launch.sh train --help`"),
        (
            "train k --num_gpu 2 a=b",
            "unknown option --num_gpu (did you mean --num_gpus?); see `./launch.sh train --help`",
        ),
        ("alert k --tst", "unknown option --tst (did you mean --test?); see `./launch.sh alert --help`"),
        (
            "prepare text a --worker=2",
            "unknown option --worker (did you mean --workers?); see `./launch.sh prepare text --help`",
        ),
        (
            "generate --prompt -x",
            "argument --prompt: if its value is -x, write --prompt=-x; see `./launch.sh generate --help`",
        ),
        ("generate --prompt --tokens 5", "argument --prompt: expected one argument; see `./launch.sh generate --help`"),
        ("list a b --json", "unrecognized arguments: b; see `./launch.sh list --help`"),
        ("alerts k", "unknown verb alerts (did you mean alert?); see `./launch.sh --help`"),
        ("prepare txt a", "unknown kind txt (did you mean text?); see `./launch.sh prepare --help`"),
        ("--jsn list", "unknown option --jsn; see `./launch.sh --help`"),
        ("train", "the following arguments are required: CONFIG; see `./launch.sh train --help`"),
        ("notes", "the following arguments are required: RUN; see `./launch.sh notes --help`"),
        ("prepare text", "the following arguments are required: FILE; see `./launch.sh prepare text --help`"),
    ],
)
def test_an_error_in_the_arguments_names_the_argument_and_the_help_of_its_verb(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == exit_codes.MISTAKE
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("verify k --deep best", {"run": "k", "tag": "best", "deep": True}),
        ("verify --deep k best --json", {"run": "k", "tag": "best", "deep": True, "json": True}),
        ("notes k --json neu und -5", {"run": "k", "text": ["neu", "und", "-5"], "json": True}),
        ("notes k --json -- --neu", {"run": "k", "text": ["--neu"], "json": True}),
        ("notes k -", {"run": "k", "text": ["-"]}),
        (
            "train k --num_gpus 2 a=b --auto c=d",
            {"config": "k", "num_gpus": 2, "settings": ["a=b", "c=d"], "auto": True},
        ),
        ("resume --num_gpus=2 a=b", {"run": "a=b", "settings": [], "num_gpus": 2}),
        ("status --watch 5 k", {"runs": ["k"], "watch": 5.0}),
        ("diff a --json b", {"a": "a", "b": "b", "json": True}),
        ("eval a --tag best b --tag 5", {"what": ["a", "b"], "tag": ["best", "5"]}),
        ("drill k --seed -3 a=b", {"config": "k", "settings": ["a=b"], "seed": -3}),
        ("prepare text --workers 2 a --tokens 5 b", {"files": [Path("a"), Path("b")], "workers": 2, "tokens": 5}),
    ],
)
def test_options_may_come_between_other_arguments(line: str, parsed: dict[str, object]) -> None:
    options = vars(cli._parse(line.split()))
    assert {name: options[name] for name in parsed} == parsed


def test_ctrl_c_during_the_first_imports_has_no_traceback() -> None:
    """Python's own handler is replaced before the entry point imports anything but signal."""
    code = (
        "import builtins, runpy, signal, sys\n"
        "def record(name, scope=None, *rest):\n"
        "    if (scope or {}).get('__name__') == 'entry' and signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:\n"
        "        print(name)\n"
        "    return original(name, scope, *rest)\n"
        "original, builtins.__import__ = builtins.__import__, record\n"
        "runpy.run_path(sys.argv[1], run_name='entry')\n"
    )
    command = [sys.executable, "-c", code, str(PROJECT / "ds_gpt2" / "__main__.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "signal\n", "")


def test_the_help_of_resume_lists_every_form_of_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["resume", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--from latest|backup|best|epoch_00003|STEP|before:STEP|TAG|PATH" in printed
    assert "before:STEP: the newest good one before a step" in printed


@pytest.mark.parametrize(
    ("line", "buffered"),
    [
        ("--help", True),
        ("--help", False),
        ("list --help", True),
        ("prepare text --help", True),
        ("prepare text --help", False),
        ("--version", True),
    ],
)
def test_help_that_cannot_be_written_is_an_error(
    line: str, buffered: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        raw = io.BufferedWriter(full) if buffered else full
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=not buffered))
        assert cli.main(line.split()) == exit_codes.CRASHED
        assert capsys.readouterr().err == "error: the output cannot be written: No space left on device\n"
