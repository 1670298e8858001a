"""``doctor``: check this machine, or several, before a run and suggest fixes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from ds_gpt2.commands.arguments import add_hostfile_argument, add_start_arguments, positive, with_hostfile
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.config import run_location
from ds_gpt2.config.lookup import find_config
from ds_gpt2.config.settings import Settings, parse_overrides
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.cluster.hostfile import Host
from ds_gpt2.supervision.cluster.setup import cluster_of, hosts_of
from ds_gpt2.supervision.launcher import choose_ranks
from ds_gpt2.tools.doctor.checks import checks
from ds_gpt2.tools.doctor.finding import Check, Finding, Row, failure, run_check
from ds_gpt2.tools.doctor.hosts import host_rows

WIDTH = 100  # columns

_WORDS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "?"}
_NAME = 17  # columns
_FOUND = 9 + _NAME  # the column at which what was found begins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one in ds_configs/")
    add_start_arguments(parser)
    add_hostfile_argument(parser)
    parser.add_argument("--quick", action="store_true", help="only the fast checks, which `train` also runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    # The doctor of several hosts runs a doctor on each: ranks on all of them.
    parser.add_argument("--world_size", type=positive, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)  # so that no rank is left
    config = find_config(options.config)
    overrides = with_hostfile(parse_overrides(options.settings), options.hostfile)
    settings = run_location.load(config, overrides)
    hosts = hosts_of(settings, options.num_gpus)
    where = counted(len(hosts), "host") if hosts else "this machine"
    if not options.json:
        print(f"checks of {where} for the run {settings.run.name}:")
    if hosts:
        words = [str(config.absolute()), *(f"{key}={value}" for key, value in overrides.items())]
        rows = _rows_of_hosts(settings, hosts, words, options)
    else:
        rows = _rows_of_machine(settings, options)
    found = list(rows if options.json else _shown(rows))
    if options.json:
        print(json.dumps([_values(row, bool(hosts)) for row in found]))
    else:
        print(f"\n{_summary([row.finding for row in found])}")
    return exit_codes.MISTAKE if any(row.finding.status == "fail" for row in found) else exit_codes.DONE


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _values(row: Row, has_hosts: bool) -> dict[str, Any]:
    """Return a row for JSON."""
    host = {"host": row.host} if has_hosts else {}
    return {**host, "group": row.group, **dataclasses.asdict(row.finding)}


def _rows_of_hosts(
    settings: Settings, hosts: Sequence[Host], words: Sequence[str], options: argparse.Namespace
) -> Iterator[Row]:
    """Check the hosts; yield the findings.

    Args:
        words: the settings file and the overrides.
    """
    with cluster_of(settings, hosts, ("--config", *words)) as cluster:
        yield from host_rows(cluster, words, options.quick, _ignore if options.json else _show_wait)


def _rows_of_machine(settings: Settings, options: argparse.Namespace) -> Iterator[Row]:
    """Run the checks of this machine; yield their findings."""
    for check in _checks(settings, options.num_gpus, options.world_size):
        if check.quick or not options.quick:
            if not options.json:
                _show_wait(check.name)
            yield from (Row(check.group, finding) for finding in run_check(check))


def _checks(settings: Settings, num_gpus: int | None, world_size: int | None) -> list[Check]:
    """Return the checks of a run; if its ranks cannot be chosen, that is the first finding and no rank is started."""
    try:
        layout = choose_ranks(settings, num_gpus)
    except UserError as error:
        finding = failure("device", error)
        first = Check("settings", "device", lambda: finding, quick=True)
        others = checks(settings, "cuda", num_gpus or 1, world_size)
        return [first, *(check for check in others if check.group != "ranks")]
    return checks(settings, layout.accelerator, layout.ranks, world_size)


def _shown(rows: Iterable[Row]) -> Iterator[Row]:
    """Print each finding under its host and group, and yield it."""
    heading, width = "", min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    for row in rows:
        _clear_wait()
        if (own := f"{row.host}: {row.group}" if row.host is not None else row.group) != heading:
            heading = own
            print(f"\n{heading}", flush=True)
        print("\n".join(lines_of(row.finding, width)), flush=True)
        yield row
    _clear_wait()


def lines_of(row: Finding, width: int = WIDTH) -> list[str]:
    """Return the lines of a finding, followed by its fix, at most ``width`` columns wide."""
    head = f"  {_WORDS[row.status]:<5}{row.name:<{_NAME}}"
    head += "  " if len(head) < _FOUND else " "
    indent = " " * _FOUND
    found = _wrapped(row.found, head, indent, width)
    return found + (_wrapped(row.fix, f"{indent}-> ", f"{indent}   ", width) if row.fix else [])


def _wrapped(text: str, first: str, others: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _show_wait(what: str) -> None:
    """Show on a terminal what is being checked; the next line replaces it."""
    _clear_wait()
    if sys.stdout.isatty():
        print(f"  ...  {what}", end="", flush=True)


def _clear_wait() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


def _ignore(what: str) -> None:
    """Show nothing: the output is JSON."""


def _summary(rows: list[Finding]) -> str:
    counts = Counter[str](row.status for row in rows)
    words = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "not known"}
    found = ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
    if counts["fail"]:
        return f"{found}: not ready; fix the checks marked FAIL, then run the doctor again"
    if counts["warn"]:
        return f"{found}: ready, as far as can be checked; read the warnings"
    return f"{found}: ready, as far as can be checked"
