"""Pieces to tokens, in order, on several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import numpy as np

from ds_gpt2.data.shards import Tokens
from ds_gpt2.data.tokenise import tokenise
from ds_gpt2.errors import UserError

_BATCH_CHARACTERS = 500_000
_AHEAD = 3  # batches for each worker: one in work, others on their way there and back

Text = TypeVar("Text")


class Encoder:
    """Workers that tokenise; a context, which ends them. With one worker it is this process that does it."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        if self._workers > 1:  # not forked: threads may be fetching files
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _prepare_worker)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, texts: Iterable[tuple[str, Text]]) -> Iterator[tuple[Text, Tokens]]:
        """What comes with each text, with its tokens, in the order of the texts.

        Raises:
            UserError: a worker was killed.
        """
        if self._pool is None:
            yield from ((companion, tokenise(text)) for text, companion in texts)
            return
        waiting: deque[tuple[list[Text], Future[tuple[Tokens, list[int]]]]] = deque()
        try:
            for batch, companions in _batches(texts):
                waiting.append((companions, self._pool.submit(_encode, batch)))
                if len(waiting) > _AHEAD * self._workers:
                    yield from _take(*waiting.popleft())
            while waiting:
                yield from _take(*waiting.popleft())
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, perhaps for want of memory: the same command goes on, --workers N takes fewer"
            ) from None


def _batches(texts: Iterable[tuple[str, Text]]) -> Iterator[tuple[list[str], list[Text]]]:
    batch: list[str] = []
    companions: list[Text] = []
    characters = 0
    for text, companion in texts:
        batch.append(text)
        companions.append(companion)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch, companions
            batch, companions, characters = [], [], 0
    if batch:
        yield batch, companions


def _take(companions: list[Text], future: Future[tuple[Tokens, list[int]]]) -> Iterator[tuple[Text, Tokens]]:
    tokens, ends = future.result()
    start = 0
    for companion, end in zip(companions, ends, strict=True):
        yield companion, tokens[start:end]
        start = end


def _encode(texts: list[str]) -> tuple[Tokens, list[int]]:
    """In a worker: all tokens in a row, and where each text's end."""
    found = [tokenise(text) for text in texts]
    return np.concatenate(found), np.cumsum([len(tokens) for tokens in found]).tolist()


def _prepare_worker() -> None:
    """Ctrl+C is the parent's to handle; and when that is killed, nobody takes what is tokenised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
