"""Memory model of a rank: the tensors that ZeRO-2 of DeepSpeed 0.19.8, the model and its loss hold at the same time.

Symbols below: P parameters, N ranks, n tokens of a micro-batch, C width, L layers, H heads, V rows of the padded
vocabulary, R elements of a reduce bucket, c tokens of a chunk of logits. Weights and activations are bf16.
``benchmarks/plan_accuracy.py`` compares the sums with the allocations of PyTorch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_gpt2.config.batch_plan import BatchPlan
from ds_gpt2.config.deepspeed_config import bucket_size
from ds_gpt2.config.settings import ModelSettings
from ds_gpt2.evaluation.row_batches import batch_tokens, longest_row
from ds_gpt2.evaluation.scoring import REFERENCE_TOKENS
from ds_gpt2.model.gpt2 import GPT2, flops_per_token, parameter_groups
from ds_gpt2.model.loss import chunk_tokens, rows_at_once
from ds_gpt2.model.shape import PADDED_VOCABULARY, ModelShape, sharded_bytes

_ALIGNMENT = 2  # elements per rank: DeepSpeed pads a parameter group to a multiple (nccl_start_alignment_factor)


@dataclass(frozen=True)
class Model:
    """Properties of a GPT-2 model that determine its memory."""

    shape: ModelShape
    dropout: float
    compiled: bool
    groups: tuple[int, ...]  # parameters of each optimizer group
    flops_per_token: float  # forward and backward
    has_ema: bool = False  # the run keeps a moving average of the weights

    @property
    def parameters(self) -> int:
        return self.shape.parameters

    @property
    def head(self) -> int:
        """Parameters of the tied embedding and output head, VC."""
        return PADDED_VOCABULARY * self.shape.width


@dataclass(frozen=True)
class Zero:
    """Settings of DeepSpeed's ``zero_optimization`` that determine memory."""

    bucket: int  # elements of a reduce bucket
    buffers: int  # number of bucket buffers; 0: gradients are reduced without a buffer
    in_place: bool  # a bucket is reduced in place, not in a copy
    link_bytes: int = 4  # bytes per element in a collective


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's tensors at one moment of a step, by kind."""

    moment: str
    weights: int = 0
    optimizer: int = 0  # fp32 masters, two moments and moving average of this rank's partition
    gradients: int = 0  # fp32 sums, gradients that are added to them, and gradients that are being reduced
    activations: int = 0  # saved by the forward pass for the backward pass
    logits: int = 0  # of the loss, and tensors computed from them

    @property
    def total(self) -> int:
        return self.persistent + self.transient

    @property
    def persistent(self) -> int:
        """Bytes allocated during the whole run."""
        return self.weights + self.optimizer

    @property
    def transient(self) -> int:
        """Bytes allocated and freed within a step."""
        return self.gradients + self.activations + self.logits


def describe_model(settings: ModelSettings, sequence_length: int, compiled: bool, has_ema: bool = False) -> Model:
    """Describe the model that the settings define; nothing is allocated."""
    shape = ModelShape(*settings.shape, sequence_length)
    with torch.device("meta"):
        model = GPT2(shape, settings.dropout)
    groups = tuple(sum(each.numel() for each in group["params"]) for group in parameter_groups(model, 0.0))
    return Model(shape, settings.dropout, compiled, groups, flops_per_token(model), has_ema)


def read_zero(deepspeed_settings: dict[str, Any]) -> Zero:
    """Read the settings from a DeepSpeed file that ``load_deepspeed_file`` has checked."""
    block = deepspeed_settings["zero_optimization"]
    buffers = (2 if block.get("overlap_comm") else 1) if block.get("contiguous_gradients", True) else 0
    link_bytes = 4 if deepspeed_settings.get("communication_data_type", "fp32") == "fp32" else 2
    return Zero(bucket_size(deepspeed_settings), buffers, not block.get("reduce_scatter", True), link_bytes)


def peak(model: Model, plan: BatchPlan, zero: Zero, accelerator: str) -> Memory:
    """Return the moment at which one rank's tensors take the most memory."""
    return max(moments(model, plan, zero, accelerator), key=lambda memory: memory.total)


def moments(model: Model, plan: BatchPlan, zero: Zero, accelerator: str) -> Sequence[Memory]:
    """Return each moment of a step at which memory may reach its peak.

    Not included: evaluations on items (see ``evaluation``), workspaces of libraries, and fragmentation of the
    allocator.
    """
    ranks, head, width = plan.world_size, model.head, model.shape.width
    tokens = plan.micro_batch * plan.sequence_length
    partition = _partition(model, ranks)
    weights, optimizer, sums = 2 * partition * ranks, sharded_bytes(model.has_ema) * partition, 4 * model.parameters
    saved = activations(model, plan.micro_batch, accelerator)
    hidden = 2 * tokens * width
    chunk = _chunk(plan, accelerator)
    is_chunked = tokens > chunk
    logits = 2 * chunk * PADDED_VOCABULARY
    # Softmax allocates an fp32 copy and the result for some tokens of a chunk; compiled, it reuses the logits' memory.
    softmax = 8 * rows_at_once(chunk, torch.device(accelerator)) * PADDED_VOCABULARY
    loss_bytes = logits + (0 if model.compiled else softmax) + (4 * head if is_chunked else 0)
    # Gradient of the head: a chunk's part in bf16, the sum of several in fp32; a CPU adds an fp32 copy of the part.
    head_gradient_bytes = logits + ((10 if accelerator == "cpu" else 6) * head if is_chunked else 2 * head)
    previous_sums = sums if plan.accumulation > 1 else 0  # gradient sums of previous micro-batches
    return (
        Memory(
            "loss", weights, optimizer, previous_sums, saved + hidden, hidden + max(loss_bytes, head_gradient_bytes)
        ),
        # The backward pass of the loss scales both gradients and rounds the head's.
        Memory(
            "loss, backward",
            weights,
            optimizer,
            previous_sums,
            saved + hidden,
            2 * hidden + (10 * head if is_chunked else 4 * head),
        ),
        # The last layer: the head's gradient, which is kept until the embedding's, and those inside the MLP.
        Memory(
            "backward", weights, optimizer, previous_sums + 2 * head + 5 * hidden + 16 * width * width, saved + hidden
        ),
        # The embedding's gradient in bf16 and fp32, while it is added to that of previous micro-batches.
        Memory("embedding", weights, optimizer, sums + 6 * head + (4 * head if previous_sums else 0), 2 * hidden),
        Memory("reduction", weights, optimizer, sums + _reduction(model, zero, ranks)),
        Memory("validation", weights, optimizer, 0, 6 * hidden, logits + softmax),  # no gradients
        # On a CPU the fp32 model and its first bf16 matrix; then the flat copies.
        Memory("start", (4 if accelerator == "cpu" else 2) * model.parameters + 2 * head),
    )


