"""The ranks of one launch as the supervisor sees them, on one machine or on several."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ds_gpt2.common.open_directory import OpenDirectory
from ds_gpt2.run_dir.exit_report import Outcome
from ds_gpt2.supervision.rank_heartbeats import RankHeartbeats


class LaunchedRanks(Protocol):
    """``launcher.Ranks`` and ``cluster_ranks.ClusterRanks`` have these methods; see there."""

    count: int

    @property
    def group(self) -> int | None: ...

    @property
    def is_launcher_running(self) -> bool: ...

    @property
    def have_exited(self) -> bool: ...

    @property
    def launcher_was_killed(self) -> bool: ...

    @property
    def are_stuck(self) -> bool: ...

    @property
    def lost_hosts(self) -> dict[str, str]: ...

    @property
    def exit_status(self) -> str: ...

    @property
    def ran_out_of_memory(self) -> bool: ...

    def outcome(self) -> Outcome: ...

    def failures(self) -> dict[int, str]: ...

    def kills(self) -> dict[int, str]: ...

    def request_stop(self) -> None: ...

    def kill(self) -> None: ...

    def heartbeats(self, run_dir: OpenDirectory) -> RankHeartbeats: ...

    def write_stacks(self, run_dir: Path, directory: Path) -> None: ...
