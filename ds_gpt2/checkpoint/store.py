"""Save and restore a run through DeepSpeed's own sharded checkpoints."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ds_gpt2 import __version__, dist
from ds_gpt2.checkpoint import files
from ds_gpt2.checkpoint.rng import get_rng_state, set_rng_state
from ds_gpt2.checkpoint.serializer import Serializer
from ds_gpt2.engine import Engine
from ds_gpt2.errors import UserError
from ds_gpt2.state import TrainState

FORMAT = 1
_KEY = "ds_gpt2"  # our one key in DeepSpeed's client state

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, engine: Engine, keep_last: int, identity: dict[str, Any]) -> None:
        """
        Args:
            identity: what must not change between saving and resuming (model, data, token budget, ...).
        """
        self.directory = directory
        self._engine = engine
        self._keep_last = keep_last
        self._identity = identity
        self._saved_step: int | None = None
        engine.deepspeed.checkpoint_engine = Serializer()

    def save(self, state: TrainState) -> str:
        """Write a rolling checkpoint of ``state``; every rank calls this. Returns its tag."""
        tag = files.rolling_tag(state.step)
        if self._saved_step == state.step:
            return tag
        ours = {"state": state.to_dict(), "rng": dist.gather_objects(get_rng_state())}
        self._engine.deepspeed.save_checkpoint(
            str(self.directory), tag=tag + files.PARTIAL, client_state={_KEY: ours}, save_latest=False
        )
        if dist.is_main():
            files.commit(self.directory, tag, self._manifest(state))
            self._prune()
        dist.barrier()
        self._saved_step = state.step
        return tag

    def load(self, tag: str) -> TrainState:
        """Restore weights, optimizer and this rank's RNG from ``tag``; every rank calls this.

        Raises:
            UserError: no such checkpoint, it is of another run's making, or it cannot be read.
        """
        dist.together(lambda: self._check(tag))
        try:
            path, client_state = self._engine.deepspeed.load_checkpoint(
                str(self.directory), tag=tag, load_lr_scheduler_states=False
            )
            assert path is not None, "DeepSpeed found nothing to load"
        except Exception as error:
            raise UserError(f"checkpoint {self.directory / tag} cannot be loaded: {error}") from error
        ours = client_state[_KEY]
        set_rng_state(ours["rng"][dist.rank()])
        state = TrainState.from_dict(ours["state"])
        self._saved_step = state.step
        return state

    def _check(self, tag: str) -> None:
        manifest = files.read_manifest(self.directory, tag)
        if manifest.get("format") != FORMAT:
            raise UserError(f"checkpoint {tag} has format {manifest.get('format')}; this version reads format {FORMAT}")
        for name, value in self._identity.items():
            saved = manifest["identity"].get(name)
            if saved != value:
                raise UserError(
                    f"checkpoint {self.directory / tag} was made with {name} {saved}, this run has {value}:"
                    " set it back, or start a new run with run.name=NAME"
                )
        if manifest["world_size"] != dist.world_size():
            raise UserError(
                f"checkpoint {tag} was saved by {manifest['world_size']} ranks and this run has {dist.world_size()}:"
                f" start with --num_gpus {manifest['world_size']}"
            )

    def _manifest(self, state: TrainState) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **state.to_dict(),
            "world_size": dist.world_size(),
            "identity": self._identity,
            "versions": library_versions(),
        }

    def _prune(self) -> None:
        for tag in files.committed_tags(self.directory)[: -self._keep_last]:
            try:
                files.remove(self.directory, tag)
            except OSError as error:  # housekeeping must not end the run; the next save tries again
                log.warning("could not remove old checkpoint %s: %s", tag, error)


def library_versions() -> dict[str, str]:
    """Versions that a checkpoint or a run was made with."""
    return {
        "ds_gpt2": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
