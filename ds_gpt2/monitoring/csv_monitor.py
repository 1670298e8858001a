"""DeepSpeed's CSV files: check where ``csv_monitor`` in the DeepSpeed file writes, before anything is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import check_can_write


class CsvBlock(BaseModel):
    """``csv_monitor`` in the DeepSpeed file, with DeepSpeed's defaults."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


def check(content: dict[str, Any]) -> None:
    """Check that the CSV files can be written, if they are switched on; nothing is left on the disk.

    Args:
        content: of the DeepSpeed file.

    Raises:
        UserError: the block is wrong, or its directory cannot be made or written to.
    """
    block = _read(content)
    if not block.enabled:
        return
    try:
        check_can_write(Path.cwd() / os.path.join(block.output_path, block.job_name))
    except UserError as error:
        hint = "set csv_monitor.output_path and csv_monitor.job_name to a directory that can be written to"
        raise UserError(f"DeepSpeed file: csv_monitor: {error}, or {hint}") from None


def _read(content: dict[str, Any]) -> CsvBlock:
    try:
        return CsvBlock.model_validate(content.get("csv_monitor", {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["csv_monitor", *map(str, first["loc"])])
        raise UserError(f"DeepSpeed file: {where}: {first['msg']}") from None
