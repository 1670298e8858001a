"""The supervisor as a process of its own, so that it can be interrupted and killed like a person's.

    python child.py CONFIG ACCELERATOR RANKS RESUME ROOM RUN_ROOM [key=value ...]

ROOM is 0, or the size in bytes of a file system that takes the place of the checkpoints' (see room); RUN_ROOM is the
same for the run's directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.own_modules import ignore_working_directory

    ignore_working_directory()

from ds_gpt2.checkpoint.catalog import candidates
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import load_settings, parse_overrides
from ds_gpt2.run_dir import exit_report
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.supervision.supervised_run import SupervisedRun
from ds_gpt2.supervision.supervisor import supervise
from ds_gpt2.tools.drill import fault_injection, small_disk

SCRIPT = Path(__file__)


def main(words: list[str]) -> int:
    config, accelerator, ranks, resume, size, run_size, *overrides = words
    settings = load_settings(Path(config), parse_overrides(overrides))
    run = SupervisedRun(
        ("--config", config, *overrides), RankLayout(accelerator, int(ranks)), resume, script=fault_injection.SCRIPT
    )
    if int(run_size):
        with small_disk.small_disk(settings.run_dir, int(run_size)):
            return supervise(run, settings)
    if not int(size):
        return supervise(run, settings)
    directory, staging = settings.checkpoint_dir, settings.checkpoint.dir / "room"
    staging.mkdir(exist_ok=True)
    small_disk.move_in(directory, staging, int(size), candidates(directory, "latest")[0])
    try:
        return supervise(run, settings)
    finally:
        small_disk.move_out(directory, staging)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(exit_report.MISTAKE)
