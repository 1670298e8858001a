"""Read the items of an evaluation on every rank, and check that all ranks have the same ones."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import counted
from ds_gpt2.data.items import Item, ItemList
from ds_gpt2.distributed import collectives
from ds_gpt2.evaluation.row_batches import describe_truncation
from ds_gpt2.model.gpt2 import GPT2

log = logging.getLogger(__name__)


def load_on_all_ranks(
    name: str, path: Path, load: Callable[[], Sequence[Item]], prepare: Callable[[], object] | None = None
) -> ItemList | None:
    """Return the items; None, with a warning, if a rank cannot load them or has others than rank 0.

    Every rank calls this.

    Args:
        name: of the evaluation, for the warning.
        path: the file, which may be another one on each host.
        load: reads the file, and writes a cache if there is none: rank 0 calls it first.
        prepare: called on rank 0 before ``load``; may take long, such as a download.
    """

    def prepare_and_load() -> int:
        if prepare is not None:
            prepare()
        return len(load())

    try:
        collectives.broadcast_slow_from_main(prepare_and_load)
        items = collectives.call_on_all_ranks(lambda: _as_list(load()))
        found = collectives.gather_objects((socket.gethostname(), items.sha256(), len(items)))
        collectives.raise_on_all_ranks(_difference(path, found))
        return items
    except UserError as error:
        log.warning(f"training continues without {name}: {error}")
        return None


def log_truncation(name: str, items: Sequence[Item], model: GPT2) -> None:
    """Log how many items are too long for the model, if there are any; only rank 0 looks."""
    if collectives.is_main() and (text := describe_truncation(items, model.shape.sequence_length)) is not None:
        log.info(f"{name}: {text}")


def _as_list(items: Sequence[Item]) -> ItemList:
    return items if isinstance(items, ItemList) else ItemList(items)


def _difference(path: Path, found: Sequence[tuple[str, str, int]]) -> str | None:
    """Return which rank has other items than rank 0, if any.

    Args:
        found: host, sha256 of the items and their number, of each rank.
    """
    host, digest, count = found[0]
    for rank, (other_host, other_digest, other_count) in enumerate(found):
        if (other_digest, other_count) != (digest, count):
            return (
                f"{path} differs between rank 0 on host {host} ({counted(count, 'item')}, sha256 {digest[:12]}) and"
                f" rank {rank} on host {other_host} ({counted(other_count, 'item')}, sha256 {other_digest[:12]}):"
                " copy it again"
            )
    return None
