from __future__ import annotations

import pytest

from ds_gpt2.checkpoint import naming


@pytest.mark.parametrize(
    ("tag", "role"),
    [
        (naming.rolling_tag(250), "rolling"),
        (naming.rolling_tag(12_345_678), "rolling"),
        (naming.epoch_tag(3), "epoch"),
        (naming.superseded_tag(250), "superseded"),
        (naming.BEST_TAG, "best"),
    ],
)
def test_the_role_follows_from_the_tag(tag: str, role: str) -> None:
    assert naming.role_of(tag) == role


def test_the_names_of_files_and_tags_are_unchanged() -> None:
    assert (naming.rolling_tag(250), naming.epoch_tag(3)) == ("rolling_step_000250", "epoch_00003")
    assert (naming.LATEST, naming.LATEST_BACKUP, naming.BEST_TAG) == ("latest", "latest_backup", "best_model")


@pytest.mark.parametrize(
    "name",
    [
        naming.rolling_tag(250) + naming.PARTIAL,
        naming.rolling_tag(250) + "\n",
        " " + naming.rolling_tag(250),
        "rolling_step_250",
        "rolling_step_-00250",
        "Rolling_step_000250",
        "epoch_1",
        "best_model_2",
        naming.LATEST,
        "global_step250",
        "",
    ],
)
def test_other_names_have_no_role(name: str) -> None:
    assert naming.role_of(name) is None


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "rolling_step_000250", "a", "0", "a..b"])
def test_plain_names(name: str) -> None:
    assert naming.is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd", "a\\b", "a b", "a\n", "a\0", "~", "-rf", "ä", "$HOME"],
)
def test_names_that_could_leave_the_directory_are_not_plain(name: str) -> None:
    assert not naming.is_plain_name(name)
