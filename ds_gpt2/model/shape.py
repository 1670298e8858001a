"""The sizes of a model, its vocabulary and bytes per parameter. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY = 50_257  # 50,000 merges, 256 bytes, <|endoftext|>
LARGEST_SIZE = 10**6  # upper limit of layers, heads, width and context
PADDED_VOCABULARY = 50_304  # the next multiple of 128, which tensor cores handle efficiently
OPTIMIZER_BYTES = 12  # per parameter, divided among the ranks: fp32 master weights, two fp32 moments
EMA_BYTES = 4  # per parameter, divided among the ranks: the fp32 moving average of the weights, if there is one
CHECKPOINT_BYTES = 2 + OPTIMIZER_BYTES  # per parameter in a full checkpoint: bf16 weights and optimizer
WEIGHT_BYTES = 4  # per parameter in a checkpoint of fp32 weights alone


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine the shape of every parameter."""

    layers: int
    heads: int
    width: int
    sequence_length: int  # longest context, in tokens

    def __post_init__(self) -> None:
        """Check the sizes, which may come from a forged file.

        Raises:
            ValueError: a size is not in 1 to ``LARGEST_SIZE``, or ``width`` is not divisible by ``heads``.
        """
        for name, size in vars(self).items():
            if not 0 < size <= LARGEST_SIZE:
                raise ValueError(f"{name} is {size:,}, more than {LARGEST_SIZE:,} or less than 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")

    @property
    def parameters(self) -> int:
        """Number of parameters of ``gpt2.GPT2``, including the padding rows of the vocabulary."""
        embeddings = (PADDED_VOCABULARY + self.sequence_length) * self.width
        return embeddings + self.layers * (12 * self.width**2 + 13 * self.width) + 2 * self.width

    @property
    def unpadded_parameters(self) -> int:
        """Number of parameters without the padding rows of the vocabulary."""
        return self.parameters - (PADDED_VOCABULARY - VOCABULARY) * self.width

    def checkpoint_bytes(self, has_ema: bool) -> int:
        """Return the bytes of the tensors of a full checkpoint.

        Args:
            has_ema: the run keeps a moving average of the weights.
        """
        return (CHECKPOINT_BYTES + EMA_BYTES * has_ema) * self.parameters

    def weight_bytes(self, has_ema: bool) -> int:
        """Return the bytes of the tensors of a checkpoint of fp32 weights alone, the moving average included."""
        return (WEIGHT_BYTES + EMA_BYTES * has_ema) * self.parameters


def sharded_bytes(has_ema: bool) -> int:
    """Return the bytes per parameter that the ranks share: optimizer state, and the moving average if there is one."""
    return OPTIMIZER_BYTES + EMA_BYTES * has_ema
