"""How much memory a rank needs: arithmetic on what DeepSpeed 0.19.8's ZeRO-2, the model and its loss keep at once.

Letters below: P parameters, N ranks, n tokens of a micro-batch, C width, L layers, H heads, V rows of the padded
vocabulary, R elements of a reduce bucket, c tokens whose logits exist at once. Weights and activations are bf16.
``benchmarks/plan_accuracy.py`` compares the sums with what PyTorch's allocator really hands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.deepspeed_config import bucket_size
from ds_gpt2.config.settings import ModelSettings
from ds_gpt2.model.gpt2 import GPT2, flops_per_token, parameter_groups
from ds_gpt2.model.loss import chunk_tokens, rows_at_once
from ds_gpt2.model.shape import PADDED_VOCABULARY, ModelShape

_ALIGNMENT = 2  # elements, times the ranks: what DeepSpeed fills a parameter group up to (nccl_start_alignment_factor)


@dataclass(frozen=True)
class Model:
    """What of a GPT-2 counts here."""

    shape: ModelShape
    dropout: float
    compiled: bool
    groups: tuple[int, ...]  # parameters of each optimizer group
    flops_per_token: float  # forward and backward

    @property
    def parameters(self) -> int:
        return sum(self.groups)

    @property
    def head(self) -> int:
        """Parameters of the tied embedding and output head, VC."""
        return PADDED_VOCABULARY * self.shape.width


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's ``zero_optimization`` takes memory."""

    bucket: int  # elements of a reduce bucket
    buffers: int  # such buckets that are kept filled at once; 0: gradients are reduced from where they are
    in_place: bool  # a bucket is reduced where it lies, not in a copy
    link_bytes: int = 4  # of an element, on its way over the links


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank's tensors take at one moment, by what they are."""

    moment: str
    weights: int = 0
    optimizer: int = 0  # fp32 masters and two moments of this rank's partition
    gradients: int = 0  # fp32 sums, what is on its way to them, and what is being reduced
    activations: int = 0  # what the backward pass needs of the forward pass
    logits: int = 0  # of the loss, and what is made of them

    @property
    def total(self) -> int:
        return self.lasting + self.passing

    @property
    def lasting(self) -> int:
        """What is there all the time."""
        return self.weights + self.optimizer

    @property
    def passing(self) -> int:
        """What comes and goes in a step."""
        return self.gradients + self.activations + self.logits


def describe_model(settings: ModelSettings, sequence_length: int, compiled: bool) -> Model:
    """The model as it would be built; nothing is allocated."""
    shape = ModelShape(*settings.shape, sequence_length)
    with torch.device("meta"):
        model = GPT2(shape, settings.dropout)
    groups = tuple(sum(each.numel() for each in group["params"]) for group in parameter_groups(model, 0.0))
    return Model(shape, settings.dropout, compiled, groups, flops_per_token(model))


def read_zero(deepspeed_settings: dict[str, Any]) -> Zero:
    """From a DeepSpeed file that ``load_deepspeed_file`` has checked."""
    block = deepspeed_settings["zero_optimization"]
    buffers = (2 if block.get("overlap_comm") else 1) if block.get("contiguous_gradients", True) else 0
    link_bytes = 4 if deepspeed_settings.get("communication_data_type", "fp32") == "fp32" else 2
    return Zero(bucket_size(deepspeed_settings), buffers, not block.get("reduce_scatter", True), link_bytes)


def peak(model: Model, plan: BatchPlan, zero: Zero, accelerator: str) -> Memory:
    """The moment at which one rank's tensors take most."""
    return max(moments(model, plan, zero, accelerator), key=lambda memory: memory.total)


