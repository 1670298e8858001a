"""``train.py`` with faults, each at a step, a rank and a micro-batch of one's choice.

The faults are real where they can be: signals, exceptions, Inf and NaN in the loss, from where they spread. A disk that
cannot be read is the exception that Python makes of it.
Without faults asked for, training is what ``train.py`` makes of it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # started by the path of this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from ds_gpt2.common.own_modules import ignore_working_directory

    ignore_working_directory()

from ds_gpt2 import train
from ds_gpt2.distributed import collectives
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.heartbeat import Heartbeat

SCRIPT = Path(__file__)
_VARIABLE = "DS_GPT2_FAULTS"  # environment

Kind = Literal["nan", "inf", "spike", "crash", "kill", "freeze", "hang", "bit_flip", "read_error"]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in one micro-batch of one rank."""

    kind: Kind
    step: int = 0  # either the step, or the batch of the data, at which it comes
    batch: int = 0
    rank: int = 0
    micro_batch: int = 0
    once: str = ""  # a file that remembers that it has come; without one it comes every time
    during: str = ""  # a file: it comes only while that exists


def request(faults: Sequence[Fault]) -> dict[str, str]:
    """The environment that makes ``SCRIPT`` bring about ``faults``."""
    return {_VARIABLE: json.dumps([asdict(fault) for fault in faults])}


class _Faults:
    """This rank's part of the faults asked for."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = [fault for fault in faults if fault.rank == collectives.rank()]
        self._step = self._batch = self._micro_batch = 0
        self.read_batch = 0  # of the data; it is read ahead of its step

    def begin_step(self, step: int, batch: int) -> None:
        self._step, self._batch, self._micro_batch = step, batch, 0

    def in_forward(self, loss: Any) -> Any:
        """What is left of ``loss`` of a micro-batch."""
        for fault in self._due(self._micro_batch):
            loss = _strike(fault, loss)
        self._micro_batch += 1
        return loss

    def before_fingerprint(self, parameter: Any) -> None:
        """Flip the lowest bit of one weight: the memory of one device fails between an update and a save."""
        if any(fault.kind == "bit_flip" for fault in self._due(None)):
            import torch

            parameter.detach().view(torch.int16).view(-1)[0] ^= 1

    def before_read(self) -> None:
        for fault in self._faults:
            if fault.kind == "read_error" and fault.batch == self.read_batch and _comes(fault):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _due(self, micro_batch: int | None) -> list[Fault]:
        return [
            fault
            for fault in self._faults
            if fault.kind != "read_error"
            and (fault.kind == "bit_flip") == (micro_batch is None)
            and fault.step in (0, self._step)
            and fault.batch in (0, self._batch)
            and (fault.step or fault.batch)
            and micro_batch in (None, fault.micro_batch)
            and _comes(fault)
        ]


def _comes(fault: Fault) -> bool:
    if fault.during and not Path(fault.during).exists():
        return False
    if not fault.once:
        return True
    try:
        Path(fault.once).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _strike(fault: Fault, loss: Any) -> Any:
    if fault.kind == "nan":
        return loss * float("nan")
    if fault.kind == "inf":
        return loss * float("inf")
    if fault.kind == "spike":
        return loss + 1000.0
    if fault.kind == "crash":
        raise RuntimeError("a fault of the drill")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    while fault.kind == "hang":
        time.sleep(1)
    return loss


def install(faults: Sequence[Fault]) -> None:
    """Put ``faults`` between the loop and the model."""
    from ds_gpt2.data.loader import TrainingData
    from ds_gpt2.data.shard_reader import ShardReader
    from ds_gpt2.engine.engine import Engine
    from ds_gpt2.model.gpt2 import GPT2

    ours = _Faults(faults)
    begin_step, forward, fingerprint = Heartbeat.begin_step, GPT2.forward, Engine.fingerprint
    read_batch, read_stretch = TrainingData._read, ShardReader._read

    def begin(self: Heartbeat, step: int, batch: int) -> None:
        ours.begin_step(step, batch)
        begin_step(self, step, batch)

    def faulty_forward(self: GPT2, *arguments: Any, **named: Any) -> Any:
        loss = forward(self, *arguments, **named)
        return ours.in_forward(loss) if self.training else loss

    def faulty_fingerprint(self: Engine) -> str:
        ours.before_fingerprint(self.model.wte.weight)
        return fingerprint(self)

    def faulty_batch(self: TrainingData, batch: int) -> Any:
        ours.read_batch = batch
        return read_batch(self, batch)

    def faulty_stretch(self: ShardReader, number: int, first: int, into: Any) -> None:
        ours.before_read()
        read_stretch(self, number, first, into)

    # Methods are replaced on purpose: train.py must run as it is, and know nothing of faults.
    Heartbeat.begin_step = begin  # type: ignore[method-assign]  # a fault's way in
    GPT2.forward = faulty_forward  # type: ignore[method-assign]  # a fault's way in
    Engine.fingerprint = faulty_fingerprint  # type: ignore[method-assign]  # a fault's way in
    TrainingData._read = faulty_batch  # type: ignore[method-assign]  # a fault's way in
    ShardReader._read = faulty_stretch  # type: ignore[method-assign]  # a fault's way in


def main() -> int:
    """As ``train.main``, with what the environment asks for."""
    faults = [Fault(**values) for values in json.loads(os.environ.get(_VARIABLE, "[]"))]
    return train.main(prepare=lambda: install(faults))


if __name__ == "__main__":
    exit_report.run_process(main)
