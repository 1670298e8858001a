"""The settings of a run: a YAML file plus ``key=value`` overrides, typed, checked once and frozen.

Paths in a YAML file are relative to the project's directory, so that a run means the same from anywhere; paths in
an override are relative to the working directory. ``~`` and ``$VARIABLE`` are expanded in both.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from ds_gpt2.common import strict_yaml
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only
from ds_gpt2.common.formatting import uncapitalized
from ds_gpt2.common.paths import expanded
from ds_gpt2.config.model_names import resolve
from ds_gpt2.run_dir.journal import INCIDENTS, KINDS

PROJECT_DIR = Path(__file__).resolve().parents[2]

_LARGEST_FILE = 1_000_000  # bytes of a settings file


def _whole_number(value: object) -> object:
    """Text as a whole number: decimal, without leading zeros; ``_`` may separate groups of digits."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)", value, re.ASCII):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number, such as 250 or 524_288")
    return value


def _decimal_number(value: object) -> object:
    """Text as a number: ``0.1``, ``1e-4``, ``.5`` or a whole number."""
    number = r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?"
    if isinstance(value, str) and re.search("[0-9]", value) and re.fullmatch(number, value, re.ASCII):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number, such as 0.1 or 6e-4")
    return value


_Int = Annotated[int, BeforeValidator(_whole_number)]
_Float = Annotated[float, BeforeValidator(_decimal_number)]

# Larger numbers than any run needs, within which no arithmetic overflows and no memory is used up.
_MOST, _LEAST = 10**9, 1e-12
_LEAST_RATE = 0.001  # MB/s
_MOST_WINDOWS = 10**7  # in one step: their numbers take 80 MB on each rank

PositiveInt = Annotated[_Int, Field(gt=0, le=_MOST)]
Count = Annotated[_Int, Field(ge=0, le=_MOST)]
Seed = Annotated[_Int, Field(ge=0, le=10**15)]
Size = Annotated[_Int, Field(gt=0, le=10**6)]  # of one dimension of a tensor
PositiveFloat = Annotated[_Float, Field(ge=_LEAST, le=_MOST, allow_inf_nan=False)]
NonNegativeFloat = Annotated[_Float, Field(ge=0, le=_MOST, allow_inf_nan=False)]
AboveOne = Annotated[_Float, Field(gt=1, le=_MOST, allow_inf_nan=False)]
Fraction = Annotated[_Float, Field(ge=0, lt=1)]

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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSettings(_Section):
    name: str = "run"  # directory below run.dir and checkpoint.dir
    seed: Seed = 1337  # initial weights, data order, dropout
    dir: Path = Path("runs")
    device: Literal["auto", "cuda", "cpu"] = "auto"
    compile: bool | Literal["auto"] = "auto"  # the model, by torch.compile; auto: on a GPU
    deterministic: bool = False  # ask for the same bits from the same state on a GPU too

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("must be letters, digits, '.', '_' or '-', beginning with a letter or digit, at most 100")
        return name


class ModelSettings(_Section):
    preset: str | None = None  # one of PRESETS, or give layers, heads and width
    layers: Size | None = None
    heads: Size | None = None
    width: Size | None = None
    dropout: Fraction = 0.0
    init_from: str | None = None  # a directory, an export or a name on the Hugging Face hub: a new run's first weights

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


class DataSettings(_Section):
    dir: Path  # a directory that `prepare` made, or one of llm.c's or build-nanogpt's shards


class BatchSettings(_Section):
    tokens_per_step: PositiveInt = 524_288  # over all ranks; the accumulation is derived from it
    micro_batch: Size = 16  # windows per forward/backward on one rank
    sequence_length: Size = 1024

    @model_validator(mode="after")
    def _not_too_many_windows(self) -> BatchSettings:
        if self.tokens_per_step // self.sequence_length > _MOST_WINDOWS:
            raise ValueError(f"batch.tokens_per_step is more than {_MOST_WINDOWS:,} windows of batch.sequence_length")
        return self


