"""Run DeepSpeed's launcher of one machine, as ``python -m deepspeed.launcher.launch`` would.

``-m`` would add the working directory to the module search path, where a file named random.py hides Python's module.
DeepSpeed's multi-node runner also ends every process with those words on its command line.

The launcher ends all ranks when it notices that one has failed, and exits with the status of that one. If a signal
kills a rank, other ranks fail soon afterwards, and the launcher may notice one of them first. So the signals that have
killed ranks until then are reported here.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

_LOCAL_RANK = "--local_rank="  # the launcher adds it to the arguments of each rank


class _Process(subprocess.Popen[Any]):
    """A process of the launcher, which reports killed ranks as soon as one rank has failed."""

    _ranks: ClassVar[dict[int, _Process]] = {}  # of this launcher
    _has_reported = False

    def __init__(self, args: Any, *others: Any, **options: Any) -> None:
        super().__init__(args, *others, **options)
        if isinstance(args, list) and any(str(word).startswith(_LOCAL_RANK) for word in args):
            self._ranks[int(options["env"]["RANK"])] = self

    def poll(self) -> int | None:
        """Return the exit status; None while the process runs."""
        code = super().poll()
        if code and not _Process._has_reported:
            _Process._has_reported = True
            self._report_kills()
        return code

    def _report_kills(self) -> None:
        for rank, process in self._ranks.items():
            if (code := process.poll()) is not None and code < 0:
                report_kill(rank, -code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from ds_gpt2.common.module_search_path import ignore_working_directory
    from ds_gpt2.run_dir.exit_report import report_kill  # not later: the project may be moved while it trains

    ignore_working_directory()
    # The launcher polls its ranks and has no other place to see which of them a signal has killed.
    subprocess.Popen = _Process  # type: ignore[misc]  # replaces a class on purpose
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)
