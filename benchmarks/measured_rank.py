"""One rank of a run that is measured: a trial's, that leaves beside its memory what checkpoints took at most.

Files only become fewer when a name is taken away, so it is enough to look just before: no moment can be missed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir import exit_report
from ds_gpt2.tools.plan import trial_rank

SCRIPT = Path(__file__)
_VARIABLE = "DS_GPT2_MEASURED"  # environment: the directory of checkpoints, and of what is left


def request(checkpoints: Path, directory: Path) -> dict[str, str]:
    """The environment that makes ``SCRIPT`` leave in ``directory`` what lay below ``checkpoints`` at most."""
    return {**trial_rank.request(directory), _VARIABLE: str(checkpoints)}


def most_bytes(directory: Path, ranks: int) -> int:
    """That any of the ranks has seen."""
    return max(int(_file(directory, rank).read_text(encoding="ascii")) for rank in range(ranks))


def bytes_below(directory: Path) -> int:
    """Each file once, however many names it has; files may go while one looks."""
    sizes: dict[int, int] = {}
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.stat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def _file(directory: Path, rank: int) -> Path:
    return directory / f"disk_{rank:05d}"


def main() -> int:
    """As ``train.main``."""
    checkpoints, directory = Path(os.environ[_VARIABLE]), trial_rank.requested_directory()
    seen, unlink = [0], Disk.unlink

    def look_first(self: Disk, path: Path) -> None:
        seen.append(bytes_below(checkpoints))
        unlink(self, path)

    Disk.unlink = look_first  # type: ignore[method-assign]  # train.py is to run as it is
    code = trial_rank.main()
    _file(directory, collectives.rank()).write_text(str(max(seen)), encoding="ascii")
    return code


if __name__ == "__main__":
    exit_report.end_process(main())
