import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import check_writable, lock, replace_file


def test_check_writable_creates_the_directory_or_raises_an_error(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/below"):
        check_writable(tmp_path / "file" / "below")


def test_a_process_holds_a_lock_until_it_ends(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib, time; from ds_gpt2.common.files import lock; held = lock(pathlib.Path(sys.argv[1]), 'it')"
    )
    command = [sys.executable, "-c", f"{hold}; print(flush=True); time.sleep(60)", str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    with pytest.raises(UserError, match=rf"run x is in use by process {holder.pid} on .*: wait for its end"):
        lock(tmp_path / "lock", "run x")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with lock(tmp_path / "lock", "run x"), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock(tmp_path / "lock", "run x")
    lock(tmp_path / "lock", "run x").close()


def test_a_lock_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"cannot lock .*: Is a directory"):
        lock(tmp_path / "lock", "run x")


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("old")
    with file.open() as reader:
        replace_file(file, "new")
        assert (reader.read(), file.read_text()) == ("old", "new")

    def fail(source: Path, target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(file, "newer")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "new")]
