"""Files of a run that are missing or unusable."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from doctor_helpers import unprivileged

from ds_gpt2.common.errors import UserError
from ds_gpt2.run_dir.file_checks import check_files, metrics_problem, read_error
from ds_gpt2.run_dir.fork_record import Fork, write_fork
from ds_gpt2.run_dir.last_step import last_step


def test_a_new_run_and_usable_files_pass(tmp_path: Path) -> None:
    check_files(tmp_path / "new")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "journal.jsonl").symlink_to(tmp_path / "gone")  # a start replaces it
    check_files(tmp_path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "starts.jsonl")
    with pytest.raises(UserError, match=r"starts\.jsonl is not a regular file: move it away, or restore"):
        check_files(tmp_path)


@pytest.mark.parametrize("error", [IsADirectoryError(21, "Is a directory", "/r/x"), OSError(5, "I/O error")])
def test_the_fix_depends_on_the_error(error: OSError) -> None:
    fix = "move it away, or restore the file from a copy of the run" if error.errno == 21 else "check its permissions"
    text = str(read_error(error, Path("/r")))
    assert text.startswith(f"{error.filename or '/r'} cannot be read: {error.strerror}; {fix}")


def test_only_a_saved_run_needs_metrics(tmp_path: Path) -> None:
    assert metrics_problem(tmp_path, recorded=0, saved=-1) is None
    assert metrics_problem(tmp_path, recorded=5, saved=5) is None
    problem = metrics_problem(tmp_path, recorded=0, saved=5)
    assert problem == f"{tmp_path / 'metrics.jsonl'} is missing: the losses up to step 5 are unknown"


def test_a_fork_needs_no_metrics_of_its_parent(tmp_path: Path) -> None:
    write_fork(tmp_path, Fork("base", "/base", "rolling_step_000005", 5, ""))
    assert metrics_problem(tmp_path, recorded=0, saved=5) is None
    assert metrics_problem(tmp_path, recorded=0, saved=6) is not None


def test_the_last_step_is_the_newest_that_any_source_has() -> None:
    assert (last_step(0, None, -1), last_step(7, None, 5), last_step(0, None, 35)) == (0, 7, 35)


def test_files_without_permissions_are_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        file = Path(name) / "metrics.jsonl"
        file.touch(mode=0o400)
        with unprivileged(), pytest.raises(UserError, match=r"metrics\.jsonl cannot be read and written: Permission"):
            check_files(Path(name))
