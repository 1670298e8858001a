"""Export the model of a checkpoint: as a Hugging Face directory, or as one file for plain PyTorch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ds_gpt2.checkpoint.catalog import Generation
from ds_gpt2.checkpoint.manifest import Manifest, Weights
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import tokens
from ds_gpt2.common.paths import absolute
from ds_gpt2.config.run_location import current_settings
from ds_gpt2.data.tokenizer import END_OF_TEXT
from ds_gpt2.pretrained import huggingface, torch_file
from ds_gpt2.pretrained.model_card import card
from ds_gpt2.pretrained.tokenizer_files import WRITTEN, write_tokenizer
from ds_gpt2.run_dir.file_checks import read_error
from ds_gpt2.run_dir.metrics import METRICS, read_metrics
from ds_gpt2.tools.models.average import mean_model
from ds_gpt2.tools.models.export_output import atomic_output
from ds_gpt2.tools.models.open import OpenedModel, check_kind, damaged, open_model, shape_of

Format = Literal["hf", "bf16", "fp32"]

_OTHER_BYTES = 10_000_000  # tokenizer files, config and model card
# The files of an export; only directories with no other files are replaced.
_EXPORT_FILES = {"README.md", "generation_config.json", huggingface.CONFIG, huggingface.WEIGHTS, *WRITTEN}


@dataclass(frozen=True)
class Source:
    """The weights to export."""

    checkpoints: tuple[Generation, ...]  # the newest first; of several the mean
    weights: Weights = "raw"

    @property
    def name(self) -> str:
        """The name of an export in the run's directory, without its format."""
        average = f"-average{len(self.checkpoints)}" if len(self.checkpoints) > 1 else ""
        return self.checkpoints[0].tag + ("-ema" if self.weights == "ema" else "") + average

    def open(self) -> OpenedModel:
        """Return the model with its weights.

        Raises:
            UserError: a checkpoint is damaged, or the memory does not suffice.
        """
        if len(self.checkpoints) > 1:
            return mean_model(self.checkpoints, self.weights)
        return open_model(str(self.checkpoints[0].path), None, self.weights)


@dataclass(frozen=True)
class ExportedModel:
    title: str
    path: Path
    bytes: int


def export(source: Source, out: Path | None, kind: Format, force: bool, command: str) -> ExportedModel:
    """Export the model of a checkpoint, or the mean of several.

    Args:
        out: the directory, or the file for fp32; None: ``exports/NAME-FORMAT`` in the run's directory.
        kind: hf: a Hugging Face directory in fp32; bf16: the same in bf16; fp32: one file for plain PyTorch.
        force: replace an existing export.
        command: the command line, for the model card.

    Raises:
        UserError: the checkpoint is damaged or has no such weights, or the export cannot be written.
    """
    generation = source.checkpoints[0]
    if generation.manifest is None:
        raise damaged(generation.path, generation.problem)
    check_kind(str(generation.path), generation.manifest, source.weights)
    settings = current_settings(generation.path, generation.manifest.settings)
    out = absolute(out or _default_out(settings, source.name, kind))
    _check_replaceable(out, force)
    needed = (2 if kind == "bf16" else 4) * shape_of(generation.manifest).unpadded_parameters + _OTHER_BYTES
    with atomic_output(out, needed) as unfinished:
        opened = source.open()
        for name, weight in opened.weights.items():
            huggingface.as_weight(opened.path, name, weight)  # refuses Inf and NaN
        assert opened.manifest is not None
        if kind == "fp32":
            _write_file(opened, opened.manifest, unfinished)
        else:
            _write_directory(opened, opened.manifest, unfinished, kind, command)
    total = sum(each.stat().st_size for each in [out, *out.rglob("*")] if each.is_file())
    return ExportedModel(opened.title, out, total)


def _default_out(settings: dict[str, Any], name: str, kind: Format) -> Path:
    run = settings.get("run", {})
    if not run.get("dir") or not run.get("name"):
        raise UserError("the directory of the checkpoint's run is not found: give --out PATH")
    return Path(run["dir"]) / run["name"] / "exports" / (f"{name}-{kind}" + (".pt" if kind == "fp32" else ""))


