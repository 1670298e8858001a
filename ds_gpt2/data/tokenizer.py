"""GPT-2's tokenizer: tiktoken with the ranks included in this package, so that no network is needed."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

import tiktoken

from ds_gpt2.common.errors import UserError
from ds_gpt2.model.shape import VOCABULARY

NAME = "gpt2"
END_OF_TEXT = VOCABULARY - 1
END_OF_TEXT_MARK = "<|endoftext|>"  # its text; ordinary text that contains it is encoded as characters

RANKS = Path(__file__).parents[1] / "assets" / "gpt2.tiktoken"
_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# The split of OpenAI's gpt-2/src/encoder.py in tiktoken's possessive form (tiktoken_ext/openai_public.py).
_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """Return the encoding, equal to ``tiktoken.get_encoding("gpt2")``.

    Raises:
        UserError: the file of ranks in this installation is damaged.
    """
    content = RANKS.read_bytes()
    if hashlib.sha256(content).hexdigest() != _RANKS_SHA256:
        raise UserError(f"{RANKS} is damaged (checksum mismatch): restore the file or install ds_gpt2 again")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
    return tiktoken.Encoding(
        NAME,
        pat_str=_SPLIT,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT_MARK: END_OF_TEXT},
        explicit_n_vocab=VOCABULARY,
    )
