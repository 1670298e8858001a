"""Run the supervisor as a separate process, which the drill can interrupt and kill like that of a user.

    python supervisor_child.py CONFIG ACCELERATOR RANKS RESUME CHECKPOINT_BYTES RUN_DIR_BYTES [key=value ...]

CHECKPOINT_BYTES and RUN_DIR_BYTES are the sizes of small file systems to mount (see ``small_disk``), or 0.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

from ds_gpt2.checkpoint.catalog import candidates
from ds_gpt2.common.errors import UserError
from ds_gpt2.config.settings import Settings, load_settings, parse_overrides
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.cluster.setup import cluster_of, hosts_of
from ds_gpt2.supervision.launcher import RankLayout
from ds_gpt2.supervision.supervised_run import SupervisedRun
from ds_gpt2.supervision.supervisor import supervise
from ds_gpt2.tools.drill import fault_injection, run_hosts, small_disk

SCRIPT = Path(__file__)


def main(words: list[str]) -> int:
    """Supervise the run that ``words`` describe; return its exit code."""
    config, accelerator, ranks, resume, checkpoint_bytes, run_dir_bytes, *overrides = words
    settings = load_settings(Path(config), parse_overrides(overrides))
    run = SupervisedRun(
        ("--config", config, *overrides), RankLayout(accelerator, int(ranks)), resume, script=fault_injection.SCRIPT
    )
    with contextlib.ExitStack() as disks:
        if int(run_dir_bytes):
            disks.enter_context(small_disk.mounted_on_run_dir(settings.run_dir, int(run_dir_bytes)))
        if int(checkpoint_bytes):
            directory, staging = settings.checkpoint_dir, settings.checkpoint.dir / "small_disk"
            staging.mkdir(exist_ok=True)
            newest = candidates(directory, "latest")[0]
            mounted = small_disk.mounted_on_checkpoints(directory, staging, int(checkpoint_bytes), newest)
            disks.enter_context(mounted)
        return _supervise(run, settings)


def _supervise(run: SupervisedRun, settings: Settings) -> int:
    """Supervise the run on this machine, or on the hosts of its hostfile; return its exit code."""
    hosts = hosts_of(settings, None)
    if not hosts:
        return supervise(run, settings)
    run_hosts.make_unreachable(settings.run.dir)
    run = replace(run, environment=fault_injection.requested(os.environ))  # agents do not pass it on
    with cluster_of(settings, hosts, run.arguments) as cluster:
        cluster.start()
        layout = replace(run.layout, accelerator=cluster.accelerator)
        return supervise(replace(run, layout=layout), settings, cluster)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(exit_codes.MISTAKE)
