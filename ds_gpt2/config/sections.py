"""The sections of a run's settings: the type, default and limits of each setting.

Add a setting here as a field of its section. docs/settings.md documents each field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ds_gpt2.config.field_types import (
    AboveOne,
    Count,
    Float,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Size,
)
from ds_gpt2.run_dir.journal import INCIDENTS, KINDS

RUNS, CHECKPOINTS = "runs", "checkpoints"  # default directories, in the project's directory

_SMALLEST_RATE = 0.001  # MB/s
_MAX_SOURCES = 100  # of a mixture
MIXTURE_PERIOD = 1000  # windows in which the shares of a mixture are exact
_MAX_WINDOWS = 10**7  # per step: their indices take 80 MB on each rank

# (layers, heads, width). 124M to 1558M: OpenAI's GPT-2 checkpoints, Radford et al. 2019 table 2.
PRESETS: dict[str, tuple[int, int, int]] = {
    "7M": (4, 4, 128),
    "30M": (6, 6, 384),
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}

DEFAULT_ALERTS = (*sorted(INCIDENTS), "backup_ok", "done", "launch", "stop")


class RunSettings(Section):
    """The name, location, seed and device of a run."""

    name: str = "run"  # directory below run.dir and checkpoint.dir
    seed: Seed = 1337  # initial weights, data order, dropout
    dir: Path = Path(RUNS)  # parent of the run's directory
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: GPUs if there are any
    compile: bool | Literal["auto"] = "auto"  # use torch.compile; auto: on a GPU only
    deterministic: bool = False  # bitwise reproducible steps on a GPU too

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("must be letters, digits, '.', '_' or '-' (at most 100), the first a letter or digit")
        return name


class ModelSettings(Section):
    """The shape of the model, its dropout, and the weights it starts from."""

    preset: str | None = None  # one of PRESETS, or give layers, heads and width
    layers: Size | None = None  # transformer blocks
    heads: Size | None = None  # attention heads per layer
    width: Size | None = None  # of the residual stream; a multiple of heads
    dropout: Fraction = 0.0  # probability
    init_from: str | None = None  # initial weights: a directory, an exported file or a name on the Hugging Face hub

    @model_validator(mode="after")
    def _one_shape(self) -> ModelSettings:
        own = (self.layers, self.heads, self.width)
        if self.preset is not None:
            if self.preset not in PRESETS:
                raise ValueError(f"model.preset is {self.preset!r}: known are {', '.join(PRESETS)}")
            if any(value is not None for value in own):
                raise ValueError("model.preset and model.layers/heads/width exclude each other: remove one")
        elif any(value is None for value in own):
            raise ValueError(f"give model.preset ({', '.join(PRESETS)}) or all of model.layers, heads and width")
        _, heads, width = self.shape
        if width % heads:
            raise ValueError(f"model.width {width} is not divisible by model.heads {heads}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, heads, width)."""
        if self.preset is not None:
            return PRESETS[self.preset]
        assert self.layers and self.heads and self.width
        return self.layers, self.heads, self.width


class SourceSettings(Section):
    """One source of a mixture."""

    dir: Path  # shards written by `prepare`, by llm.c or by build-nanogpt
    weight: PositiveFloat  # its share of the windows is weight / sum of the weights
    epochs: PositiveFloat | None = None  # the most passes over it that the run may make; None: any number
    name: str | None = None  # in metrics and messages; None: the name of the directory

    @property
    def label(self) -> str:
        """The name of the source in metrics and messages."""
        return self.dir.name if self.name is None else self.name

    @model_validator(mode="after")
    def _plain_label(self) -> SourceSettings:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}", self.label):
            raise ValueError(f"{self.label!r} is not the name of a source: set name, of letters, digits, '.', '_', '-'")
        return self


class StageSettings(Section):
    """Another mixture from one step on."""

    from_step: Annotated[PositiveInt, Field(ge=2)]  # the first step that trains on it
    mixture: Annotated[tuple[SourceSettings, ...], Field(min_length=1, max_length=_MAX_SOURCES)]