class ScheduleSettings(_Section):
    steps: Annotated[PositiveInt, Field(le=100_000_000)] | None = None  # give steps or epochs
    epochs: Annotated[PositiveFloat, Field(le=100_000)] | None = None
    warmup_steps: Count = 715
    max_lr: PositiveFloat = 6e-4
    min_lr: NonNegativeFloat = 6e-5

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of schedule.steps and schedule.epochs")
        if self.min_lr > self.max_lr:
            raise ValueError(f"schedule.min_lr {self.min_lr} is above schedule.max_lr {self.max_lr}")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"schedule.warmup_steps {self.warmup_steps} must be below schedule.steps {self.steps}")
        return self


class OptimizerSettings(_Section):
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[_Float, Field(ge=1e-38, le=1)] = 1e-8  # fp32
    weight_decay: Annotated[NonNegativeFloat, Field(le=1000)] = 0.1  # on 2-D tensors only
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0 turns clipping off


class BackupSettings(_Section):
    to: str | None = None  # a directory, or a URL such as s3://bucket/folder; None: no backups
    roles: tuple[Literal["latest", "epoch", "best"], ...] = ("latest", "epoch", "best")
    every: PositiveInt = 1000  # steps that lie at least between two copies of the newest checkpoint
    best_every_hours: NonNegativeFloat = 168.0  # that lie at least between two copies of the best one
    keep: PositiveInt = 3  # newest copies of rolling checkpoints; those of epochs and of the best stay

    @field_validator("to")
    @classmethod
    def _no_secrets(cls, to: str | None) -> str | None:
        """Settings are written to files and logs."""
        if to is not None and to.startswith("memory:"):
            raise ValueError("memory is gone when the process ends: give a directory or a store")
        if to is not None and "://" in to and re.search(r"://[^/]*@|[?&;]", to):
            raise ValueError("must not hold a password or key: give it in the environment (FSSPEC_..., AWS_..., ...)")
        return to


class CheckpointSettings(_Section):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    dir: Path = Path("checkpoints")
    every: Count = 250  # steps; 0 saves at the end only
    keep_last: PositiveInt = 10  # newest rolling checkpoints
    keep_every: Count = 0  # steps; rolling checkpoints at multiples of it are kept for good; 0: none
    keep_epochs: PositiveInt | Literal["all"] = "all"  # one at the end of each epoch; the newest so many
    keep_best: bool = True  # by validation loss
    epochs_as: Literal["full", "weights"] = "full"  # "weights": fp32 weights alone, 4 bytes a parameter; no resuming
    best_as: Literal["full", "weights"] = "full"
    min_free_gb: NonNegativeFloat = 1.0  # a save must leave so much of the disk free
    in_background: bool = Field(default=True, alias="async")  # write while training goes on
    write_mb_per_s: NonNegativeFloat = 0.0  # of one rank, to spare a shared disk; 0: as fast as it goes
    backup: BackupSettings = BackupSettings()

    @field_validator("write_mb_per_s")
    @classmethod
    def _not_too_slow(cls, rate: float) -> float:
        if 0 < rate < _LEAST_RATE:
            raise ValueError(f"must be 0 (no limit) or at least {_LEAST_RATE}")
        return rate


class ValidationSettings(_Section):
    every: Count = 250
    tokens: PositiveInt = 2_097_152  # size of the fixed validation set, rounded down to whole windows


class SamplesSettings(_Section):
    every: Count = 250
    prompts: tuple[str, ...] = ("Hello, I'm a language model,",)
    per_prompt: Annotated[PositiveInt, Field(le=1000)] = 2  # different continuations of each
    tokens: Annotated[PositiveInt, Field(le=100_000)] = 48  # of a continuation
    temperature: PositiveFloat = 0.8
    top_k: PositiveInt = 50


class HellaswagSettings(_Section):
    every: Count = 0  # steps; 0: not at all
    path: Path = Path("data/hellaswag/hellaswag_val.jsonl")  # `prepare hellaswag` puts it there
    items: PositiveInt | None = None  # the first so many; None: all 10,042
    text: Literal["original", "cleaned"] = "original"  # as llm.c and build-nanogpt, or as lm-evaluation-harness has it


class HistogramsSettings(_Section):
    every: Count = 0  # steps; 0: not at all
    norms: bool = False  # the norms of parameters and gradients too, as scalars
    layers: PositiveInt = 12  # at most so many of the model's, spread evenly, the first and the last among them


class MonitorSettings(_Section):
    tensorboard: bool = True
    dir: Path | None = None  # event files go below; default: the run's directory


