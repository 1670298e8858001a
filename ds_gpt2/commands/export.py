"""``export``: export a run's model as a Hugging Face directory, or as one file for plain PyTorch."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import get_args

from ds_gpt2.commands.arguments import add_weights_argument, path
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.formatting import size
from ds_gpt2.distributed import device
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.models.average import choose_checkpoints
from ds_gpt2.tools.models.export import Format, Source, export
from ds_gpt2.tools.resources.run_checkpoints import find_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run, or a checkpoint's directory (default: the newest run)"
    )
    parser.add_argument("--tag", metavar="TAG", help="best_model, a step, an epoch, ... (default: the newest)")
    add_weights_argument(parser)
    parser.add_argument(
        "--average",
        metavar="N|TAG,TAG,...",
        help="the mean of the weights of the newest N full checkpoints, or of the named ones",
    )
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="hf",
        help="hf: for transformers, in fp32; bf16: the same in half the size; fp32: one file for plain PyTorch",
    )
    parser.add_argument(
        "--out",
        type=path("--out"),
        metavar="PATH",
        help="default: a directory or file in exports/ in the run's directory",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing export")


def run(options: argparse.Namespace) -> int:
    device.choose("cpu")  # before DeepSpeed is imported
    command = shlex.join(["./launch.sh", *sys.argv[1:]])
    exported = export(_source(options), options.out, options.format, options.force, command)
    print(f"{exported.title}: {exported.path}, {size(exported.bytes)}")
    return exit_codes.DONE


def _source(options: argparse.Namespace) -> Source:
    if options.average is None:
        return Source((find_checkpoint(options.run, options.tag),), options.weights)
    if options.tag is not None:
        raise UserError(f"--tag {options.tag}: --average names the checkpoints, omit --tag")
    return Source(choose_checkpoints(options.run, options.average, options.weights, _warn), options.weights)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