class DataSettings(Section):
    """The data to train on: one directory, or a mixture of several."""

    dir: Path | None = None  # shards written by `prepare`, by llm.c or by build-nanogpt
    mixture: Annotated[tuple[SourceSettings, ...], Field(max_length=_MAX_SOURCES)] = ()
    stages: Annotated[tuple[StageSettings, ...], Field(max_length=_MAX_SOURCES)] = ()  # later mixtures, by step

    @model_validator(mode="after")
    def _one_kind(self) -> DataSettings:
        if (self.dir is None) != bool(self.mixture):
            problem = "both are given" if self.mixture else "neither is given"
            raise ValueError(
                f"give data.dir, the directory of a dataset, or data.mixture, a list of several: {problem}"
            )
        if self.stages and not self.mixture:
            raise ValueError("data.stages needs data.mixture, which holds from step 1 on")
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"data.stages must be in the order of from_step, which is {', '.join(map(str, steps))}")
        _check_sources(self.mixtures)
        return self

    @property
    def mixtures(self) -> tuple[tuple[SourceSettings, ...], ...]:
        """The mixture of each stage; of one directory, a mixture of it alone."""
        if self.dir is not None:
            return ((SourceSettings.model_construct(dir=self.dir, weight=1.0, epochs=None, name=None),),)
        return self.mixture, *(stage.mixture for stage in self.stages)

    @property
    def sources(self) -> tuple[SourceSettings, ...]:
        """Every source of any stage once, in the order of their first appearance."""
        found: dict[str, SourceSettings] = {}
        for mixture in self.mixtures:
            for source in mixture:
                found.setdefault(source.label, source)
        return tuple(found.values())


def _check_sources(mixtures: tuple[tuple[SourceSettings, ...], ...]) -> None:
    """Check that names are unique and mean the same directory in every stage, and that no share is too small."""
    directories: dict[str, Path] = {}
    for mixture in mixtures:
        labels = [source.label for source in mixture]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"data.mixture has two sources named {twice}: give one of them another name")
        total = sum(source.weight for source in mixture)
        for source in mixture:
            if directories.setdefault(source.label, source.dir) != source.dir:
                raise ValueError(f"data.stages: {source.label} is already another directory: give one of them a name")
            if source.weight / total < 1 / MIXTURE_PERIOD:
                raise ValueError(
                    f"data.mixture: {source.label} has less than one window in {MIXTURE_PERIOD:,}: raise its weight"
                )


class BatchSettings(Section):
    """The number of tokens of a step, and how they are divided into windows and micro-batches."""

    tokens_per_step: PositiveInt = 524_288  # over all ranks; gradient accumulation is derived from it
    micro_batch: Size = 16  # windows per forward/backward on one rank
    sequence_length: Size = 1024  # tokens per window

    @model_validator(mode="after")
    def _not_too_many_windows(self) -> BatchSettings:
        if self.tokens_per_step // self.sequence_length > _MAX_WINDOWS:
            raise ValueError(f"batch.tokens_per_step is more than {_MAX_WINDOWS:,} windows of batch.sequence_length")
        return self


class ScheduleSettings(Section):
    """The length of the run, and the learning rate at each step: linear warm-up, then a decay."""

    steps: Annotated[PositiveInt, Field(le=100_000_000)] | None = None  # of the whole run; give steps or epochs
    epochs: Annotated[PositiveFloat, Field(le=100_000)] | None = None  # passes over the data
    warmup_steps: Count = 715  # steps of linear warm-up
    max_lr: PositiveFloat = 6e-4  # learning rate after the warm-up
    min_lr: NonNegativeFloat = 6e-5  # learning rate at the last step
    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warm-up; wsd: decay at the end only
    decay_steps: PositiveInt | None = None  # wsd: steps of the decay at the end of the run
    decay_fraction: Annotated[Float, Field(gt=0, le=1)] | None = None  # wsd: the same as a part of the run's steps
    decay_shape: Literal["linear", "sqrt", "cosine"] | None = None  # wsd: curve of the decay; None: linear

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of schedule.steps and schedule.epochs")
        if self.min_lr > self.max_lr:
            raise ValueError(f"schedule.min_lr {self.min_lr} is above schedule.max_lr {self.max_lr}")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"schedule.warmup_steps {self.warmup_steps} must be below schedule.steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _decay_of_wsd(self) -> ScheduleSettings:
        names = ("decay_steps", "decay_fraction", "decay_shape")
        given = [f"schedule.{name}" for name in names if getattr(self, name) is not None]
        if given and self.shape != "wsd":
            raise ValueError(f"{given[0]} is for schedule.shape=wsd; with {self.shape} set {given[0]}=null")
        if self.decay_steps is not None and self.decay_fraction is not None:
            raise ValueError("give schedule.decay_steps or schedule.decay_fraction, not both")
        return self

    @property
    def decay_curve(self) -> str:
        """The curve of the decay: ``linear``, ``sqrt`` or ``cosine``."""
        return (self.decay_shape or "linear") if self.shape == "wsd" else self.shape


