"""The settings of a run: a YAML file and ``key=value`` overrides, typed, checked once, immutable.

Relative paths in a YAML file are relative to the project's directory, so a run does not depend on the working
directory. Relative paths in an override are relative to the working directory. ``~`` and ``$VARIABLE`` are expanded in
both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ds_gpt2.common.errors import UserError
from ds_gpt2.config.evaluation_settings import EVALUATION_NAMES, Evaluations, EvaluationSettings, default_path
from ds_gpt2.config.field_types import Section
from ds_gpt2.config.sections import (
    CHECKPOINTS,
    RUNS,
    AlertSettings,
    BackupSettings,
    BatchSettings,
    CheckpointSettings,
    ClusterSettings,
    DataSettings,
    EmaSettings,
    GuardSettings,
    HellaswagSettings,
    HistogramsSettings,
    ModelSettings,
    MonitorSettings,
    OptimizerSettings,
    RunSettings,
    SamplesSettings,
    ScheduleSettings,
    SupervisorSettings,
    ValidationSettings,
)
from ds_gpt2.config.settings_errors import explain
from ds_gpt2.config.settings_tree import (
    is_section,
    make_absolute,
    merged,
    parse_override,
    read_tree,
    set_default,
    set_dotted,
    without_nulls,
)

__all__ = [
    "CHECKPOINTS",
    "LOG",
    "PATH_KEYS",
    "PROJECT_DIR",
    "RUNS",
    "TENSORBOARD",
    "AlertSettings",
    "BackupSettings",
    "BatchSettings",
    "CheckpointSettings",
    "ClusterSettings",
    "DataSettings",
    "EmaSettings",
    "EvaluationSettings",
    "GuardSettings",
    "HellaswagSettings",
    "HistogramsSettings",
    "ModelSettings",
    "MonitorSettings",
    "OptimizerSettings",
    "RunSettings",
    "SamplesSettings",
    "ScheduleSettings",
    "Settings",
    "SupervisorSettings",
    "ValidationSettings",
    "default_values",
    "dump_settings",
    "flat",
    "known_keys",
    "load_settings",
    "parse_overrides",
    "settings_of",
    "to_yaml",
]

PROJECT_DIR = Path(__file__).resolve().parents[2]
LOG = "train.log"  # in the run's directory
TENSORBOARD = "tensorboard"  # the directory of event files in the run's directory, unless monitor.dir is set


class Settings(Section):
    """All settings of a run. It holds no progress and no live objects."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    data: DataSettings
    batch: BatchSettings = BatchSettings()
    schedule: ScheduleSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    ema: EmaSettings = EmaSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    hellaswag: HellaswagSettings = HellaswagSettings()
    evaluations: Evaluations = Field(default={})
    samples: SamplesSettings = SamplesSettings()
    histograms: HistogramsSettings = HistogramsSettings()
    monitor: MonitorSettings = MonitorSettings()
    guards: GuardSettings = GuardSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    cluster: ClusterSettings = ClusterSettings()
    alerts: AlertSettings = AlertSettings()
    deepspeed: Path = Path("ds_configs/zero2_bf16.json")

    @property
    def run_dir(self) -> Path:
        """``runs/<run>``: the log, metrics, event files, journal and stored settings."""
        return self.run.dir / self.run.name

    @property
    def checkpoint_dir(self) -> Path:
        """``checkpoints/<run>``: the checkpoints and the ``latest`` pointer."""
        return self.checkpoint.dir / self.run.name

    @property
    def tensorboard_dir(self) -> Path:
        """The directory of the event files."""
        return self.monitor.dir / self.run.name if self.monitor.dir else self.run_dir / TENSORBOARD

    @property
    def output_dirs(self) -> tuple[Path, ...]:
        """The directories that contain everything a run writes."""
        return self.run_dir, self.checkpoint_dir, self.tensorboard_dir

    @property
    def shared_output_dirs(self) -> tuple[Path, ...]:
        """The output directories outside of the run's own directory; two runs could share them by mistake."""
        return tuple(path for path in self.output_dirs[1:] if not path.is_relative_to(self.run_dir))


PATH_KEYS = (
    "cluster.hostfile",
    "run.dir",
    "model.init_from",
    "data.dir",
    "data.mixture.*.dir",
    "data.stages.*.mixture.*.dir",
    "checkpoint.dir",
    "checkpoint.backup.to",
    "hellaswag.path",
    "evaluations.*.path",
    "monitor.dir",
    "alerts.urls_file",
    "deepspeed",
)


