"""Samples from the model, with the same prompts and random numbers every time, so that steps can be compared."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ds_gpt2.common.files import replace_file
from ds_gpt2.common.formatting import truncated
from ds_gpt2.config.interval import Every
from ds_gpt2.config.settings import SamplesSettings
from ds_gpt2.data.tokenizer import gpt2
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.evaluation.eval_mode import eval_mode
from ds_gpt2.evaluation.sampling import Sampling, derived_seed, encode_prompt, generate
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.hooks.hook import Hook, on_all_ranks

log = logging.getLogger(__name__)

_SHOWN = 100  # characters of a continuation in the log


class Samples(Hook):
    """Continues each prompt on rank 0 (under ZeRO-2 every rank holds all weights).

    The samples of a step are written to ``<directory>/step_<step>.md``, those of the newest step also to
    ``latest.md``. A step that is trained again after a resume replaces its file.
    """

    name = "samples"

    def __init__(self, settings: SamplesSettings, seed: int, directory: Path, sequence_length: int) -> None:
        """
        Args:
            seed: of the run; it and the prompt's number determine the prompt's random numbers.
            sequence_length: the model's longest context, in tokens; of a longer prompt, the last tokens are used.
        """
        self.every = Every(settings.every)
        self._settings = settings
        self._sampling = Sampling(settings.temperature, settings.top_k)
        self._seed = seed
        self._directory = directory
        self._prompts = [_as_read(prompt, sequence_length) for prompt in settings.prompts]
        for number, prompt in enumerate(settings.prompts):
            _warn_if_cut(number, prompt, sequence_length)

    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        return on_all_ranks(lambda: self._observe(engine, state) if collectives.is_main() else {})

    def _observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        if not self._prompts:
            return {}
        with eval_mode(engine.model):
            written = [self._continue(engine.model, number) for number in range(len(self._prompts))]
        for number, continuations in enumerate(written):
            log.info(f"step {state.step:,}: sample {number}: {truncated(continuations[0], _SHOWN)!r}")
        try:
            self._save(state, written)
        except OSError as error:
            reason = error.strerror or error
            log.warning(f"step {state.step:,}: samples are not written to {self._directory}: {reason}")
        return {f"samples/{number}": self._text(number, continuations) for number, continuations in enumerate(written)}

    def _continue(self, model: GPT2, number: int) -> list[str]:
        settings = self._settings
        return generate(
            model,
            settings.prompts[number],
            settings.tokens,
            self._sampling,
            count=settings.per_prompt,
            seed=derived_seed(self._seed, number),
            progress=self.progress,
        )

    def _text(self, number: int, continuations: list[str]) -> str:
        """Return a prompt and its continuations as plain text."""
        numbered = (f"[{index}] {text}" for index, text in enumerate(continuations, start=1))
        return "\n\n".join([self._prompts[number], *numbered])

    def _save(self, state: TrainState, written: list[list[str]]) -> None:
        content = self._markdown(state, written)
        self._directory.mkdir(exist_ok=True)  # without its parent: the run may have been moved
        replace_file(self._directory / f"step_{state.step:06d}.md", content)
        replace_file(self._directory / "latest.md", content)

    def _markdown(self, state: TrainState, written: list[list[str]]) -> str:
        settings = self._settings
        parts = [
            f"# Step {state.step}",
            _progress(state),
            f"Up to {settings.tokens} tokens each, temperature {settings.temperature:g}, top-k {settings.top_k}.",
        ]
        for number, continuations in enumerate(written):
            parts += [f"## Prompt {number}", _code_block(self._prompts[number])]
            for index, text in enumerate(continuations, start=1):
                parts += [f"Continuation {index}:", _code_block(text)]
        return "\n\n".join(parts) + "\n"


def _as_read(prompt: str, sequence_length: int) -> str:
    """Return the prompt as the model reads it: cut to the context; an empty one becomes the start of a document."""
    return gpt2().decode(encode_prompt(prompt)[-sequence_length:])


def _warn_if_cut(number: int, prompt: str, sequence_length: int) -> None:
    tokens = len(encode_prompt(prompt))
    if tokens > sequence_length:
        log.warning(
            f"samples.prompts: prompt {number} has {tokens:,} tokens, the model's context {sequence_length:,}:"
            " only the last ones are used"
        )


def _progress(state: TrainState) -> str:
    seen = f"{state.tokens:,} tokens seen"
    if state.val_loss is None:
        return f"{seen}."
    return f"{seen}, validation loss {state.val_loss:.4f} at step {state.val_step}."


def _code_block(text: str) -> str:
    """Return Markdown that shows ``text`` unchanged: the fence is longer than any row of backticks in it."""
    longest = max((len(row) for row in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
