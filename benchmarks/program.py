"""What the programs have in common: the parser of their options, and the file with their results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path


def make_parser(description: str | None, *paths: str, launched: bool = False) -> argparse.ArgumentParser:
    """Return a parser that prints ``description`` as it is.

    Args:
        paths: names of required options that are paths.
        launched: whether DeepSpeed's launcher starts the program; the launcher adds an option.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in paths:
        parser.add_argument(name, type=Path, required=True)
    if launched:
        parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def report_result(out: Path | None, result: Mapping[str, object], *not_printed: str) -> None:
    """Print ``result``, the machine and the command as JSON, without the keys ``not_printed``; write all to ``out``."""
    from benchmarks import machine  # imports DeepSpeed, which must not be imported before torch.compile is set up

    complete = {"machine": machine.describe(), "command": " ".join(sys.argv), **result}
    if out is not None:
        out.write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")
    printed = {name: value for name, value in complete.items() if name not in not_printed}
    print(json.dumps(printed, indent=1), flush=True)