def load_settings(
    path: Path, overrides: Mapping[str, str] | None = None, *, project_dir: Path = PROJECT_DIR, cwd: Path | None = None
) -> Settings:
    """Return the settings in a YAML file, updated with ``key=value`` overrides and checked.

    Args:
        path: the YAML file; if it does not set ``run.name``, the file's stem is the run's name.
        overrides: dotted setting -> the text of its value (``3``, ``1e-4``, ``[a, b]``).
        project_dir: the directory that relative paths in the file are relative to.
        cwd: the directory that relative paths in overrides are relative to (default: the working directory).

    Raises:
        UserError: the file does not exist, is not valid YAML, has an unknown setting, a wrong type or a value out of
            range.
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
    """Return settings as ``load_settings`` does, from the content of the file.

    Args:
        tree: nested sections of text, see ``settings_tree.read_tree``.
        path: the file that the tree was read from, for errors and the default name of the run.
        expand: expand ``~`` and variables in the paths of ``tree``.

    Raises:
        UserError: see ``load_settings``.
    """
    tree = without_nulls(Settings, tree)
    make_absolute(tree, PATH_KEYS, project_dir, expand)
    typed: dict[str, Any] = {}
    for key, text in (overrides or {}).items():
        set_dotted(typed, key, parse_override(Settings, key, text))
    typed = without_nulls(Settings, typed)
    make_absolute(typed, PATH_KEYS, cwd or Path.cwd())
    tree = merged(tree, typed)
    hints = {}
    if "name" not in (tree.get("run") or {}):
        hints["run.name"] = "; that is the name of the settings file, because run.name is not set: set run.name=NAME"
    set_default(tree, "run", "name", path.stem)
    set_default(tree, "run", "dir", project_dir / RUNS)
    set_default(tree, "checkpoint", "dir", project_dir / CHECKPOINTS)
    set_default(tree, "hellaswag", "path", project_dir / "data" / "hellaswag" / "hellaswag_val.jsonl")
    _set_evaluation_paths(tree, project_dir)
    tree.setdefault("deepspeed", str(project_dir / "ds_configs" / "zero2_bf16.json"))
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        sections = list(Settings.model_fields)
        raise UserError(explain(error, path, overrides or {}, known_keys(), sections, hints)) from None


def _set_evaluation_paths(tree: dict[str, Any], project_dir: Path) -> None:
    """Set the paths of published evaluations; a name without a path that is not one of them is refused.

    Raises:
        UserError: there is no such evaluation.
    """
    evaluations = tree.get("evaluations")
    for name, entry in evaluations.items() if isinstance(evaluations, dict) else ():
        if name == "hellaswag":
            raise UserError("evaluations.hellaswag: HellaSwag has a section of its own: set hellaswag.every")
        if isinstance(entry, dict) and entry.get("path") is None:
            if (path := default_path(name, project_dir)) is None:
                raise UserError(
                    f"evaluations.{str(name)[:60]}: no such evaluation: set its path, a file of items of your own, or"
                    f" use one of {', '.join(EVALUATION_NAMES)}"
                )
            entry["path"] = str(path)


def dump_settings(settings: Settings) -> str:
    """Return the settings as YAML that ``load_settings`` reads back to an equal object."""
    return to_yaml(settings.model_dump(mode="json"))


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return nested settings as YAML, in their own order."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one dict with dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """Return ``key=value`` arguments as a dict.

    Raises:
        UserError: an argument without ``=``, or two values for one setting.
    """
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UserError(f"{argument!r} is not of the form key=value (for example schedule.steps=1000)")
        if overrides.setdefault(key, value) != value:
            raise UserError(f"{key} is given twice, as {overrides[key]} and as {value}: remove one")
    return overrides


def default_values(section: type[BaseModel] = Settings, prefix: str = "") -> dict[str, Any]:
    """Return the default of every dotted setting that has one, as ``flat`` returns the values of a run."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner: Any = field.annotation
        if is_section(inner):
            found |= default_values(inner, f"{prefix}{name}.")
        elif not field.is_required():
            found[prefix + (field.alias or name)] = TypeAdapter(Any).dump_python(field.default, mode="json")
    return found


def known_keys(section: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Return every dotted setting, in the order of the file."""
    keys = []
    for name, field in section.model_fields.items():
        inner: Any = field.annotation
        if is_section(inner):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + (field.alias or name))
    return keys