class GuardSettings(_Section):
    """What is done where something is wrong with the training itself."""

    spike: Literal["off", "alert", "skip", "rollback"] = "alert"  # one loss far above the recent ones
    spike_z: PositiveFloat = 10.0  # robust standard deviations above their median
    divergence: Literal["off", "alert", "rollback"] = "rollback"  # that many such losses one after another
    divergence_steps: PositiveInt = 20
    skipped_run: Literal["off", "alert", "rollback"] = "rollback"  # that many updates skipped one after another
    skipped_run_steps: PositiveInt = 10
    frozen: Literal["off", "alert", "rollback"] = "alert"  # no weight has changed between two saves
    drift: Literal["off", "alert", "rollback"] = "rollback"  # the ranks' weights are not the same at a save
    stuck_data: Literal["off", "alert", "rollback"] = "alert"  # a step was given the data of the one before


class SupervisorSettings(_Section):
    restarts: Count = 8  # one after another without getting further; 0: none at all
    backoff_seconds: NonNegativeFloat = 5.0  # before the first of them, and twice as long before each next
    longest_backoff_seconds: NonNegativeFloat = 600.0
    hang_factor: AboveOne = 20.0  # times the run's usual step that a step may take
    hang_seconds: PositiveFloat = 300.0  # but it may always take so long
    patience_minutes: PositiveFloat = 45.0  # without progress in starting, evaluating or saving
    stop_seconds: PositiveFloat = 120.0  # processes that should have ended are killed after so long
    skip_data: bool = False  # leave out the data of a step at which the run has crashed again and again


class AlertSettings(_Section):
    """Where messages go is told by the environment or a file, never here: see docs/operations.md."""

    kinds: tuple[str, ...] = DEFAULT_ALERTS  # kinds of the journal's events
    per_hour: PositiveInt = 12  # messages; what comes beyond is summed up in the next one
    command: str | None = None  # run by the shell for each message, which it gets on stdin
    urls_file: Path | None = None  # apprise's addresses, one a line; readable by its owner only
    disk_days: NonNegativeFloat = 3.0  # tell when the disk lasts no longer than so many days

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ValueError(f"{', '.join(unknown)} is no kind of event: known are {', '.join(KINDS)}")
        return kinds


class Settings(_Section):
    """Everything a run is told. Progress and live objects never live here."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    data: DataSettings
    batch: BatchSettings = BatchSettings()
    schedule: ScheduleSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    hellaswag: HellaswagSettings = HellaswagSettings()
    samples: SamplesSettings = SamplesSettings()
    histograms: HistogramsSettings = HistogramsSettings()
    monitor: MonitorSettings = MonitorSettings()
    guards: GuardSettings = GuardSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    alerts: AlertSettings = AlertSettings()
    deepspeed: Path = Path("ds_configs/zero2_bf16.json")

    @property
    def run_dir(self) -> Path:
        """``runs/<run>``: log, metrics, event files, what was started and how."""
        return self.run.dir / self.run.name

    @property
    def checkpoint_dir(self) -> Path:
        """``checkpoints/<run>``: this run's checkpoints and its ``latest`` pointer."""
        return self.checkpoint.dir / self.run.name

    @property
    def tensorboard_dir(self) -> Path:
        return self.monitor.dir / self.run.name if self.monitor.dir else self.run_dir / "tensorboard"

    @property
    def output_dirs(self) -> tuple[Path, ...]:
        """Everything a run writes is below these."""
        return self.run_dir, self.checkpoint_dir, self.tensorboard_dir

    @property
    def shared_output_dirs(self) -> tuple[Path, ...]:
        """What the run writes to outside of its own directory, so that two runs may meet there."""
        return tuple(path for path in self.output_dirs[1:] if not path.is_relative_to(self.run_dir))


PATH_KEYS = (
    "run.dir",
    "model.init_from",
    "data.dir",
    "checkpoint.dir",
    "checkpoint.backup.to",
    "hellaswag.path",
    "monitor.dir",
    "alerts.urls_file",
    "deepspeed",
)


