"""``quickstart``: prepare sample data and train a small GPT-2 on all devices."""

from __future__ import annotations

import argparse
import itertools

from ds_gpt2.checkpoint.catalog import newest_tag
from ds_gpt2.commands import prepare
from ds_gpt2.commands.arguments import add_start_arguments
from ds_gpt2.commands.train import start
from ds_gpt2.config.lookup import find_config
from ds_gpt2.config.run_location import run_argument
from ds_gpt2.config.settings import Settings, load_settings, parse_overrides
from ds_gpt2.data.prepare import datasets
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.supervision.launcher import choose_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_start_arguments(parser)


def run(options: argparse.Namespace) -> int:
    config = find_config("quickstart")
    overrides = _with_unused_name(parse_overrides(options.settings))
    settings = load_settings(config, overrides)
    ranks = choose_ranks(settings, options.num_gpus).ranks
    overrides = {**_batch_for(settings, ranks), **overrides}
    if settings.data.dir == datasets.SAMPLE_DIR:
        prepare.report(datasets.prepare_sample())
    code = start(config, overrides, load_settings(config, overrides), (), options.num_gpus)
    if code in (exit_codes.DONE, exit_codes.STOPPED):
        name = run_argument(settings.run_dir)
        print("\nNext steps:")
        print(f"  ./launch.sh tensorboard {name}                 show the curves and samples in a browser")
        print(f"  ./launch.sh resume {name} schedule.steps=600   resume and train about twice as long")
        print("  ./launch.sh prepare text FILE... --out data/mine && ./launch.sh train quickstart data.dir=data/mine")
    return code


def _batch_for(settings: Settings, ranks: int) -> dict[str, str]:
    """Return overrides with a batch near the configured one that this number of ranks can divide."""
    batch = settings.batch
    micro_batch = max(1, min(batch.micro_batch, batch.tokens_per_step // (batch.sequence_length * ranks)))
    per_micro_batch = micro_batch * batch.sequence_length * ranks
    tokens = max(1, round(batch.tokens_per_step / per_micro_batch)) * per_micro_batch
    return {"batch.micro_batch": str(micro_batch), "batch.tokens_per_step": str(tokens)}


def _with_unused_name(overrides: dict[str, str]) -> dict[str, str]:
    """Name a new run: quickstart, quickstart-2, quickstart-3, ..."""
    if "run.name" in overrides:
        return overrides
    for name in itertools.chain(["quickstart"], (f"quickstart-{number}" for number in itertools.count(2))):
        named = {**overrides, "run.name": name}
        if newest_tag(load_settings(find_config("quickstart"), named).checkpoint_dir) is None:
            return named
    raise AssertionError("unreachable: the names are infinite")
