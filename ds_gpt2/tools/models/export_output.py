"""Write an export to its path atomically: it appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
from safetensors import SafetensorError

from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError, one_line_reason
from ds_gpt2.common.files import regular_only, remove_tree
from ds_gpt2.common.formatting import size
from ds_gpt2.common.process_identity import is_running, start_of


@contextlib.contextmanager
def atomic_output(out: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary path beside ``out``, which replaces ``out`` at the end; an error leaves ``out`` unchanged.

    Args:
        out: a file or a directory; an existing one is replaced.
        needed: bytes of free space that are required.

    Raises:
        UserError: too little space, or a write failed.
    """
    unfinished, replaced = temporary_paths(out, os.getpid())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clean_up_after_dead_processes(out)
        if (free := shutil.disk_usage(out.parent).free) < needed:
            raise UserError(
                f"{out.parent} has {size(free)} free, {size(needed)} are needed: free some space, or give --out"
            )
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            sync(path)
        if os.path.lexists(out):
            out.rename(replaced)
        unfinished.rename(out)
        files.sync_directory(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError) as error:  # safetensors and torch.save raise them for an OSError
        reason = one_line_reason(error, 200)
        raise UserError(f"{out} could not be written completely (is the disk full?): {reason}") from None
    finally:
        _clean_up(out, unfinished, replaced)


def temporary_paths(out: Path, pid: int) -> tuple[Path, Path]:
    """Return where process ``pid`` of this host writes an export, and where it moves the export that it replaces."""
    return _paths_of(out, f"{socket.gethostname()}-{pid}-{start_of(pid)}")


def _paths_of(out: Path, owner: str) -> tuple[Path, Path]:
    return out.with_name(f".{out.name}.unfinished-{owner}"), out.with_name(f".{out.name}.replaced-{owner}")


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    if path.is_dir():
        files.sync_directory(path)
        return
    with open(path, "rb", opener=regular_only) as opened:
        os.fsync(opened.fileno())


def _clean_up_after_dead_processes(out: Path) -> None:
    """Remove temporary paths of processes of this host that no longer exist."""
    host = re.escape(socket.gethostname())
    name = re.compile(
        rf"\.{re.escape(out.name)}\.(?:unfinished|replaced)-"
        rf"(?P<owner>{host}-(?P<pid>[0-9]{{1,9}})(?:-(?P<start>[^-]+\.[^-]*))?)"
    )
    for leftover in list(out.parent.iterdir()):
        found = name.fullmatch(leftover.name)
        if found is not None and not _exists(int(found["pid"]), found["start"]):
            _clean_up(out, *_paths_of(out, found["owner"]))


def _exists(pid: int, start: str | None) -> bool:
    """Return whether a process exists; ``start`` is None in names that earlier versions wrote."""
    return psutil.pid_exists(pid) if start is None else is_running(pid, start)


def _clean_up(out: Path, unfinished: Path, replaced: Path) -> None:
    """Remove the temporary paths; restore the replaced export if the new one is not there."""
    with contextlib.suppress(OSError):
        if os.path.lexists(replaced) and not os.path.lexists(out):
            replaced.rename(out)
        for leftover in (unfinished, replaced):
            remove_tree(leftover)
