"""The interface of a hook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from ds_gpt2.common.errors import one_line_reason
from ds_gpt2.config.interval import Every
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818  # a request, not an error
    """A stop is requested; the hook has ended early."""


class HookFailedError(Exception):
    """A hook has failed on a rank; the message is the reason."""


class Hook(ABC):
    """Measures something at the steps at which it is due, on every rank.

    A hook returns what it measured and changes nothing: no weight, no random state, not ``TrainState``. If it fails,
    the evaluator reports that and training continues.
    """

    every: Every
    name: str  # for messages, unique in a run
    can_be_repeated = True  # after a resume; False if it needs gradients or other state that is not saved
    is_bounded = False  # whether it needs no more memory than a training step
    progress: Callable[[], None] = staticmethod(lambda: None)  # to be called often; may raise Interrupted

    def before_update(self, engine: Engine) -> None:  # noqa: B027  # most hooks do not need gradients
        """Read the gradients after the step's last backward pass: under ZeRO-2 they exist only then."""

    @abstractmethod
    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        """Return the metrics of this step, measured after the update; the values of rank 0 are recorded.

        A ``val/loss`` among them becomes the run's validation loss.

        Raises:
            Interrupted: on every rank: a stop is requested.
            HookFailedError: on every rank: a rank failed; see ``on_all_ranks``.
        """


def on_all_ranks(part: Callable[[], T]) -> T:
    """Call ``part``, this rank's share of the work, and return its result. Every rank calls this.

    A rank that failed alone would leave the others waiting in their next collective.

    Raises:
        Interrupted: on every rank, if ``part`` raised it on any.
        HookFailedError: on every rank, if ``part`` raised another exception on any, such as one for lack of memory.
    """
    result, is_interrupted, problem = None, False, None
    try:
        result = part()
    except Interrupted:
        is_interrupted = True
    except Exception as error:
        problem = f"rank {collectives.rank()}: {one_line_reason(error)}"
    reports = collectives.gather_objects((is_interrupted, problem))
    if any(interrupted for interrupted, _ in reports):
        raise Interrupted
    if problems := [reported for _, reported in reports if reported is not None]:
        raise HookFailedError(problems[0])
    return result  # type: ignore[return-value]  # no problem on any rank: part returned a T
