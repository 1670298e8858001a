"""``launch.sh``: other shells, closed file descriptors, and a moved virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launched import PROJECT

ENVIRONMENT = {**os.environ, "DS_GPT2_PYTHON": sys.executable}


def shell(command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], env=environment or ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("started_by", ["sh", "dash", "bash", "bash --posix"])
def test_any_shell_can_start_it(started_by: str) -> None:
    result = shell(f"{started_by} '{PROJECT}/launch.sh' --version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("ds_gpt2 ")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_is_not_an_error(closed: str) -> None:
    assert shell(f"'{PROJECT}/launch.sh' --version {closed}").returncode == 0


def test_python_files_of_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("venv", "random", "typing", "argparse", "types", "warnings", "contextlib", "torch", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    assert shell(f"cd '{tmp_path}' && '{PROJECT}/launch.sh' --version").returncode == 0


def test_the_environment_of_a_moved_project_is_adapted_without_installing(tmp_path: Path) -> None:
    project = tmp_path / "one"
    (project / "ds_gpt2").mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(PROJECT / name, project / name)
    shutil.copytree(PROJECT / "ds_gpt2", project / "ds_gpt2", dirs_exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    script = project / ".venv" / "bin" / "deepspeed"
    script.write_text(f"#!{project}/.venv/bin/python\nprint('started')\n")
    script.chmod(0o755)
    stamp = shell(f"cd '{project}' && cat pyproject.toml ds_gpt2/assets/constraints.txt | cksum").stdout
    (project / ".venv" / ".installed-base").write_text(stamp)
    (project / ".venv" / ".made-in").write_text(f"{project}\n")
    moved = tmp_path / "two"
    os.rename(project, moved)
    without = {name: value for name, value in os.environ.items() if name != "DS_GPT2_PYTHON"}
    result = shell(f"'{moved}/launch.sh' --version", without)
    assert (result.returncode, result.stderr) == (0, "")
    assert "installing" not in result.stdout
    assert subprocess.run([moved / ".venv" / "bin" / "deepspeed"], capture_output=True, text=True).stdout == "started\n"


@pytest.mark.parametrize("python", ["/no/such/python", "/tmp", "/etc/passwd", "false", "true", "a b", "/bin/ls"])
def test_an_invalid_interpreter_is_a_one_line_error(python: str) -> None:
    result = shell(f"'{PROJECT}/launch.sh' --version", {**os.environ, "DS_GPT2_PYTHON": python})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: DS_GPT2_PYTHON={python} is not Python 3.10 or newer: set it to such an interpreter, or unset it\n"
    )


def test_missing_libraries_of_an_interpreter_are_listed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    result = shell(f"'{PROJECT}/launch.sh' --version", {**os.environ, "DS_GPT2_PYTHON": str(python)})
    assert result.returncode == 2 and "lacks torch, deepspeed, pydantic, psutil: " in result.stderr
    assert result.stderr.count("\n") == 1
