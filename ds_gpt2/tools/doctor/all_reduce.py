"""One rank of the doctor's check of the ranks: join the process group as training does, and time all-reduces.

DeepSpeed's launcher starts it: ``all_reduce.py FOLDER``. Each rank writes ``FOLDER/rank_N.json`` at the start of each
phase, so that the doctor knows where a rank hangs, and ``FOLDER/output_N`` with the output of its libraries.
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
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

import torch

from ds_gpt2.common.errors import one_line_reason
from ds_gpt2.common.files import replace_file
from ds_gpt2.distributed import collectives, device
from ds_gpt2.run_dir import exit_codes, process_end

SIZES = (4, 1 << 20, 16 << 20)  # bytes of fp32; the first measures the latency
_SECONDS = 0.5  # at most, for each size
_REPEATS = 20  # at most, for each size


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
        torch_device = device.choose("auto")
        from ds_gpt2.engine.process_group import (
            close_process_group,
            open_process_group,
        )  # imported late: it needs DeepSpeed

        _write(record, {"phase": "joining"})
        open_process_group(torch_device)
        _write(record, {"phase": "summing"})
        seconds, right = measure(torch_device)
        close_process_group()
    except Exception as error:
        _write(record, {"phase": "failed", "error": f"{type(error).__name__}: {one_line_reason(error)}"})
        return exit_codes.CRASHED
    _write(record, {"phase": "done", "seconds": seconds, "right": right})
    return exit_codes.DONE


def measure(torch_device: torch.device) -> tuple[dict[int, float], bool]:
    """Return the median seconds of an all-reduce by its size in bytes, and whether every sum was right.

    Collective: all ranks must call it.
    """
    expected = sum(range(1, collectives.world_size() + 1))
    seconds, right = {}, True
    for size in SIZES:
        values = torch.empty(size // 4, device=torch_device)
        times: list[float] = []
        repeats = _REPEATS
        while len(times) < repeats:
            values.fill_(collectives.rank() + 1)
            _synchronize(torch_device)
            start_time = time.perf_counter()
            collectives.sum_over_ranks(values)
            _synchronize(torch_device)
            times.append(time.perf_counter() - start_time)
            right &= bool((values == expected).all())
            if len(times) == 2:  # the first one opens connections; all ranks agree on the number of repeats
                slowest = float(collectives.max_over_ranks(torch.tensor(times[1], device=torch_device)))
                repeats = max(2, min(_REPEATS, int(_SECONDS / max(slowest, 1e-6))))
        seconds[size] = statistics.median(times[1:])
    return seconds, right


def _write(file: Path, record: dict[str, Any]) -> None:
    replace_file(file, json.dumps(record))


def _synchronize(torch_device: torch.device) -> None:
    if torch_device.type == "cuda":
        torch.cuda.synchronize(torch_device)


if __name__ == "__main__":
    process_end.end_process(main())
