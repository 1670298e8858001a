"""``report``: write the report of one or several runs as one HTML file that needs no network."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path

from ds_gpt2.commands.arguments import path, positive_float
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only, replace_file
from ds_gpt2.common.formatting import DAY, HOUR
from ds_gpt2.config.lookup import find_run
from ds_gpt2.config.settings import PROJECT_DIR, RUNS
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.report.charts import charts_of, views_of
from ds_gpt2.tools.report.page import RunSection, render
from ds_gpt2.tools.report.run import load_run
from ds_gpt2.tools.report.summary import Summary, summarize
from ds_gpt2.tools.resources.prices import Prices

_SECONDS = {"m": 60, "h": HOUR, "d": DAY}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names or directories of runs (default: the newest run)")
    parser.add_argument("--since", metavar="TIME", help="report the last 90m, 24h or 7d only")
    parser.add_argument(
        "--out",
        type=path("--out"),
        metavar="FILE",
        help="default: runs/RUN/report.html; for several runs: runs/report.html",
    )
    parser.add_argument("--reference", action="store_true", help="show the loss of llm.c for any run")
    parser.add_argument(
        "--watts",
        type=positive_float("--watts"),
        metavar="W",
        help="power of the machine (default: recorded power of its GPUs)",
    )
    parser.add_argument("--price-per-kwh", type=positive_float("--price-per-kwh"), metavar="P", help="price of energy")
    parser.add_argument(
        "--price-per-hour", type=positive_float("--price-per-hour"), metavar="P", help="price of the machine"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of writing a file")


def run(options: argparse.Namespace) -> int:
    prices = Prices(options.watts, options.price_per_kwh, options.price_per_hour)
    seconds = None if options.since is None else parse_span(options.since)
    directories = [find_run(name) for name in dict.fromkeys(options.runs) or [None]]
    runs = [load_run(directory) for directory in directories]
    now = time.time()
    summaries = [summarize(each, now, prices, seconds) for each in runs]
    if prices.per_kwh is not None:
        _check_power_known(summaries)
    if options.json:
        print(json.dumps([dataclasses.asdict(summary) for summary in summaries]))
        return exit_codes.DONE
    if seconds is not None:
        runs = [each.since(now - seconds) for each in runs]
    views = views_of([(each.name, each.settings, each.records) for each in runs])
    parts = [RunSection(each, summary) for each, summary in zip(runs, summaries, strict=True)]
    out = options.out or _default_out(directories)
    _write(out, render(parts, charts_of(views, options.reference), now))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, opens in any browser without a network")
    return exit_codes.DONE


def parse_span(text: str) -> float:
    """Return ``90m``, ``24h`` or ``7d`` in seconds.

    Raises:
        UserError: ``text`` has another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text, re.ASCII)
    if not found or float(found[1]) == 0:
        raise UserError(f"--since {text}: must be minutes, hours or days, such as 90m, 24h or 7d")
    return float(found[1]) * _SECONDS[found[2]]


def _check_power_known(summaries: list[Summary]) -> None:
    for summary in summaries:
        if summary.seconds_left is not None and (summary.cost is None or summary.cost.watts is None):
            raise UserError(f"--price-per-kwh: run {summary.run} has no recorded power; set --watts as well")


def _default_out(directories: list[Path]) -> Path:
    return (directories[0] if len(directories) == 1 else PROJECT_DIR / RUNS) / "report.html"


def _write(file: Path, page: str) -> None:
    """Write the report, also over an earlier one.

    Raises:
        UserError: ``file`` cannot be written, or exists and is not a report.
    """
    try:
        if file.exists() and not _is_report(file):
            raise UserError(f"{file} exists and is not a report: set another --out FILE, or delete it")
        replace_file(file, page)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; set another --out FILE") from None


def _is_report(file: Path) -> bool:
    with open(file, "rb", opener=regular_only) as opened:
        beginning = opened.read(1000)
    return beginning.startswith(b"<!DOCTYPE html>") and b'<meta http-equiv="Content-Security-Policy"' in beginning
