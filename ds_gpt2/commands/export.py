"""``export``: a run's model as others read it: a Hugging Face directory, or one file for plain PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError

from ds_gpt2.commands.arguments import path
from ds_gpt2.commands.models import Opened, count_parameters, find_checkpoint, open_model, shape_of
from ds_gpt2.common import files
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.files import regular_only, remove_tree
from ds_gpt2.common.formatting import size, tokens
from ds_gpt2.config.run_location import settings_now
from ds_gpt2.data.tokenizer import END_OF_TEXT
from ds_gpt2.distributed import device
from ds_gpt2.pretrained import huggingface, torch_file
from ds_gpt2.pretrained.model_card import card
from ds_gpt2.pretrained.tokenizer_files import WRITTEN, write_tokenizer
from ds_gpt2.run_dir import exit_report
from ds_gpt2.run_dir.metrics import METRICS, read_metrics

FORMATS = ("hf", "bf16", "fp32")
_SPARE_BYTES = 10_000_000  # tokenizer files and the rest


# What an export consists of; only such directories are replaced.
_EXPORTED = {"README.md", "generation_config.json", huggingface.CONFIG, huggingface.WEIGHTS, *WRITTEN}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run, or a checkpoint's directory (default: the newest run)"
    )
    parser.add_argument("--tag", metavar="TAG", help="best_model, a step, an epoch, ... (default: the newest)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="hf",
        help="hf: for transformers, in fp32; bf16: the same in half the size; fp32: one file for plain PyTorch",
    )
    parser.add_argument(
        "--out", type=path("--out"), metavar="PATH", help="default: exports/TAG-FORMAT in the run's directory"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")


def run(options: argparse.Namespace) -> int:
    device.choose("cpu")  # before DeepSpeed is imported
    generation = find_checkpoint(options.run, options.tag)
    if generation.manifest is None:
        raise UserError(f"{generation.path} is damaged ({generation.problem}): choose another with --tag, see `list`")
    settings = settings_now(generation.path, generation.manifest.settings)
    out = options.out or _default_out(settings, generation.tag, options.format)
    out = Path(os.path.abspath(out))
    _check_replaceable(out, options.force)
    needed = (2 if options.format == "bf16" else 4) * count_parameters(shape_of(generation.manifest)) + _SPARE_BYTES
    with _appearing(out, needed) as unfinished:
        opened = open_model(str(generation.path), None)
        for name, weight in opened.weights.items():
            huggingface.as_weight(opened.path, name, weight)  # refuses Inf and NaN
        if options.format == "fp32":
            _write_file(opened, unfinished)
        else:
            _write_directory(opened, unfinished, options.format)
    total = sum(each.stat().st_size for each in [out, *out.rglob("*")] if each.is_file())
    print(f"{opened.title}: {out}, {size(total)}")
    return exit_report.DONE


def _check_replaceable(out: Path, force: bool) -> None:
    """
    Raises:
        UserError: something is at ``out`` that ``--force`` does not replace, or it is not given.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(f"{out} exists: give another --out PATH, or --force to replace it")
    if out.is_symlink():
        raise UserError(f"{out} is a link: give --out PATH of what it leads to")
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    unknown = sorted(name for name in names if name not in _EXPORTED and not name.endswith(torch_file.SUFFIX))
    if unknown:
        raise UserError(f"{out} holds {unknown[0]}, which no export has written: --force replaces an export only")


def _default_out(settings: dict[str, Any], tag: str, kind: str) -> Path:
    run = settings.get("run", {})
    if not run.get("dir") or not run.get("name"):
        raise UserError("the directory of the checkpoint's run is not found: give --out PATH")
    return Path(run["dir"]) / run["name"] / "exports" / (f"{tag}-{kind}" + (".pt" if kind == "fp32" else ""))