_MAY_BE_SECRET = frozenset({"checkpoint.backup.to", "alerts.command"})  # values that are not shown in errors


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def load_settings(
    path: Path, overrides: Mapping[str, str] | None = None, *, project_dir: Path = PROJECT_DIR, cwd: Path | None = None
) -> Settings:
    """Read a run's YAML, apply ``key=value`` overrides, check everything.

    Args:
        path: the YAML file; without a ``run.name`` in it, the file's stem names the run.
        overrides: dotted key to the text typed for it (``3``, ``1e-4``, ``[a, b]``).
        project_dir: what relative paths in the file are relative to.
        cwd: what relative paths in overrides are relative to (default: the working directory).

    Raises:
        UserError: no such file, no valid YAML, an unknown key, a wrong type or an impossible value.
    """
    return settings_of(read_tree(path), path, overrides, project_dir=project_dir, cwd=cwd)


def settings_of(
    tree: dict[str, Any],
    path: Path,
    overrides: Mapping[str, str] | None = None,
    *,
    project_dir: Path = PROJECT_DIR,
    cwd: Path | None = None,
    expand: bool = True,
) -> Settings:
    """As ``load_settings``, from the content of the file.

    Args:
        tree: nested sections of text, see ``read_tree``.
        path: where it comes from.
        expand: ``~`` and variables in the file's paths.
    """
    tree = _without_nulls(Settings, tree)
    _make_absolute(tree, project_dir, expand)
    typed: dict[str, Any] = {}
    for key, text in (overrides or {}).items():
        _set_dotted(typed, key, _parse_value(key, text))
    typed = _without_nulls(Settings, typed)
    _make_absolute(typed, cwd or Path.cwd())
    tree = _merged(tree, typed)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
        run.setdefault("dir", str(project_dir / "runs"))
    _default_path(tree, "checkpoint", "dir", project_dir / "checkpoints")
    _default_path(tree, "hellaswag", "path", project_dir / "data" / "hellaswag" / "hellaswag_val.jsonl")
    tree.setdefault("deepspeed", str(project_dir / "ds_configs" / "zero2_bf16.json"))
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{_source(error, path, overrides or {})}: {_explain(error)}") from None


def dump_settings(settings: Settings) -> str:
    """The settings as YAML that ``load_settings`` reads back to an equal object."""
    return to_yaml(settings.model_dump(mode="json"))


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Nested settings as YAML, in their own order."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """Split ``key=value`` arguments.

    Raises:
        UserError: an argument without ``=``.
    """
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UserError(f"{argument!r} is not of the form key=value (for example schedule.steps=1000)")
        if overrides.setdefault(key, value) != value:
            raise UserError(f"{key} is given twice, as {overrides[key]} and as {value}: remove one")
    return overrides


def known_keys(section: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every dotted setting, in the order of the file."""
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + (field.alias or name))
    return keys


def read_tree(path: Path) -> dict[str, Any]:
    """Return the sections of a settings file as nested dicts whose leaves are text.

    Raises:
        UserError: no such file, or no settings file.
    """
    try:
        with open(path, "rb", opener=regular_only) as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE or b"\0" in content:
            raise UserError(f"{path} is not a settings file: give a YAML file such as those in ds_configs/")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"config not found: {path}; examples are in {PROJECT_DIR / 'ds_configs'}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    tree = strict_yaml.parse(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of sections (run:, model:, data:, ...)")
    return tree


