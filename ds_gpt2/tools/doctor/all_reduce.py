"""One rank of the doctor's round trip: join the others as training does, sum numbers with them, write down how long.

Started by DeepSpeed's launcher: ``all_reduce.py FOLDER``. Each rank leaves ``FOLDER/rank_N.json``, renewed as it gets
further, so that it can be told from outside where it hangs, and ``FOLDER/output_N`` with whatever its libraries say.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.own_modules import ignore_working_directory

    ignore_working_directory()

import torch

from ds_gpt2.common.files import replace_file
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_report

SIZES = (4, 1 << 20, 16 << 20)  # bytes of fp32; the first tells the latency
_SECONDS = 0.5  # at most, for each size
_REPEATS = 20  # at most


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    folder = parser.parse_args().folder
    record = folder / f"rank_{collectives.rank()}.json"
    with (folder / f"output_{collectives.rank()}").open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    try:
        _write(record, {"phase": "importing"})
        place = device.choose("auto")
        from ds_gpt2.engine.process_group import (
            close_process_group,
            open_process_group,
        )  # only now: it imports DeepSpeed

        _write(record, {"phase": "joining"})
        open_process_group(place)
        _write(record, {"phase": "summing"})
        seconds, right = measure(place)
        close_process_group()
    except Exception as error:
        _write(record, {"phase": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        return exit_report.CRASHED
    _write(record, {"phase": "done", "seconds": seconds, "right": right})
    return exit_report.DONE


def measure(place: torch.device) -> tuple[dict[int, float], bool]:
    """Median seconds of an all-reduce by its size in bytes, and whether every sum was right. Every rank calls this."""
    expected = sum(range(1, collectives.world_size() + 1))
    seconds, right = {}, True
    for size in SIZES:
        values = torch.empty(size // 4, device=place)
        times: list[float] = []
        repeats = _REPEATS
        while len(times) < repeats:
            values.fill_(collectives.rank() + 1)
            _wait_for(place)
            begun = time.perf_counter()
            collectives.sum_over_ranks(values)
            _wait_for(place)
            times.append(time.perf_counter() - begun)
            right &= bool((values == expected).all())
            if len(times) == 2:  # the first has opened connections; all ranks agree how many there is time for
                slowest = float(collectives.max_over_ranks(torch.tensor(times[1], device=place)))
                repeats = max(2, min(_REPEATS, int(_SECONDS / max(slowest, 1e-6))))
        seconds[size] = statistics.median(times[1:])
    return seconds, right


def _write(file: Path, record: dict[str, Any]) -> None:
    replace_file(file, json.dumps(record))


def _wait_for(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


if __name__ == "__main__":
    exit_report.end_process(main())
