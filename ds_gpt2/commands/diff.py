"""``diff``: compare the settings, losses and final metrics of two runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from ds_gpt2.common.formatting import MISSING, fixed, signed, table, tokens, truncated
from ds_gpt2.config.lookup import find_run
from ds_gpt2.monitoring.pace import RECENT_LABEL
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.report.diff import Pair, final_metrics, losses_at_equal_tokens, settings_that_differ
from ds_gpt2.tools.report.run import load_run

_LABELS = {name: f"{name}, {RECENT_LABEL}" for name in ("train/loss", "perf/tokens_per_s")}
_MAX_WIDTH = 40  # characters of a setting's value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="RUN_A", help="a run's name or directory")
    parser.add_argument("b", metavar="RUN_B", help="the run to compare with it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    a, b = (load_run(find_run(name)) for name in (options.a, options.b))
    settings = settings_that_differ(a.settings, b.settings)
    losses, reached = losses_at_equal_tokens(a, b), final_metrics(a, b)
    if options.json:
        metrics = {name: asdict(pair) for name, pair in reached.items()}
        content = {
            "runs": [a.name, b.name],
            "forked_from": [None if run.fork is None else asdict(run.fork) for run in (a, b)],
            "settings": {name: list(values) for name, values in settings.items()},
            "losses": [asdict(each) for each in losses],
            "final_metrics": metrics,
            "ends": metrics,  # the key of earlier versions
        }
        print(json.dumps(content, indent=1))
        return exit_codes.DONE
    names = [a.name, b.name]
    for each in (a, b):
        if each.fork is not None:
            print(f"{each.name} is forked from {each.fork.lineage}\n")
    if settings:
        rows = [[name, *(truncated(str(value), _MAX_WIDTH) for value in values)] for name, values in settings.items()]
        _print("settings that differ", ["", *names], rows)
    else:
        print("all settings are the same\n")
    if losses:
        head = ["tokens", *(f"{kind} {name}" for kind in ("train", "val") for name in (*names, "difference"))]
        rows = [[tokens(each.tokens), *_cells(each.training), *_cells(each.validation)] for each in losses]
        _print(f"losses at equal tokens (train: {RECENT_LABEL}; val: measured at that point)", head, rows)
    rows = [[_LABELS.get(name, name), *_cells(pair)] for name, pair in reached.items()]
    _print("latest metrics", ["", *names, "difference"], rows)
    return exit_codes.DONE


def _print(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"{title}\n{table([head, *rows], indent='  ')}\n")


def _cells(pair: Pair) -> list[str]:
    known = [value for value in (pair.a, pair.b) if value is not None]
    is_whole = any(abs(value) >= 1000 for value in known) or all(value.is_integer() for value in known)
    digits = 0 if is_whole else 4
    difference = MISSING if pair.difference is None else signed(pair.difference, digits)
    return [fixed(pair.a, digits), fixed(pair.b, digits), difference]
