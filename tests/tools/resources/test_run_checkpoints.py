"""Bytes of a run's own checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from checkpoint_files import size_of, write_checkpoint

from ds_gpt2.checkpoint.naming import PARTIAL, rolling_tag
from ds_gpt2.tools.resources.run_checkpoints import own_bytes


def test_own_bytes_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    assert own_bytes(tmp_path / "none") == 0
    (tmp_path / "another file").write_bytes(bytes(1000))
    newest, older = (write_checkpoint(tmp_path, rolling_tag(step), step) for step in (20, 10))
    partial = write_checkpoint(tmp_path, f"{rolling_tag(30)}{PARTIAL}", 30)
    assert own_bytes(tmp_path) == sum(map(size_of, (newest, older, partial)))
    shutil.copytree(older, tmp_path.parent / f"{tmp_path.name}-copy", copy_function=os.link)  # deleting frees nothing
    assert own_bytes(tmp_path) == sum(map(size_of, (newest, partial)))
