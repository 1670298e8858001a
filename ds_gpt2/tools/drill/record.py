"""What a drill found: rows for a person, and a record that stays with the run."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

WIDTH = 100  # columns

Verdict = Literal["pass", "FAIL", "not done"]

_TEXT = 57  # columns of what was done
_INDENT = " " * 27


@dataclass(frozen=True)
class SceneResult:
    """One scene."""

    name: str
    verdict: Verdict
    text: str
    lost_steps: int | None = None  # done again, or for nothing
    lost_seconds: float | None = None  # from the fault to the first new step


@dataclass
class Record:
    """One drill. It has passed when every scene was done and held."""

    run: str
    ranks: int
    accelerator: str
    whole: bool
    seed: int
    begun: str  # ISO 8601
    command: list[str]
    machine: dict[str, str]
    settings: dict[str, object]  # of the run that was disturbed
    rows: list[SceneResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.verdict == "pass" for row in self.rows)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "passed": self.passed}, indent=1, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """As ``record.json`` for programs and ``drill.md`` for people."""
        (folder / "record.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "drill.md").write_text(_markdown(self), encoding="utf-8")


def head() -> str:
    """Two lines above the rows."""
    return f"{'lost':>95}\n{'':8}  {'scene':15}  {'what was done, and what became of it':{_TEXT}}   steps seconds"


def lines_of(row: SceneResult) -> list[str]:
    """A row as it is printed, nothing wider than ``WIDTH``."""
    texts = textwrap.wrap(row.text, _TEXT, break_on_hyphens=False) or [""]
    first = f"{row.verdict:8}  {row.name:15}  {texts[0]:{_TEXT}}{_lost(row)}".rstrip()
    return [first, *(_INDENT + text for text in texts[1:])]


def summary(record: Record) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in record.rows) for verdict in ("pass", "FAIL", "not done")}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"{told or 'nothing was done'}, {record.seconds:.0f} s"


def _lost(row: SceneResult) -> str:
    if row.lost_steps is None or row.lost_seconds is None:
        return ""
    return f"{row.lost_steps:8}{row.lost_seconds:8.1f}"


def _markdown(record: Record) -> str:
    size = "whole" if record.whole else "shrunk"
    lines = [
        f"# Drill of {record.run}, {record.begun}",
        "",
        f"{'Passed' if record.passed else 'Not passed'}: {summary(record)}. Config {size}, {record.ranks} ranks on"
        f" {record.accelerator}, seed {record.seed}.",
        "",
        "| | scene | what was done, and what became of it | steps lost | seconds lost |",
        "|---|---|---|---:|---:|",
    ]
    for row in record.rows:
        steps = "" if row.lost_steps is None else str(row.lost_steps)
        seconds = "" if row.lost_seconds is None else f"{row.lost_seconds:.1f}"
        lines.append(f"| {row.verdict} | {row.name} | {row.text.replace('|', '/')} | {steps} | {seconds} |")
    return "\n".join(lines) + "\n"
