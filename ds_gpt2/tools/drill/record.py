"""The results of a drill: rows to print, and the record in the run's directory."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

WIDTH = 100  # columns

Verdict = Literal["pass", "FAIL", "not done"]

_TEXT = 57  # columns of the description
_INDENT = " " * 27


@dataclass(frozen=True)
class SceneResult:
    """The result of one scene."""

    name: str
    verdict: Verdict
    text: str
    lost_steps: int | None = None  # steps that were repeated or without effect
    lost_seconds: float | None = None  # from the fault to the first new step


@dataclass
class Record:
    """The record of one drill. It has passed if every scene was possible and passed."""

    run: str
    ranks: int
    accelerator: str
    whole: bool
    seed: int
    started: str  # start time, ISO 8601
    command: list[str]
    machine: dict[str, str]
    settings: dict[str, object]  # of the disturbed run
    rows: list[SceneResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.verdict == "pass" for row in self.rows)

    def to_json(self) -> str:
        return (
            json.dumps({**asdict(self), "begun": self.started, "passed": self.passed}, indent=1, ensure_ascii=False)
            + "\n"
        )

    def write(self, folder: Path) -> None:
        """Write ``record.json`` for programs and ``drill.md`` for readers."""
        (folder / "record.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "drill.md").write_text(_markdown(self), encoding="utf-8")


def header() -> str:
    """Return the two header lines of the printed rows."""
    return f"{'lost':>95}\n{'':8}  {'scene':15}  {'fault and result':{_TEXT}}   steps seconds"


def lines_of(row: SceneResult) -> list[str]:
    """Return a row as it is printed, in lines of at most ``WIDTH`` columns."""
    texts = textwrap.wrap(row.text, _TEXT, break_on_hyphens=False) or [""]
    first = f"{row.verdict:8}  {row.name:15}  {texts[0]:{_TEXT}}{_lost(row)}".rstrip()
    return [first, *(_INDENT + text for text in texts[1:])]


def summary(record: Record) -> str:
    """Return the number of scenes by verdict, and the duration."""
    counts = {verdict: sum(row.verdict == verdict for row in record.rows) for verdict in ("pass", "FAIL", "not done")}
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"{verdicts or 'no scene'}, {record.seconds:.0f} s"


def _lost(row: SceneResult) -> str:
    if row.lost_steps is None or row.lost_seconds is None:
        return ""
    return f"{row.lost_steps:8}{row.lost_seconds:8.1f}"


def _markdown(record: Record) -> str:
    size = "whole" if record.whole else "scaled down"
    lines = [
        f"# Drill of {record.run}, {record.started}",
        "",
        f"{'Passed' if record.passed else 'Not passed'}: {summary(record)}. Config {size}, {record.ranks} ranks on"
        f" {record.accelerator}, seed {record.seed}.",
        "",
        "| | scene | fault and result | steps lost | seconds lost |",
        "|---|---|---|---:|---:|",
    ]
    for row in record.rows:
        steps = "" if row.lost_steps is None else str(row.lost_steps)
        seconds = "" if row.lost_seconds is None else f"{row.lost_seconds:.1f}"
        lines.append(f"| {row.verdict} | {row.name} | {row.text.replace('|', '/')} | {steps} | {seconds} |")
    return "\n".join(lines) + "\n"
