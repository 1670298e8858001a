"""All scenes by name."""

from __future__ import annotations

from ds_gpt2.tools.drill.scenes import checkpoints, data, disks, equivalence, hosts, numerics, processes
from ds_gpt2.tools.drill.scenes.scene import Scene
from ds_gpt2.tools.drill.shrink import EVERY

SCENES = {
    scene.name: scene
    for scene in (
        Scene("read_error", data.read_error),
        Scene("exception", processes.exception),
        Scene("kill_rank", processes.kill_rank),
        Scene("freeze_rank", processes.freeze_rank),
        Scene("kill_launcher", processes.kill_launcher),
        Scene("ctrl_c", processes.ctrl_c),
        Scene("kill_supervisor", processes.kill_supervisor),
        Scene("kill_all", processes.kill_all),
        Scene("truncate", checkpoints.truncate),
        Scene("flip_byte", checkpoints.flip_byte),
        Scene("no_checkpoints", checkpoints.no_checkpoints),
        Scene("disk_full", disks.disk_full, 4 * EVERY),
        Scene("run_dir_full", disks.run_dir_full, 8 * EVERY),
        Scene("unreadable_data", data.unreadable_data),
        Scene("node", hosts.node),
        Scene("nan", numerics.nan),
        Scene("other_ranks", equivalence.other_ranks),
        Scene("divergence", numerics.divergence),
        Scene("long_divergence", numerics.long_divergence),
    )
}
FINISH = Scene("bit_for_bit", equivalence.bit_for_bit)
