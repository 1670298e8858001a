"""Before training: is every token one that GPT-2 has? Read once, shared out among the ranks, and remembered."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ds_gpt2 import dist
from ds_gpt2.data.dataset import Dataset, Shard
from ds_gpt2.data.shards import open_shard
from ds_gpt2.errors import UserError
from ds_gpt2.model import VOCABULARY

log = logging.getLogger(__name__)

_BLOCK = 1 << 24  # tokens read at a time


def check_tokens(dataset: Dataset, memory: Path) -> None:
    """Scan all shards that have not been scanned since they last changed; every rank takes its share.

    Args:
        memory: a JSON file of what was scanned before; rank 0 writes it.

    Raises:
        UserError: a token id out of range, naming shard and place, on every rank.
    """
    stamps = {shard.file: _stamp(dataset.dir / shard.file) for shard in dataset.shards}
    known = dist.gather_objects(_remembered(memory))[0]  # rank 0's view, so that all ranks agree on what is left
    left = [shard for shard in dataset.shards if known.get(str(dataset.dir / shard.file)) != stamps[shard.file]]
    if left:
        log.info(f"checking {sum(shard.tokens for shard in left):,} tokens, once ...")
    mine = left[dist.rank() :: dist.world_size()]
    dist.together(lambda: _check_shards(dataset.dir, mine))
    if left and dist.is_main():
        scanned = {str(dataset.dir / file): stamp for file, stamp in stamps.items()}
        memory.write_text(json.dumps(scanned, indent=1) + "\n", encoding="utf-8")


def _check_shards(directory: Path, shards: list[Shard]) -> None:
    for shard in shards:
        _check_shard(directory, shard)


def _check_shard(directory: Path, shard: Shard) -> None:
    tokens = open_shard(directory / shard.file)
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        place = int(block.argmax())
        if block[place] >= VOCABULARY:
            raise UserError(
                f"shard {directory / shard.file} has token id {block[place]} at position {start + place}:"
                f" GPT-2's ids go from 0 to {VOCABULARY - 1}; the file is damaged or was made with another tokenizer"
            )


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _remembered(memory: Path) -> dict[str, list[int]]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # nothing remembered, or not readable: scan again
    return content if isinstance(content, dict) else {}