def _without_nulls(section: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with None where a setting may be None and its text says so; an empty section has only defaults."""
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    result = dict(tree)
    for key, value in tree.items():
        if key not in fields:
            continue
        inner: Any = fields[key].annotation
        if _is_section(inner):
            value = {} if strict_yaml.is_null(value) else value
            result[key] = _without_nulls(inner, value) if isinstance(value, dict) else value
        elif strict_yaml.is_null(value) and type(None) in get_args(inner):
            result[key] = None
    return result


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _parse_value(key: str, text: str) -> Any:
    """The text typed for a setting: as it is for names, paths and commands, as YAML for lists and quoted text."""
    if _is_plain_text(_annotation(key)) and text[:1] not in ("'", '"'):
        return text
    return strict_yaml.parse(text, f"{key}={text[:100]}: the value")


def _annotation(key: str) -> Any:
    """The type of the setting called ``key``; None if there is no such setting."""
    found: Any = Settings
    for name in key.split("."):
        if not _is_section(found):
            return None
        fields = {field.alias or own: field for own, field in found.model_fields.items()}
        found = fields[name].annotation if name in fields else None
    return found


def _is_plain_text(annotation: Any) -> bool:
    """Whether the setting is text or a path, or may be None besides."""
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return {str, Path} >= set(alternatives) - {type(None)}


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {section} was given a value of its own before; remove one of the two")
    tree[name] = value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, section by section. Steps and epochs, preset and shape displace each other."""
    result = dict(base)
    for key, value in over.items():
        both_sections = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(_without_rivals(result[key], value), value) if both_sections else value
    return result


def _without_rivals(section: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    shape = ("layers", "heads", "width")
    rivals = {"steps": ("epochs",), "epochs": ("steps",), "preset": shape, **dict.fromkeys(shape, ("preset",))}
    displaced = {rival for key, value in over.items() if value is not None for rival in rivals.get(key, ())}
    return {key: value for key, value in section.items() if key not in displaced or key in over}


def _make_absolute(tree: dict[str, Any], base: Path, expand: bool = True) -> None:
    for dotted in PATH_KEYS:
        section, name = section_of(tree, dotted)
        if isinstance(text := section.get(name), str):
            section[name] = _absolute(dotted, expanded(dotted, text) if expand else text, base)


def section_of(tree: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The section of ``tree`` that holds the setting ``dotted`` and its name there; {} if there is none."""
    *sections, name = dotted.split(".")
    node: Any = tree
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else {}), name


def _absolute(key: str, text: str, base: Path) -> str:
    """``text`` relative to ``base``; a URL, or the name of a model on the hub, as it is."""
    if "://" in text:
        return text
    if not text or "\0" in text:
        raise UserError(f"{key} is an empty path or no path: give a path")
    return resolve(text, base) if key == "model.init_from" else str(base / text)


def _default_path(tree: dict[str, Any], section: str, name: str, value: Path) -> None:
    node = tree.setdefault(section, {})
    if isinstance(node, dict):
        node.setdefault(name, str(value))


def _source(error: ValidationError, path: Path, overrides: Mapping[str, str]) -> str:
    """Where the wrong settings come from: the file, the command line, or both."""
    sources: dict[str, None] = {}
    for item in error.errors():
        key = _setting_named(item["loc"])
        given = [name for name in overrides if name == key or name.startswith(f"{key}.")]
        if not given:
            sources[str(path)] = None
        elif key in overrides or item["type"] == "extra_forbidden":
            sources["command line"] = None
        else:
            sources[f"{path} with {', '.join(given)}"] = None
    return " and ".join(sources)


def _explain(error: ValidationError) -> str:
    """pydantic's findings as one line: the setting, what is wrong, and the nearest known name if it is unknown."""
    return "; ".join(dict.fromkeys(_explain_one(dict(item)) for item in error.errors()))


def _explain_one(item: dict[str, Any]) -> str:
    key = _setting_named(item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [*known_keys(), *Settings.model_fields], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "docs/settings.md has all of them"
        if near and near[0] == key:
            section, _, name = key.partition(".")
            hint = f"in a file it is `{name}` below `{section}:`"
        return f"unknown setting {key}: {hint}"
    if item["type"] == "missing":
        too_short = isinstance(item["loc"][-1], int)
        return f"{key} has too few values" if too_short else f"{key} is not set"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and message.startswith((key, "give ", "model.", "schedule.")):
        return message
    message = _IN_PLAIN_WORDS.get(item["type"], message)
    value = "" if key in _MAY_BE_SECRET else f"={_shown(item['input'])}"
    return f"{key}{value}: {message if item['type'] == 'value_error' else uncapitalized(message)}"


_IN_PLAIN_WORDS = {  # pydantic's types of errors whose own messages speak of Python
    "tuple_type": "must be a list, such as [0.9, 0.95] or [first, second]",
    "model_type": "must be a section of settings, not a value",
    "string_type": "must be one text",
    "path_type": "must be one path",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}


def _shown(value: object) -> str:
    if isinstance(value, str) and value.isprintable() and 0 < len(value) < 100:
        return value
    return reprlib.repr(value)


def _setting_named(location: tuple[int | str, ...]) -> str:
    """The dotted setting of an error's location, without the names of types that pydantic adds for a union."""
    *parents, last = (str(part) for part in location if isinstance(part, str)) if location else ("",)
    for known in known_keys():
        names = known.split(".")
        if [*parents, last][: len(names)] == names:
            return known
    return ".".join(str(part) for part in location)