@contextlib.contextmanager
def _appearing(out: Path, needed: int) -> Iterator[Path]:
    """A path to write to, which becomes ``out`` when all of it is there; whatever goes wrong, nothing is left of it."""
    unfinished, replaced = _beside(out, os.getpid())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clean_up_after_killed(out)
        if (free := shutil.disk_usage(out.parent).free) < needed:
            raise UserError(f"{out.parent} has {size(free)} free, {size(needed)} are needed: make room, or give --out")
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        if os.path.lexists(out):
            out.rename(replaced)
        unfinished.rename(out)
        files.sync_directory(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch.save make of one
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{out} could not be written whole (is the disk full?): {reason}") from None
    finally:
        _clean_up(out, unfinished, replaced)


def _beside(out: Path, pid: int) -> tuple[Path, Path]:
    """Where process ``pid`` of this machine writes an export to ``out``, and where it moves what was there."""
    of_process = f"{socket.gethostname()}-{pid}"
    return out.with_name(f".{out.name}.unfinished-{of_process}"), out.with_name(f".{out.name}.replaced-{of_process}")


def _clean_up_after_killed(out: Path) -> None:
    """Remove what exports to ``out`` have left whose process, on this machine, has ended."""
    pattern = f".{glob.escape(out.name)}.*-{glob.escape(socket.gethostname())}-*"
    for left in list(out.parent.glob(pattern)):
        pid = left.name.rpartition("-")[2]
        if re.fullmatch(r"[0-9]{1,9}", pid) and not psutil.pid_exists(int(pid)):
            _clean_up(out, *_beside(out, int(pid)))


def _clean_up(out: Path, unfinished: Path, replaced: Path) -> None:
    """Remove what is unfinished; what was to be replaced is put back if nothing has replaced it."""
    with contextlib.suppress(OSError):
        if os.path.lexists(replaced) and not os.path.lexists(out):
            replaced.rename(out)
        for left in (unfinished, replaced):
            remove_tree(left)


def _sync(path: Path) -> None:
    if path.is_dir():
        files.sync_directory(path)
        return
    with open(path, "rb", opener=regular_only) as opened:
        os.fsync(opened.fileno())


def _write_file(opened: Opened, path: Path) -> None:
    assert opened.manifest is not None
    manifest = opened.manifest
    state = {key: value for key, value in manifest.state.items() if key != "unevaluated"}
    about = {"title": opened.title, "step": manifest.step, "state": state, "versions": manifest.versions}
    torch_file.write(opened.weights, opened.shape, about, path)


def _write_directory(opened: Opened, directory: Path, kind: str) -> None:
    assert opened.manifest is not None
    directory.mkdir()
    settings = opened.manifest.settings
    name: huggingface.DTypeName = "bfloat16" if kind == "bf16" else "float32"
    config = huggingface.config_of(opened.shape, settings.get("model", {}).get("dropout", 0.0), name)
    end = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    _write(directory / huggingface.CONFIG, json.dumps(config, indent=2) + "\n")
    _write(directory / "generation_config.json", json.dumps(end, indent=2) + "\n")
    facts, parameters = _facts(opened), count_parameters(opened.shape)
    _write(directory / "README.md", card(opened.title, opened.shape, parameters, facts, settings))
    write_tokenizer(directory, opened.shape.sequence_length)
    huggingface.write_weights(opened.weights, directory / huggingface.WEIGHTS, getattr(torch, name))


def _facts(opened: Opened) -> list[tuple[str, str]]:
    """What the card tells of the training: of the checkpoint's own, and what was measured up to it."""
    assert opened.manifest is not None
    manifest, state = opened.manifest, opened.manifest.state
    run = settings_now(opened.path, manifest.settings).get("run", {})
    seen = _last_seen(Path(run["dir"]) / run["name"] / METRICS, manifest.step) if "dir" in run else {}
    facts = [
        ("data", Path(manifest.settings.get("data", {}).get("dir", "unknown")).name),
        ("steps", f"{manifest.step:,}"),
        ("tokens", f"{tokens(state.get('tokens', 0))}, {manifest.epoch:.2f} epochs"),
    ]
    for name, label in (
        ("train/loss", "training loss"),
        ("val/loss", "validation loss"),
        ("hellaswag/acc", "HellaSwag, acc"),
        ("hellaswag/acc_norm", "HellaSwag, acc_norm (by tokens)"),
    ):
        if name in seen:
            step, value = seen[name]
            facts.append((label, f"{value:.4f}" + ("" if step == manifest.step else f" (at step {step:,})")))
    facts += [("checkpoint made", manifest.created), ("with", _versions(manifest.versions))]
    return [*facts, ("exported by", f"`{shlex.join(['./launch.sh', *sys.argv[1:]])}`")]


def _last_seen(metrics: Path, step: int) -> dict[str, tuple[int, float]]:
    """Of each scalar (the step, the value) that was recorded last, up to ``step``."""
    seen: dict[str, tuple[int, float]] = {}
    for record in read_metrics(metrics):
        if record["step"] <= step:
            seen |= {name: (record["step"], value) for name, value in record.items() if isinstance(value, float)}
    return seen


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
