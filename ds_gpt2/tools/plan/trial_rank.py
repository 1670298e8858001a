"""One rank of a trial: ``train.py`` as it is, and at its end how much memory the rank took at most."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.own_modules import ignore_working_directory

    ignore_working_directory()

from ds_gpt2 import train
from ds_gpt2.common import safe_json
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir import exit_report

SCRIPT = Path(__file__)
_VARIABLE = "DS_GPT2_TRIAL"  # environment: the directory in which each rank leaves its record and what it prints


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank took."""

    libraries: int  # resident before anything was built
    resident: int  # at most
    device_allocated: int | None = None  # by tensors on its GPU, at most; None on a CPU
    device_reserved: int | None = None  # by PyTorch's allocator for them, at most
    device_beside: int | None = None  # by CUDA's context and other programs on that GPU, after the training


def request(directory: Path) -> dict[str, str]:
    """The environment that makes ``SCRIPT`` leave its records in ``directory``."""
    return {_VARIABLE: str(directory)}


def directory_asked_for() -> Path:
    """Where this rank leaves what it has to say."""
    return Path(os.environ[_VARIABLE])


def record_file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"


def output_file(directory: Path, rank: int) -> Path:
    """What ``rank`` has printed."""
    return directory / f"rank_{rank:05d}.out"


def read_record(directory: Path, rank: int) -> RankMemory:
    """
    Raises:
        OSError, ValueError, TypeError: the rank has not come to its end.
    """
    return RankMemory(**safe_json.read(record_file(directory, rank)))


def resident_bytes() -> tuple[int, int]:
    """Of this process now, and at most so far (the kernel's VmRSS and VmHWM, proc(5))."""
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
        "device_beside": total - free - torch.cuda.memory_reserved(),
    }


def main() -> int:
    """As ``train.main``."""
    with output_file(directory_asked_for(), collectives.rank()).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    before = [0]

    def note() -> None:
        before[0] = resident_bytes()[0]

    code = train.main(prepare=note)
    record = RankMemory(before[0], resident_bytes()[1], **_device_bytes())
    record_file(directory_asked_for(), collectives.rank()).write_text(json.dumps(asdict(record)), encoding="utf-8")
    return code


if __name__ == "__main__":
    exit_report.end_process(main())
