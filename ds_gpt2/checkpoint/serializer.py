"""The seam to DeepSpeed: how the bytes of a checkpoint reach the disk and come back.

``engine.save_checkpoint`` and ``load_checkpoint`` stay the calls; DeepSpeed hands every file to this object.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

# All that DeepSpeed's optimizer files hold besides tensors and plain containers.
_ALLOWED = [ZeroStageEnum, fragment_address, LossScaler]


class Serializer(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed is untyped
    """Reads with ``weights_only``: a checkpoint is data, and a stranger's cannot run code."""

    def __init__(self) -> None:
        super().__init__(config_params=None)
        self.zipfile_serialization = True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Unpickle ``path``; anything but tensors, containers and DeepSpeed's three classes is refused."""
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location=map_location, weights_only=True)
