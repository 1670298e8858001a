"""The command line of a rank."""

from __future__ import annotations

import pytest

from ds_gpt2.config.train_arguments import parse


def test_the_help_of_resume_names_each_kind_of_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for source in ("latest", "auto", "backup", "before:STEP", "best", "a step", "an epoch", "a tag", "a path"):
        assert source in text.partition("resume from ")[2], source