def moments(model: Model, plan: BatchPlan, zero: Zero, accelerator: str) -> Sequence[Memory]:
    """Each moment of a step at which memory may be at its highest.

    Left out are HellaSwag's masks, libraries' own workspaces, and what an allocator cannot use.
    """
    ranks, head, width = plan.world_size, model.head, model.shape.width
    tokens = plan.micro_batch * plan.sequence_length
    partition = _partition(model, ranks)
    weights, optimizer, sums = 2 * partition * ranks, 12 * partition, 4 * model.parameters
    kept = activations(model, plan.micro_batch, accelerator)
    hidden = 2 * tokens * width
    chunk = _chunk(plan, accelerator)
    several = tokens > chunk
    logits = 2 * chunk * PADDED_VOCABULARY
    # Softmax makes an fp32 copy and the result, of some of a chunk's tokens; compiled, all in the logits' own memory.
    softmax = 8 * rows_at_once(chunk, torch.device(accelerator)) * PADDED_VOCABULARY
    losing = logits + (0 if model.compiled else softmax) + (4 * head if several else 0)
    # The head's gradient: a chunk's share in bf16, the sum of several in fp32; a CPU adds a copy of the share in fp32.
    sharing = logits + ((10 if accelerator == "cpu" else 6) * head if several else 2 * head)
    held = sums if plan.accumulation > 1 else 0  # gradient sums of the micro-batches before
    return (
        Memory("loss", weights, optimizer, held, kept + hidden, hidden + max(losing, sharing)),
        # Its backward pass scales both gradients and rounds the head's.
        Memory(
            "loss, backward",
            weights,
            optimizer,
            held,
            kept + hidden,
            2 * hidden + (10 * head if several else 4 * head),
        ),
        # The last layer: the head's gradient, which waits for the embedding's, and those of the MLP's inside.
        Memory("backward", weights, optimizer, held + 2 * head + 5 * hidden + 16 * width * width, kept + hidden),
        # The embedding's gradient in bf16 and fp32, and on its way to that of the micro-batches before.
        Memory("embedding", weights, optimizer, sums + 6 * head + (4 * head if held else 0), 2 * hidden),
        Memory("reduction", weights, optimizer, sums + _reduction(model, zero, ranks)),
        Memory("validation", weights, optimizer, 0, 6 * hidden, logits + softmax),  # no gradients
        # On a CPU the fp32 model, and the first bf16 matrix of it; then the flat copies.
        Memory("start", (4 if accelerator == "cpu" else 2) * model.parameters + 2 * head),
    )


def _reduction(model: Model, zero: Zero, ranks: int) -> int:
    """Bytes beside the sums, which become fewer as buckets are filled: buckets, copies of them, this rank's part.

    A tensor larger than the bucket has no buffer.
    """
    bucket, part = 4 * min(zero.bucket, model.parameters), 4 * _partition(model, ranks)
    large = zero.bucket < model.head
    if zero.buffers == 0:
        beside = bucket + part
    elif zero.in_place:  # there is a part only once a bucket is full, and its sums are gone
        beside = bucket * zero.buffers + (part if large else max(0, part - bucket))
    else:  # sums, copy and buffer together come to the sums and the buffer
        beside = bucket * zero.buffers + part + (4 * model.head if large and ranks > 1 else 0)
    return beside + (bucket // 2 if zero.link_bytes == 2 else 0)


def largest_block(model: Model, plan: BatchPlan, accelerator: str) -> int:
    """Bytes of the largest tensor that comes and goes: a chunk's logits, or the head's gradient in fp32."""
    return max(2 * _chunk(plan, accelerator) * PADDED_VOCABULARY, 4 * model.head)


def activations(model: Model, micro_batch: int, accelerator: str) -> int:
    """Bytes that autograd keeps of one micro-batch, up to the final norm.

    Of a layer, in units of nC bf16 values: the inputs and outputs of two norms (4), q, k and v (3), what attention
    returns (1), the MLP's inside before and after GELU (8). Attention adds a log-sum-exp a head in fp32, norms add
    mean and deviation. Dropout keeps its masks; on a CPU attention with dropout is not fused and keeps, in fp32, three
    matrices of time x time a head and its inputs.
    """
    shape, on_cpu = model.shape, accelerator == "cpu"
    tokens = micro_batch * shape.sequence_length
    values = tokens * shape.width
    layer = 32 * values + 4 * tokens * shape.heads
    outside = 8 * (tokens + micro_batch) + 8 * shape.sequence_length  # token and position numbers, int64
    statistics = (2 * shape.layers + 1) * 2 * tokens * (2 if on_cpu else 4)
    if model.dropout > 0:
        mask = 2 if on_cpu else 1
        layer += 2 * mask * values
        outside += mask * values
        if on_cpu:
            layer += 12 * tokens * shape.sequence_length * shape.heads + 6 * values - 4 * tokens * shape.heads
    return shape.layers * layer + statistics + outside


def snapshot(model: Model, ranks: int, rank: int) -> int:
    """Bytes of the copy in host memory that a save in the background writes from; kept from the first save on."""
    return 12 * _partition(model, ranks) + (2 * model.parameters if rank == 0 else 0)


def _chunk(plan: BatchPlan, accelerator: str) -> int:
    """Tokens whose logits exist at once."""
    tokens = plan.micro_batch * plan.sequence_length
    return min(tokens, chunk_tokens(PADDED_VOCABULARY, torch.device(accelerator)))


def _partition(model: Model, ranks: int) -> int:
    """Parameters of which a rank keeps the optimizer's state, with what fills them up."""
    return sum(_aligned(group, ranks) // ranks for group in model.groups)


def _aligned(group: int, ranks: int) -> int:
    """Elements of a parameter group with the zeros that fill it up."""
    unit = _ALIGNMENT * ranks
    return -(-group // unit) * unit
