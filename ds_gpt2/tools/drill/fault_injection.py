"""Run ``train.py`` with injected faults, each at a chosen step, rank and micro-batch.

The faults are real where possible: signals, exceptions, Inf and NaN in the loss, from where they propagate. For a disk
that cannot be read, the exception of the system call is raised. Without faults, training is that of ``train.py``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

from ds_gpt2 import train
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir import process_end
from ds_gpt2.run_dir.heartbeat import Heartbeat

SCRIPT = Path(__file__)
_VARIABLE = "DS_GPT2_FAULTS"  # environment variable: the faults as JSON

Kind = Literal["nan", "inf", "spike", "crash", "kill", "freeze", "hang", "bit_flip", "read_error"]


@dataclass(frozen=True)
class Fault:
    """A fault in one micro-batch of one rank, or in its evaluation."""

    kind: Kind
    step: int = 0  # the fault occurs either at this step or at this batch of the data
    batch: int = 0
    rank: int = 0
    micro_batch: int = 0
    once: str = ""  # a file that records that the fault has occurred; without it the fault occurs at every start
    evaluating: bool = False  # in the first forward pass of the evaluation of ``step``, also if a resume repeats it
    during: str = ""  # a file: the fault occurs only while it exists


def request(faults: Sequence[Fault]) -> dict[str, str]:
    """Return the environment variables that make ``SCRIPT`` inject ``faults``."""
    return {_VARIABLE: json.dumps([asdict(fault) for fault in faults])}


def requested(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those variables of ``environment`` that ``request`` has returned."""
    return {_VARIABLE: environment[_VARIABLE]} if _VARIABLE in environment else {}


class _Faults:
    """The requested faults of this rank."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = [fault for fault in faults if fault.rank == collectives.rank()]
        self._step = self._batch = self._micro_batch = 0
        self.read_batch = 0  # the batch of the data that is being read, ahead of its step

    def begin_step(self, step: int, batch: int) -> None:
        self._step, self._batch, self._micro_batch = step, batch, 0

    def in_forward(self, loss: Any) -> Any:
        """Inject the faults that are due in this micro-batch; return the loss, changed by them."""
        for fault in self._due(self._micro_batch):
            loss = _inject(fault, loss)
        self._micro_batch += 1
        return loss

    def in_evaluation(self) -> None:
        """Inject the faults that are due in the evaluation. After a resume, no step has begun when it is repeated."""
        for fault in self._faults:
            if fault.evaluating and self._step in (0, fault.step) and _occurs(fault):
                _inject(fault, None)

    def before_fingerprint(self, parameter: Any) -> None:
        """Flip the lowest bit of one weight, as if the memory of a device failed between an update and a save."""
        if any(fault.kind == "bit_flip" for fault in self._due(None)):
            import torch

            parameter.detach().view(torch.int16).view(-1)[0] ^= 1

    def before_read(self) -> None:
        """Raise an I/O error if a read error is due."""
        for fault in self._faults:
            if fault.kind == "read_error" and fault.batch == self.read_batch and _occurs(fault):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _due(self, micro_batch: int | None) -> list[Fault]:
        return [
            fault
            for fault in self._faults
            if fault.kind != "read_error"
            and not fault.evaluating
            and (fault.kind == "bit_flip") == (micro_batch is None)
            and fault.step in (0, self._step)
            and fault.batch in (0, self._batch)
            and (fault.step or fault.batch)
            and micro_batch in (None, fault.micro_batch)
            and _occurs(fault)
        ]


def _occurs(fault: Fault) -> bool:
    """Return whether the fault occurs now; record it if it occurs only once."""
    if fault.during and not Path(fault.during).exists():
        return False
    if not fault.once:
        return True
    try:
        Path(fault.once).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _inject(fault: Fault, loss: Any) -> Any:
    if fault.kind == "nan":
        return loss * float("nan")
    if fault.kind == "inf":
        return loss * float("inf")
    if fault.kind == "spike":
        return loss + 1000.0
    if fault.kind == "crash":
        raise RuntimeError("a fault injected by the drill")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    while fault.kind == "hang":
        time.sleep(1)
    return loss


def install(faults: Sequence[Fault]) -> None:
    """Replace methods of the trainer by versions that inject ``faults``."""
    from ds_gpt2.data.loader import TrainingData
    from ds_gpt2.data.shard_reader import ShardReader
    from ds_gpt2.engine.engine import Engine
    from ds_gpt2.model.gpt2 import GPT2

    injected = _Faults(faults)
    begin_step, forward, fingerprint = Heartbeat.begin_step, GPT2.forward, Engine.fingerprint
    read_batch, read_stretch = TrainingData._read, ShardReader._read

    def begin(self: Heartbeat, step: int, batch: int) -> None:
        injected.begin_step(step, batch)
        begin_step(self, step, batch)

    def faulty_forward(self: GPT2, *arguments: Any, **named: Any) -> Any:
        if not self.training:
            injected.in_evaluation()
        loss = forward(self, *arguments, **named)
        return injected.in_forward(loss) if self.training else loss

    def faulty_fingerprint(self: Engine) -> str:
        injected.before_fingerprint(self.model.wte.weight)
        return fingerprint(self)

    def faulty_batch(self: TrainingData, batch: int) -> Any:
        injected.read_batch = batch
        return read_batch(self, batch)

    def faulty_stretch(self: ShardReader, number: int, first: int, into: Any) -> None:
        injected.before_read()
        read_stretch(self, number, first, into)

    # Methods are replaced because the code of train.py must not contain fault injection.
    Heartbeat.begin_step = begin  # type: ignore[method-assign]  # fault injection
    GPT2.forward = faulty_forward  # type: ignore[method-assign]  # fault injection
    Engine.fingerprint = faulty_fingerprint  # type: ignore[method-assign]  # fault injection
    TrainingData._read = faulty_batch  # type: ignore[method-assign]  # fault injection
    ShardReader._read = faulty_stretch  # type: ignore[method-assign]  # fault injection


def main() -> int:
    """Run ``train.main`` with the faults that the environment requests; return the exit code."""
    faults = [Fault(**values) for values in json.loads(os.environ.get(_VARIABLE, "[]"))]
    return train.main(prepare=lambda: install(faults))


if __name__ == "__main__":
    process_end.run_process(main)
