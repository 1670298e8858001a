"""What is compared between machines that no supervisor has compared; ``test_torchrun_hosts`` has real machines."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_gpt2.common import installation, shared_directory
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import Settings, load_settings
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir.stop_request import supervisor_environment
from ds_gpt2.training import machines
from ds_gpt2.training.machines import check_machines, problem_of


@pytest.fixture
def settings(write_config: Callable[..., Path], tmp_path: Path) -> Settings:
    return load_settings(write_config(tmp_path))


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes this process one of two ranks on two machines."""

    def become(rank: int, other: Callable[[Any], Any] = lambda value: value) -> None:
        """
        Args:
            other: from a value that this rank contributes to that of the other rank.
        """
        for name, value in {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(
            collectives, "gather_objects", lambda mine: [mine, other(mine)] if rank == 0 else [other(mine), mine]
        )

    return become


def _refuse() -> None:
    raise UserError("no data")


def test_a_problem_of_one_machine_is_reported_after_the_ranks_have_met(
    two_machines: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no data"):
        problem_of(_refuse)
    two_machines(1)
    assert problem_of(_refuse) == "no data"
    assert problem_of(lambda: None) is None
    for name, value in supervisor_environment().items():  # the supervisor has compared the machines
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="no data"):
        problem_of(_refuse)


def test_equal_machines_pass_and_nothing_is_left(
    settings: Settings, two_machines: Callable[..., None], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    two_machines(0)
    check_machines(settings, None)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("what", ["Python", "torch", "deepspeed", "the code of ds_gpt2", "the data"])
def test_a_difference_is_named(settings: Settings, two_machines: Callable[..., None], what: str) -> None:
    def other(value: Any) -> Any:
        if isinstance(value, dict) and what in value:
            return value | {what: "another"}
        return "node2" if isinstance(value, str) else value

    two_machines(0, other)
    with pytest.raises(UserError, match=rf"^{what}: \S+ on \S+, another on node2: make them equal$"):
        check_machines(settings, None)


@pytest.mark.parametrize("is_missing_here", [True, False])
def test_what_only_one_machine_describes_is_a_difference(
    settings: Settings, two_machines: Callable[..., None], monkeypatch: pytest.MonkeyPatch, is_missing_here: bool
) -> None:
    mine = installation.describe()
    more = {**mine, "apex": "1.0"}
    first, second = (mine, more) if is_missing_here else (more, mine)

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return second
        return "node2" if isinstance(value, str) else value

    two_machines(0, other)
    monkeypatch.setattr(installation, "describe", lambda: first)
    expected = r"missing on \S+, 1\.0 on node2" if is_missing_here else r"1\.0 on \S+, missing on node2"
    with pytest.raises(UserError, match=rf"^apex: {expected}: make them equal$"):
        check_machines(settings, None)


@pytest.mark.parametrize("which", ["run_dir", "checkpoint_dir"])
def test_a_directory_that_is_not_shared_is_named(
    settings: Settings, two_machines: Callable[..., None], monkeypatch: pytest.MonkeyPatch, which: str, tmp_path: Path
) -> None:
    """Rank 0 has marked both directories, one of them on its own disk."""
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    marked = {str(getattr(settings, name)): str(here) for name in ("run_dir", "checkpoint_dir")}
    marked[str(getattr(settings, which))] = str(elsewhere)
    shared_directory.mark([str(here)], "nonce")

    two_machines(1, lambda value: "node1" if isinstance(value, str) else value)
    monkeypatch.setattr(collectives, "raise_on_all_ranks", _raise)
    monkeypatch.setattr(collectives, "broadcast_from_main", lambda action: ("nonce", marked))
    monkeypatch.setattr(machines, "has_marks", lambda where, names: shared_directory.has_marks(where, names, 0))
    message = rf"^{getattr(settings, which)} is not the same directory on node1 and \S+: mount a shared file system"
    with pytest.raises(UserError, match=message):
        check_machines(settings, None)


def _raise(problem: str | None) -> None:
    if problem is not None:
        raise UserError(problem)


def test_a_full_disk_is_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run resumes on a full disk, where it deletes old checkpoints."""
    full, other = str(tmp_path / "full"), str(tmp_path / "other")

    def mark(directories: list[str], name: str) -> list[str]:
        if directories == [full]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return shared_directory.mark(directories, name)

    monkeypatch.setattr(machines, "mark", mark)
    assert machines._mark([full, other], "nonce") == {other: str(tmp_path)}
    monkeypatch.setattr(machines, "mark", shared_directory.mark)
    with pytest.raises(UserError, match=r"^cannot write to /proc/self/run: "):
        machines._mark(["/proc/self/run"], "nonce")
