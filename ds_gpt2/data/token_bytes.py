"""The bytes of text that tokens stand for."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from ds_gpt2.data import tokenizer


@functools.cache
def bytes_of_tokens() -> npt.NDArray[np.uint8]:
    """Return the number of UTF-8 bytes of each token of GPT-2's vocabulary, (50257,); 0 of <|endoftext|>."""
    encoding = tokenizer.gpt2()
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(tokenizer.END_OF_TEXT)]
    return np.array([*lengths, 0], np.uint8)


def count_bytes(windows: npt.NDArray[np.int64]) -> int:
    """Return the bytes of the target tokens of windows (n, tokens + 1): all but the first token of each."""
    return int(bytes_of_tokens()[windows[:, 1:]].sum(dtype=np.int64))