def _reduction(model: Model, zero: Zero, ranks: int) -> int:
    """Return the bytes of buckets, their copies, and this rank's partition, in addition to the gradient sums.

    The sums shrink while buckets are filled. A tensor larger than the bucket has no buffer.
    """
    bucket, part = 4 * min(zero.bucket, model.parameters), 4 * _partition(model, ranks)
    large = zero.bucket < model.head
    if zero.buffers == 0:
        additional = bucket + part
    elif zero.in_place:  # the partition exists only after a bucket is full and its sums are freed
        additional = bucket * zero.buffers + (part if large else max(0, part - bucket))
    else:  # sums, copy and buffer together are as large as the sums and the buffer
        additional = bucket * zero.buffers + part + (4 * model.head if large and ranks > 1 else 0)
    return additional + (bucket // 2 if zero.link_bytes == 2 else 0)


def evaluation(model: Model, accelerator: str) -> int:
    """Return the most bytes, besides weights and optimizer, of an evaluation on items with several endings.

    A batch has at most n tokens, in rows of at most t tokens. Its forward pass holds 14 nC values, 10 of them in the
    MLP, and the mask of attention, bool and bf16, 3 nt bytes. Then the logits of a chunk exist, as in the loss. The
    reference, which scores items again one at a time, holds the logits of its tokens in bf16 and twice in fp32.

    Not counted: the tables of targets and log-likelihoods, at most 41 bytes for each token of a batch and ending. With
    five endings, they take 3 MB on a GPU.
    """
    row = longest_row(model.shape.sequence_length)
    tokens = max(batch_tokens(accelerator), row)
    hidden, mask = 2 * tokens * model.shape.width, tokens * row
    chunk = min(tokens, chunk_tokens(PADDED_VOCABULARY, torch.device(accelerator)))
    logits = (2 * chunk + 8 * rows_at_once(chunk, torch.device(accelerator))) * PADDED_VOCABULARY
    return max(14 * hidden + 3 * mask, 2 * hidden + mask + logits, 10 * REFERENCE_TOKENS * PADDED_VOCABULARY)


def largest_block(model: Model, plan: BatchPlan, accelerator: str) -> int:
    """Return the bytes of the largest temporary tensor: a chunk's logits, or the head's gradient in fp32."""
    return max(2 * _chunk(plan, accelerator) * PADDED_VOCABULARY, 4 * model.head)


def activations(model: Model, micro_batch: int, accelerator: str) -> int:
    """Return the bytes that autograd saves for one micro-batch, up to the final norm.

    Per layer, in units of nC bf16 values: inputs and outputs of two norms (4), q, k and v (3), output of attention
    (1), hidden values of the MLP before and after GELU (8). Attention adds one fp32 log-sum-exp per head and token,
    norms add mean and standard deviation. Dropout saves its masks. On a CPU, attention with dropout is not fused: it
    saves three fp32 matrices of time x time per head, and its inputs in fp32.
    """
    shape, on_cpu = model.shape, accelerator == "cpu"
    tokens = micro_batch * shape.sequence_length
    values = tokens * shape.width
    layer = 32 * values + 4 * tokens * shape.heads
    outside = 8 * (tokens + micro_batch) + 8 * shape.sequence_length  # token and position indices, int64
    statistics = (2 * shape.layers + 1) * 2 * tokens * (2 if on_cpu else 4)
    if model.dropout > 0:
        mask = 2 if on_cpu else 1
        layer += 2 * mask * values
        outside += mask * values
        if on_cpu:
            layer += 12 * tokens * shape.sequence_length * shape.heads + 6 * values - 4 * tokens * shape.heads
    return shape.layers * layer + statistics + outside


def snapshot(model: Model, ranks: int, rank: int) -> int:
    """Return the bytes of the copy in host memory that a background save writes from; retained after the first save."""
    return sharded_bytes(model.has_ema) * _partition(model, ranks) + (2 * model.parameters if rank == 0 else 0)


def _chunk(plan: BatchPlan, accelerator: str) -> int:
    """Return the number of tokens whose logits exist at the same time."""
    tokens = plan.micro_batch * plan.sequence_length
    return min(tokens, chunk_tokens(PADDED_VOCABULARY, torch.device(accelerator)))


def _partition(model: Model, ranks: int) -> int:
    """Return the number of parameters in a rank's partition of the optimizer state, padding included."""
    return sum(_aligned(group, ranks) // ranks for group in model.groups)


def _aligned(group: int, ranks: int) -> int:
    """Return the elements of a parameter group, padding included."""
    unit = _ALIGNMENT * ranks
    return -(-group // unit) * unit
