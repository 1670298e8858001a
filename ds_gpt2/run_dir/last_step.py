"""The last completed step of a run, from its records, heartbeats and checkpoints."""

from __future__ import annotations

from ds_gpt2.run_dir.heartbeat import Beat


def last_step(recorded: int, beat: Beat | None, saved: int) -> int:
    """Return the last completed step. Records arrive some seconds late, or not at all if the disk is full.

    Args:
        recorded: the newest step of the metrics; 0 if there is none.
        beat: the newest heartbeat of a rank that exists.
        saved: the step of the newest checkpoint; 0 or less if there is none.
    """
    return max(recorded, beat.step - 1 if beat is not None else 0, saved, 0)