def _check_replaceable(out: Path, force: bool) -> None:
    """Check that ``out`` does not exist, or is an export that may be replaced.

    Raises:
        UserError: it must not be replaced.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(f"{out} exists: give another --out PATH, or --force to replace it")
    if out.is_symlink():
        raise UserError(f"{out} is a symbolic link: give --out PATH of its target")
    if not out.is_dir() and not out.name.endswith(torch_file.SUFFIX):
        raise UserError(f"{out} is a file, but not an export: --force replaces exports only, give another --out PATH")
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    unknown = sorted(name for name in names if name not in _EXPORT_FILES and not name.endswith(torch_file.SUFFIX))
    if unknown:
        raise UserError(f"{out} contains {unknown[0]}, which is not part of an export: --force replaces exports only")


def _write_file(opened: OpenedModel, manifest: Manifest, path: Path) -> None:
    state = {key: value for key, value in manifest.state.items() if key != "unevaluated"}
    about = {"title": opened.title, "step": manifest.step, "state": state, "versions": manifest.versions}
    about |= {"weights": opened.kind, "averaged_steps": list(opened.averaged_steps)}
    torch_file.write(opened.weights, opened.shape, about, path)


def _write_directory(opened: OpenedModel, manifest: Manifest, directory: Path, kind: Format, command: str) -> None:
    directory.mkdir()
    settings = manifest.settings
    name: huggingface.DTypeName = "bfloat16" if kind == "bf16" else "float32"
    config = huggingface.config_of(opened.shape, settings.get("model", {}).get("dropout", 0.0), name)
    end = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    _write_text(directory / huggingface.CONFIG, json.dumps(config, indent=2) + "\n")
    _write_text(directory / "generation_config.json", json.dumps(end, indent=2) + "\n")
    facts = [*_facts(opened, manifest), ("exported by", f"`{command}`")]
    _write_text(
        directory / "README.md", card(opened.title, opened.shape, opened.shape.unpadded_parameters, facts, settings)
    )
    write_tokenizer(directory, opened.shape.sequence_length)
    huggingface.write_weights(opened.weights, directory / huggingface.WEIGHTS, getattr(torch, name))


def _facts(opened: OpenedModel, manifest: Manifest) -> list[tuple[str, str]]:
    """Return the training facts of the model card: of the checkpoint, and the metrics up to its step."""
    state = manifest.state
    run = current_settings(opened.path, manifest.settings).get("run", {})
    metrics = _last_values(Path(run["dir"]) / run["name"] / METRICS, manifest.step) if "dir" in run else {}
    facts = [
        ("data", Path(manifest.settings.get("data", {}).get("dir", "unknown")).name),
        ("steps", f"{manifest.step:,}"),
        *_origin(opened, manifest),
        ("tokens", f"{tokens(state.get('tokens', 0))}, {manifest.epoch:.2f} epochs"),
    ]
    for name, label in _measured(opened):
        if name in metrics:
            step, value = metrics[name]
            facts.append((label, f"{value:.4f}" + ("" if step == manifest.step else f" (at step {step:,})")))
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return [*facts, ("checkpoint saved", manifest.created), ("versions", versions)]


def _origin(opened: OpenedModel, manifest: Manifest) -> list[tuple[str, str]]:
    """Return how the weights were averaged; nothing for those of one update."""
    averages = []
    if opened.kind == "ema":
        averages.append(f"moving average of the weights, ema.decay {manifest.ema_decay}")
    if opened.averaged_steps:
        averages.append(f"mean of the checkpoints at steps {', '.join(f'{step:,}' for step in opened.averaged_steps)}")
    return [("weights", "; ".join(averages))] if averages else []


def _measured(opened: OpenedModel) -> list[tuple[str, str]]:
    """Return the metrics that were measured with these weights during training, and their labels."""
    if opened.averaged_steps:
        return []
    if opened.kind == "ema":
        return [("val/loss_ema", "validation loss")]
    return [
        ("train/loss", "training loss"),
        ("val/loss", "validation loss"),
        ("hellaswag/acc", "HellaSwag, acc"),
        ("hellaswag/acc_norm", "HellaSwag, acc_norm (by tokens)"),
    ]


def _last_values(metrics: Path, step: int) -> dict[str, tuple[int, float]]:
    """Return (step, value) of the last record of each metric up to ``step``.

    Raises:
        UserError: the file exists, but cannot be read.
    """
    values: dict[str, tuple[int, float]] = {}
    try:
        for record in read_metrics(metrics):
            if record["step"] <= step:
                values |= {name: (record["step"], value) for name, value in record.items() if isinstance(value, float)}
    except OSError as error:
        raise read_error(error, metrics.parent) from None
    return values


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
