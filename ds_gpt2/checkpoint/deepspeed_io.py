"""The seam to DeepSpeed: what becomes of the states it hands over to be saved, and where those it asks for come from.

``engine.save_checkpoint`` and ``load_checkpoint`` stay the calls; DeepSpeed hands every file to this object.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_gpt2.checkpoint.filesystem import HashingFile
from ds_gpt2.checkpoint.host_copy import freeze

# All that DeepSpeed's optimizer files hold besides tensors and plain containers.
_ALLOWED = [ZeroStageEnum, fragment_address, LossScaler]

MODEL_FILE = "mp_rank_00_model_states.pt"


def partition_file(rank: int) -> str:
    """The name DeepSpeed gives to the optimizer file of ``rank`` in bf16."""
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def unpickle(path: Path, mapped: bool = False) -> Any:
    """The content of a checkpoint file, on the CPU: tensors, containers and DeepSpeed's three classes.

    Args:
        mapped: tensors stay in the file until they are looked at; it must not change as long as they live.

    Raises:
        pickle.UnpicklingError: there is something else in it; nothing of it was run.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:  # PyTorch's own message recommends to load it without this protection
        raise pickle.UnpicklingError(f"{path.name} is damaged, or holds more than tensors and plain values") from None


def pickle_into(content: Any, file: HashingFile) -> None:
    """The inverse of ``unpickle``."""
    torch.save(content, cast("IO[bytes]", file))


class Serializer(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed is untyped
    """Keeps what DeepSpeed saves until somebody writes it, and gives it what was read and verified before."""

    def __init__(self) -> None:
        super().__init__(config_params=None)
        self._saved: dict[str, Any] = {}
        self._loadable: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Directories are made by who writes the files."""

    def save(self, state_dict: Any, path: str) -> None:
        self._saved[Path(path).name] = freeze(state_dict)

    def take_saved(self) -> dict[str, Any]:
        """Every state that DeepSpeed has saved since the last call, by file name. Its tensors are the engine's own."""
        saved, self._saved = self._saved, {}
        return saved

    def offer(self, contents: dict[str, Any]) -> None:
        """The files that the next ``load_checkpoint`` will find, by name."""
        self._loadable = contents

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._loadable[Path(path).name]