class OptimizerSettings(Section):
    """The constants of AdamW, and gradient clipping."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.95)  # decay rates of the first and second moment
    eps: Annotated[Float, Field(ge=1e-38, le=1)] = 1e-8  # added to the denominator, fp32
    weight_decay: Annotated[NonNegativeFloat, Field(le=1000)] = 0.1  # on 2-D tensors only
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0 turns clipping off


class EmaSettings(Section):
    """The exponential moving average of the weights."""

    decay: Annotated[Float, Field(gt=0, lt=1)] | None = None  # share of the old average at an update; None: no average

    @property
    def is_on(self) -> bool:
        """Whether the run keeps the average."""
        return self.decay is not None


class BackupSettings(Section):
    """Which checkpoints are copied to a backup storage, how often, and how many of these backups are kept."""

    to: str | None = None  # a directory, or a URL such as s3://bucket/folder; None: no backups
    roles: tuple[Literal["latest", "epoch", "best"], ...] = ("latest", "epoch", "best")  # of the checkpoints
    every: PositiveInt = 1000  # minimum number of steps between two backups of the newest checkpoint
    best_every_hours: NonNegativeFloat = 168.0  # minimum time between two backups of the best checkpoint
    keep: PositiveInt = 3  # newest backups of rolling checkpoints; those of epochs and of the best are not deleted

    @field_validator("to")
    @classmethod
    def _no_secrets(cls, to: str | None) -> str | None:
        """Refuse a password or key: settings are written to files and logs."""
        if to is not None and to.startswith("memory:"):
            raise ValueError("backups in memory are lost when the process ends: give a directory or a URL")
        if to is not None and "://" in to and re.search(r"://[^/]*@|[?&;]", to):
            raise ValueError("must not hold a password or key: give it in the environment (FSSPEC_..., AWS_..., ...)")
        return to


class CheckpointSettings(Section):
    """When checkpoints are saved, what they contain, and which ones are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    dir: Path = Path(CHECKPOINTS)  # parent of the directory of the run's checkpoints
    every: Count = 250  # steps; 0 saves at the end only
    keep_last: PositiveInt = 10  # number of newest rolling checkpoints to keep
    keep_every: Count = 0  # steps; rolling checkpoints at multiples of it are never deleted; 0: none
    keep_epochs: PositiveInt | Literal["all"] = "all"  # number of newest epoch checkpoints to keep
    keep_best: bool = True  # keep the checkpoint with the lowest validation loss
    epochs_as: Literal["full", "weights"] = "full"  # "weights": fp32, 4 bytes per parameter; not resumable
    best_as: Literal["full", "weights"] = "full"  # the same for the best checkpoint
    min_free_gb: NonNegativeFloat = 1.0  # GB (1e9 bytes) of disk space that must remain free after a save
    in_background: bool = Field(default=True, alias="async")  # write while training continues
    write_mb_per_s: NonNegativeFloat = 0.0  # MB/s (1e6 bytes); limit of each rank, to spare a shared disk; 0: no limit
    backup: BackupSettings = BackupSettings()

    @field_validator("write_mb_per_s")
    @classmethod
    def _not_too_slow(cls, rate: float) -> float:
        if 0 < rate < _SMALLEST_RATE:
            raise ValueError(f"must be 0 (no limit) or at least {_SMALLEST_RATE}")
        return rate


class ValidationSettings(Section):
    """The validation loss during training."""

    every: Count = 250  # steps; 0: never
    tokens: PositiveInt = 2_097_152  # of the fixed validation set, rounded down to whole windows


class SamplesSettings(Section):
    """The text that is generated during training."""

    every: Count = 250  # steps; 0: never
    prompts: tuple[str, ...] = ("Hello, I'm a language model,",)  # texts to continue
    per_prompt: Annotated[PositiveInt, Field(le=1000)] = 2  # continuations of each prompt
    tokens: Annotated[PositiveInt, Field(le=100_000)] = 48  # new tokens per continuation
    temperature: PositiveFloat = 0.8  # of the sampling
    top_k: PositiveInt = 50  # sample from this many most probable tokens


