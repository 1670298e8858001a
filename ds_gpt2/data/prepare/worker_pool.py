"""Tokenize texts on several processes, in order."""

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
from ds_gpt2.data.prepare.tokenize import tokenize
from ds_gpt2.data.shards import Tokens

_BATCH_CHARACTERS = 500_000
_QUEUED_PER_WORKER = 3  # batches: one in progress, the others in transfer

Text = TypeVar("Text")
_Result = tuple[Tokens, list[int]]  # concatenated tokens of a batch, and the end of each text's tokens


class Encoder:
    """Context manager of worker processes that tokenize. With one worker, this process tokenizes.

    Each worker has its own pipe, and a thread in this process waits for it. In a pool with shared queues, a worker
    killed while it writes would leave the others and the parent waiting for the rest of its message.
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
        """Yield the companion object of each text with its tokens, in the order of the texts.

        Raises:
            UserError: a worker was killed, or as ``tokenize``.
        """
        if not self._workers:
            yield from ((companion, tokenize(text)) for text, companion in texts)
            return
        waiting: deque[tuple[list[Text], Future[_Result]]] = deque()
        for batch, companions in _batches(texts):
            waiting.append((companions, self._threads.submit(self._encode, batch)))
            if len(waiting) > _QUEUED_PER_WORKER * self._count:
                yield from _each(*waiting.popleft())
        while waiting:
            yield from _each(*waiting.popleft())

    def _encode(self, texts: list[str]) -> _Result:
        """Encode a batch in one of the threads, of which there are as many as workers."""
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A worker process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # "fork" is unsafe: a thread may be downloading
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends if the worker dies

    def encode(self, texts: list[str]) -> _Result:
        try:
            self._pipe.send(texts)
            result: _Result | UserError = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError(
                "a worker was killed, perhaps because memory ran out: run the same command again to continue, with"
                " fewer --workers N if needed"
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
    """Run the loop of a worker until the parent kills it or exits. Ctrl+C is handled by the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            texts: list[str] = pipe.recv()
            try:
                pipe.send(_encode(texts))
            except UserError as error:
                pipe.send(error)


def _encode(texts: list[str]) -> _Result:
    found = [tokenize(text) for text in texts]
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
