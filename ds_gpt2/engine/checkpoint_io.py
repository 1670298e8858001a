"""DeepSpeed's checkpoint files: their names, how they are read safely, and who writes and reads them.

``save_checkpoint`` and ``load_checkpoint`` of DeepSpeed's engine hand every file to a ``Serializer``: saving collects
the contents in memory, loading takes contents that were read and verified before.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import zero_to_fp32
from deepspeed.utils.tensor_fragment import fragment_address

from ds_gpt2.engine.checkpoint_keys import PARTITION_SUFFIX
from ds_gpt2.engine.host_copy import freeze

# The classes that DeepSpeed's optimizer files contain in addition to tensors and plain containers.
_ALLOWED = [ZeroStageEnum, fragment_address, LossScaler]

MODEL_FILE = "mp_rank_00_model_states.pt"


class _Writable(Protocol):
    def write(self, data: Any, /) -> int: ...


def partition_file(rank: int) -> str:
    """Return the name that DeepSpeed gives to the bf16 optimizer file of ``rank``."""
    return f"bf16_zero_pp_rank_{rank}_mp_rank_00{PARTITION_SUFFIX}"


def recovery_script() -> bytes:
    """Return DeepSpeed's script ``zero_to_fp32.py``, which it copies next to checkpoints."""
    return Path(zero_to_fp32.__file__).read_bytes()


def unpickle(path: Path, mapped: bool = False) -> Any:
    """Read a checkpoint file to the CPU: tensors, containers and DeepSpeed's three classes.

    Args:
        mapped: memory-map tensors instead of reading them; the file must not change while they exist.

    Raises:
        pickle.UnpicklingError: the file holds something else, or is damaged; none of it was executed.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:  # PyTorch's own message recommends to load it without this protection
        raise pickle.UnpicklingError(f"{path.name} is damaged, or holds more than tensors and plain values") from None


def pickle_into(content: Any, file: _Writable) -> None:
    """Write ``content`` to ``file`` so that ``unpickle`` reads it."""
    torch.save(content, cast("IO[bytes]", file))


class Serializer(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed is untyped
    """A checkpoint engine of DeepSpeed's that collects saved states and serves states that were read before."""

    def __init__(self) -> None:
        super().__init__(config_params=None)
        self._saved: dict[str, Any] = {}
        self._loadable: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: the code that writes the files makes the directories."""

    def save(self, state_dict: Any, path: str) -> None:
        """Collect ``state_dict``, copied except for its tensors: they are valid until the next update."""
        self._saved[Path(path).name] = freeze(state_dict)

    def take_saved(self) -> dict[str, Any]:
        """Return the states that were saved since the last call, by file name. Their tensors are the engine's own."""
        saved, self._saved = self._saved, {}
        return saved

    def offer(self, contents: dict[str, Any]) -> None:
        """Set the files that the next ``load_checkpoint`` finds, by name."""
        self._loadable = contents

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._loadable[Path(path).name]
