"""One rank of a measured run: like a rank of a trial, but it also records the peak disk usage of checkpoints.

Disk usage decreases only when a file is unlinked, so measuring before each unlink finds the exact peak.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.common.disk_usage import bytes_below
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir import process_end
from ds_gpt2.tools.plan import trial_rank

SCRIPT = Path(__file__)
_VARIABLE = "DS_GPT2_MEASURED"  # environment variable: the directory of checkpoints


def request(checkpoints: Path, directory: Path) -> dict[str, str]:
    """Return the environment with which ``SCRIPT`` records in ``directory`` the peak size of ``checkpoints``."""
    return {**trial_rank.request(directory), _VARIABLE: str(checkpoints)}


def most_bytes(directory: Path, ranks: int) -> int:
    """Return the largest size in bytes that any rank recorded."""
    return max(int(_file(directory, rank).read_text(encoding="ascii")) for rank in range(ranks))


def _file(directory: Path, rank: int) -> Path:
    return directory / f"disk_{rank:05d}"


def main() -> int:
    """Run as ``train.main`` does."""
    checkpoints, directory = Path(os.environ[_VARIABLE]), trial_rank.requested_directory()
    sizes, unlink = [0], Disk.unlink

    def measure_first(self: Disk, path: Path) -> None:
        sizes.append(bytes_below(checkpoints))
        unlink(self, path)

    Disk.unlink = measure_first  # type: ignore[method-assign]  # train.py runs unchanged
    code = trial_rank.main()
    _file(directory, collectives.rank()).write_text(str(max(sizes)), encoding="ascii")
    return code


if __name__ == "__main__":
    process_end.end_process(main())
