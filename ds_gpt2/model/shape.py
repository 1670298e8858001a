"""What determines the size of a model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY = 50_257  # 50,000 merges, 256 bytes, <|endoftext|>
LARGEST_SIZE = 10**6  # of layers, heads, width or context: beyond any model
PADDED_VOCABULARY = 50_304  # the next multiple of 128: matrix shapes that tensor cores like
CHECKPOINT_BYTES = 14  # per parameter in a checkpoint to resume from: bf16 weights, fp32 masters and two moments
WEIGHT_BYTES = 4  # per parameter in a checkpoint of fp32 weights alone


@dataclass(frozen=True)
class ModelShape:
    """What determines every tensor's shape."""

    layers: int
    heads: int
    width: int
    sequence_length: int  # longest context, in tokens

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a size that no model has, such as a forged file may claim.
        """
        for name, size in vars(self).items():
            if not 0 < size <= LARGEST_SIZE:
                raise ValueError(f"{name} is {size:,}, more than {LARGEST_SIZE:,} or less than 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")

    @property
    def parameters(self) -> int:
        """All parameters, the padding rows of the vocabulary included; see ``gpt2.GPT2``."""
        embeddings = (PADDED_VOCABULARY + self.sequence_length) * self.width
        return embeddings + self.layers * (12 * self.width**2 + 13 * self.width) + 2 * self.width
