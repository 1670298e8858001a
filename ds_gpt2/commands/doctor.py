"""``doctor``: check this machine before a run and suggest fixes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator

from ds_gpt2.commands.arguments import add_start_arguments
from ds_gpt2.common.errors import UserError
from ds_gpt2.config import run_location
from ds_gpt2.config.lookup import find_config
from ds_gpt2.config.settings import Settings, parse_overrides
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.launcher import choose_ranks
from ds_gpt2.tools.doctor.checks import checks
from ds_gpt2.tools.doctor.finding import Check, Finding, failure, run_check

WIDTH = 100  # columns

_WORDS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "?"}
_NAME = 17  # columns
_FOUND = 9 + _NAME  # the column at which what was found begins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in ds_configs/")
    add_start_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="only the fast checks, which `train` also runs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    settings = run_location.load(find_config(options.config), parse_overrides(options.settings))
    selected = [check for check in _checks(settings, options.num_gpus) if check.quick or not options.quick]
    if options.json:
        found = [(check.group, row) for check in selected for row in run_check(check)]
        print(json.dumps([{"group": group, **dataclasses.asdict(row)} for group, row in found]))
    else:
        print(f"checks of this machine for the run {settings.run.name}:")
        found = list(_shown(selected))
        print(f"\n{_summary([row for _, row in found])}")
    return exit_codes.MISTAKE if any(row.status == "fail" for _, row in found) else exit_codes.DONE


def _checks(settings: Settings, num_gpus: int | None) -> list[Check]:
    """Return the checks of a run; if its ranks cannot be chosen, that is the first finding and no rank is started."""
    try:
        layout = choose_ranks(settings, num_gpus)
    except UserError as error:
        finding = failure("device", error)
        first = Check("settings", "device", lambda: finding, quick=True)
        return [first, *(check for check in checks(settings, "cuda", num_gpus or 1) if check.group != "ranks")]
    return checks(settings, layout.accelerator, layout.ranks)


def _shown(selected: list[Check]) -> Iterator[tuple[str, Finding]]:
    """Run the checks, print each finding under its group and yield it."""
    group, width = "", min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    for check in selected:
        if check.group != group:
            group = check.group
            print(f"\n{group}", flush=True)
        _wait_line(f"  ...  {check.name}")
        rows = run_check(check)
        _wait_line("")
        for row in rows:
            print("\n".join(lines_of(row, width)), flush=True)
            yield group, row


def lines_of(row: Finding, width: int = WIDTH) -> list[str]:
    """Return the lines of a finding, followed by its fix, at most ``width`` columns wide."""
    head = f"  {_WORDS[row.status]:<5}{row.name:<{_NAME}}"
    head += "  " if len(head) < _FOUND else " "
    indent = " " * _FOUND
    found = _wrapped(row.found, head, indent, width)
    return found + (_wrapped(row.fix, f"{indent}-> ", f"{indent}   ", width) if row.fix else [])


def _wrapped(text: str, first: str, others: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _wait_line(text: str) -> None:
    """Show on a terminal which check runs; the next line replaces it."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def _summary(rows: list[Finding]) -> str:
    counts = Counter[str](row.status for row in rows)
    words = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "not known"}
    found = ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
    if counts["fail"]:
        return f"{found}: not ready; fix the checks marked FAIL, then run the doctor again"
    if counts["warn"]:
        return f"{found}: ready, as far as can be checked; read the warnings"
    return f"{found}: ready, as far as can be checked"
