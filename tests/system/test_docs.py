"""README and docs/: links, anchors, and the list of commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launched import PROJECT

from ds_gpt2 import cli
from ds_gpt2.commands import tensorboard
from ds_gpt2.tools.tensorboard import server

_BENCHMARKS, _DEPLOY = PROJECT / "benchmarks", PROJECT / "deploy"
PAGES = sorted(
    [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *_BENCHMARKS.rglob("*.md"), *_DEPLOY.glob("*.md")],
    key=lambda page: page.as_posix(),
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in _anchors(target))):
            broken.append(link)
    assert broken == []


def test_readme_has_the_summary_of_every_command() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^    \./launch\.sh (\w+) .*?  +(.*)$", readme, re.MULTILINE))
    missing = [name for name, verb in cli._VERBS.items() if name not in commands or verb.summary not in readme]
    assert missing == ["quickstart"]  # described in a section of its own


def test_monitoring_quotes_what_tensorboard_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TMUX", raising=False)
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.2 50000 10.0.0.1 22")
    monkeypatch.setattr(server, "_user", lambda: "me")
    tensorboard._print_instructions(Path("/home/me/ds_gpt2/runs/mine"), 6006, "mine", False, True)
    quoted = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert quoted in (PROJECT / "docs" / "monitoring.md").read_text(encoding="utf-8")


def _anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
