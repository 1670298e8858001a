"""Compare the peak memory of a rank's tensors with the prediction of ``plan``, for several presets.

    python benchmarks/memory.py --cases 124M:32 350M:16 774M:8 1558M:4 --data data/sample --out FILE       on a GPU
    DS_ACCELERATOR=cpu python benchmarks/memory.py --cases 7M:2 --sequence_length 256 --data data/sample --out FILE

One rank, two micro-batches per step; tensor_peak.py measures the peak. With four ranks, the optimizer's part is a
quarter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.program import make_parser, report_result


def main() -> None:
    parser = make_parser(__doc__, "--data", "--out")
    parser.add_argument("--cases", nargs="+", default=["124M:32"], metavar="PRESET:MICRO_BATCH")
    parser.add_argument("--sequence_length", type=int, default=1024)
    options = parser.parse_args()
    cases = [{"case": case, **_measure(case, options)} for case in options.cases]
    report_result(options.out, {"cases": cases})


def _measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    preset, micro_batch = case.split(":")
    length = options.sequence_length
    settings = {
        "model.preset": preset,
        "batch.micro_batch": micro_batch,
        "batch.sequence_length": length,
        "batch.tokens_per_step": 2 * int(micro_batch) * length,
    }
    program = str(Path(__file__).with_name("tensor_peak.py"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peak.json"
        words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        subprocess.run(
            [sys.executable, program, "--data", str(options.data), "--out", str(out), *words],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {**found, "off": round(found["predicted"] / found["measured"] - 1, 4)}


if __name__ == "__main__":
    main()
