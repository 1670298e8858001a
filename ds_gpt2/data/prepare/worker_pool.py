"""Pieces to tokens, in order, on several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from ds_gpt2.common.errors import UserError
from ds_gpt2.data.prepare.tokenize import tokenise
from ds_gpt2.data.shards import Tokens

_BATCH_CHARACTERS = 500_000
_AHEAD = 3  # batches for each worker: one in work, others on their way there and back

Text = TypeVar("Text")
_Result = tuple[Tokens, list[int]]  # all tokens of a batch in a row, and where each text's end


class Encoder:
    """Workers that tokenise; a context, which ends them. With one worker it is this process that does it.

    Each has a pipe of its own, and a thread here that waits at it. In a pool they would share queues, and one that is
    killed while it writes leaves the others, and the parent, waiting for the rest of what it wrote.
    """

    def __init__(self, workers: int) -> None:
        self._count = workers
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()

    def __enter__(self) -> Encoder:
        if self._count > 1:
            self._workers = [_Worker() for _ in range(self._count)]
            self._threads = ThreadPoolExecutor(self._count, "encoder")
        for worker in self._workers:
            self._idle.put(worker)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.kill()
        if self._workers:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def encode(self, texts: Iterable[tuple[str, Text]]) -> Iterator[tuple[Text, Tokens]]:
        """What comes with each text, with its tokens, in the order of the texts.

        Raises:
            UserError: a worker was killed, or see ``tokenize``.
        """
        if not self._workers:
            yield from ((companion, tokenise(text)) for text, companion in texts)
            return
        waiting: deque[tuple[list[Text], Future[_Result]]] = deque()
        for batch, companions in _batches(texts):
            waiting.append((companions, self._threads.submit(self._encode, batch)))
            if len(waiting) > _AHEAD * self._count:
                yield from _each(*waiting.popleft())
        while waiting:
            yield from _each(*waiting.popleft())

    def _encode(self, texts: list[str]) -> _Result:
        """In one of as many threads as there are workers."""
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process, and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # not forked: threads may be fetching files
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that its death is the end of the pipe

    def encode(self, texts: list[str]) -> _Result:
        try:
            self._pipe.send(texts)
            result: _Result | UserError = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError(
                "a worker was killed, perhaps for want of memory: the same command goes on, --workers N takes fewer"
            ) from None
        if isinstance(result, UserError):
            raise result
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self._pipe.close()


def _work(pipe: Connection) -> None:
    """In a worker, until the parent ends it or has died. Ctrl+C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            texts: list[str] = pipe.recv()
            try:
                pipe.send(_encode(texts))
            except UserError as error:
                pipe.send(error)


def _encode(texts: list[str]) -> _Result:
    found = [tokenise(text) for text in texts]
    return np.concatenate(found), np.cumsum([len(tokens) for tokens in found]).tolist()


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


def _each(companions: list[Text], future: Future[_Result]) -> Iterator[tuple[Text, Tokens]]:
    tokens, ends = future.result()
    start = 0
    for companion, end in zip(companions, ends, strict=True):
        yield companion, tokens[start:end]
        start = end