class HellaswagSettings(Section):
    """The HellaSwag evaluation during training."""

    every: Count = 0  # steps; 0: never
    path: Path = Path("data/hellaswag/hellaswag_val.jsonl")  # written by `prepare hellaswag`
    items: PositiveInt | None = None  # number of items, from the first; None: all 10,042
    text: Literal["original", "cleaned"] = "original"  # original: as in llm.c; cleaned: as in lm-evaluation-harness


class HistogramsSettings(Section):
    """The histograms of weights and gradients in TensorBoard."""

    every: Count = 0  # steps; 0: never
    norms: bool = False  # also write the norms of parameters and gradients as scalars
    layers: PositiveInt = 12  # at most this many layers, evenly spaced, including the first and the last


class MonitorSettings(Section):
    """TensorBoard's event files."""

    tensorboard: bool = True  # write event files
    dir: Path | None = None  # parent directory of the event files; None: the run's directory


class GuardSettings(Section):
    """Which anomalies of training are detected, and what follows: an alert, a skipped update or a rollback."""

    spike: Literal["off", "alert", "skip", "rollback"] = "alert"  # one loss far above the recent losses
    spike_z: PositiveFloat = 10.0  # robust standard deviations above the median of recent losses
    grad_spike: Literal["off", "alert", "skip"] = "alert"  # a gradient norm far above the recent norms
    grad_spike_z: PositiveFloat = 10.0  # robust standard deviations above the median of recent norms
    divergence: Literal["off", "alert", "rollback"] = "rollback"  # `divergence_steps` such losses in a row
    divergence_steps: PositiveInt = 20  # spikes in a row that count as divergence
    skipped_run: Literal["off", "alert", "rollback"] = "rollback"  # `skipped_run_steps` skipped updates in a row
    skipped_run_steps: PositiveInt = 10  # skipped updates in a row
    frozen: Literal["off", "alert", "rollback"] = "alert"  # no weight changed between two saves
    drift: Literal["off", "alert", "rollback"] = "rollback"  # the ranks' weights differ at a save
    stuck_data: Literal["off", "alert", "rollback"] = "alert"  # a step received the data of the previous step


class SupervisorSettings(Section):
    """When a run is restarted, when a rank counts as hung, and how long a stop may take."""

    restarts: Count = 8  # number in a row without progress; 0: never restart
    backoff_seconds: NonNegativeFloat = 5.0  # before the first restart; doubled before each further restart
    longest_backoff_seconds: NonNegativeFloat = 600.0  # limit of the doubled time
    hang_factor: AboveOne = 20.0  # a rank counts as hung after this many times the usual step time ...
    hang_seconds: PositiveFloat = 300.0  # ... but not earlier than this
    patience_minutes: PositiveFloat = 45.0  # longest silence while starting, evaluating or saving
    stop_seconds: PositiveFloat = 120.0  # time to exit after a stop request; then processes are killed
    skip_data: bool = False  # skip the data of a step at which the run crashed repeatedly


class ClusterSettings(Section):
    """The machines of a run that uses several."""

    hostfile: Path | None = None  # lines "HOST slots=N"; null: this machine, or the nodes of the Slurm job with srun
    launch: Literal["ssh", "srun"] = "ssh"  # how the agent of each host is started
    interface: str | None = None  # network interface of the ranks; null: the one that leads to the first host
    min_nodes: PositiveInt = 1  # a restart waits until so many hosts answer


class AlertSettings(Section):
    """Which events are sent as messages, and how. Addresses are in the environment or in ``urls_file``, never here."""

    kinds: tuple[str, ...] = DEFAULT_ALERTS  # kinds of journal events that are sent
    per_hour: PositiveInt = 12  # maximum number of messages; further events are summarized in the next one
    command: str | None = None  # shell command run for each message, which it receives on stdin
    urls_file: Path | None = None  # Apprise URLs, one per line; readable by the owner only
    disk_days: NonNegativeFloat = 3.0  # alert when the disk will be full within this many days

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ValueError(f"{', '.join(unknown)} is not a kind of event: known kinds are {', '.join(KINDS)}")
        return kinds
