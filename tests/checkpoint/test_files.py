from pathlib import Path

import pytest

from ds_gpt2.checkpoint import files
from ds_gpt2.errors import UserError


def _partial(directory: Path, tag: str, content: str = "x") -> None:
    (directory / f"{tag}.tmp").mkdir()
    (directory / f"{tag}.tmp" / "state.pt").write_text(content)


def test_a_commit_appears_whole_and_latest_follows(tmp_path: Path) -> None:
    for step in (5, 10):
        _partial(tmp_path, files.rolling_tag(step))
        files.commit(tmp_path, files.rolling_tag(step), {"step": step})
    assert files.committed_tags(tmp_path) == ["rolling_step_000005", "rolling_step_000010"]
    assert files.read_latest(tmp_path) == "rolling_step_000010"
    assert files.read_manifest(tmp_path, "rolling_step_000010") == {"step": 10}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_step_saved_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        _partial(tmp_path, "rolling_step_000005", content)
        files.commit(tmp_path, "rolling_step_000005", {})
    assert (tmp_path / "rolling_step_000005" / "state.pt").read_text() == "new"


def test_what_was_not_committed_is_no_checkpoint(tmp_path: Path) -> None:
    _partial(tmp_path, "rolling_step_000005")
    (tmp_path / "rolling_step_000006").mkdir()  # a deletion that was cut short: no manifest
    (tmp_path / "something_else").mkdir()
    assert files.committed_tags(tmp_path) == []
    assert files.committed_tags(tmp_path / "nowhere") == []
    assert files.read_latest(tmp_path) is None


def test_tags_are_ordered_by_step_not_by_letters(tmp_path: Path) -> None:
    for step in (1_000_000, 20, 999_999):
        _partial(tmp_path, files.rolling_tag(step))
        files.commit(tmp_path, files.rolling_tag(step), {})
    assert files.committed_tags(tmp_path) == [files.rolling_tag(step) for step in (20, 999_999, 1_000_000)]


def test_a_missing_or_damaged_manifest_is_the_users_to_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint 'best' in"):
        files.read_manifest(tmp_path, "best")
    _partial(tmp_path, "rolling_step_000005")
    files.commit(tmp_path, "rolling_step_000005", {})
    with pytest.raises(UserError, match=r"newest there: rolling_step_000005"):
        files.read_manifest(tmp_path, "rolling_step_000006")
    (tmp_path / "rolling_step_000005" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        files.read_manifest(tmp_path, "rolling_step_000005")


def test_a_pointer_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"latest cannot be read"):
        files.read_latest(tmp_path)


def test_a_directory_is_made_or_its_refusal_told(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/below"):
        files.check_writable(tmp_path / "file" / "below")
