"""One rank of a trial: run ``train.py``, and record the peak memory of the rank."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

from ds_gpt2 import train
from ds_gpt2.common import safe_json
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir import process_end

SCRIPT = Path(__file__)
_VARIABLE = "DS_GPT2_TRIAL"  # environment variable: the directory for the record and the output of each rank


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in bytes."""

    libraries: int  # resident before the model is built
    resident: int  # peak
    device_allocated: int | None = None  # peak of the tensors on its GPU; None on a CPU
    device_reserved: int | None = None  # peak that PyTorch's allocator has reserved for tensors
    device_outside_allocator: int | None = None  # of CUDA's context and other programs on that GPU, after the training


def request(directory: Path) -> dict[str, str]:
    """Return the environment variables that make ``SCRIPT`` write its records to ``directory``."""
    return {_VARIABLE: str(directory)}


def requested_directory() -> Path:
    """Return the directory to which this rank writes its record and output."""
    return Path(os.environ[_VARIABLE])


def record_file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"


def output_file(directory: Path, rank: int) -> Path:
    """Return the file with the output of ``rank``."""
    return directory / f"rank_{rank:05d}.out"


def read_record(directory: Path, rank: int) -> RankMemory:
    """Read the record of ``rank``.

    Raises:
        OSError, ValueError, TypeError: the rank did not finish.
    """
    return RankMemory(**safe_json.read(record_file(directory, rank)))


def resident_bytes() -> tuple[int, int]:
    """Return the resident memory of this process: now, and its peak (VmRSS and VmHWM of proc(5))."""
    words = [line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()]
    found = {word[0]: int(word[1]) * 1024 for word in words if word and word[0] in ("VmRSS:", "VmHWM:")}
    return found["VmRSS:"], found["VmHWM:"]


def _device_bytes() -> dict[str, int]:
    import torch

    if not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "device_allocated": torch.cuda.max_memory_allocated(),
        "device_reserved": torch.cuda.max_memory_reserved(),
        "device_outside_allocator": total - free - torch.cuda.memory_reserved(),
    }


def main() -> int:
    """Run ``train.main`` and write the record; return the exit code."""
    with output_file(requested_directory(), collectives.rank()).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    before = [0]

    def measure_libraries() -> None:
        before[0] = resident_bytes()[0]

    code = train.main(prepare=measure_libraries)
    record = RankMemory(before[0], resident_bytes()[1], **_device_bytes())
    record_file(requested_directory(), collectives.rank()).write_text(json.dumps(asdict(record)), encoding="utf-8")
    return code


if __name__ == "__main__":
    process_end.end_process(main())
