"""``generate``: generate text with a model and print it token by token."""

from __future__ import annotations

import argparse
import codecs
import itertools
import shlex
import sys
from collections.abc import Iterator

from ds_gpt2.commands.arguments import add_weights_argument, number, positive, whole_number
from ds_gpt2.common.errors import UserError
from ds_gpt2.common.terminal import one_line, printable_lines
from ds_gpt2.data.tokenizer import END_OF_TEXT, gpt2
from ds_gpt2.distributed import device
from ds_gpt2.evaluation.sampling import Sampling, derived_seed, stream
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.pretrained.load import as_model
from ds_gpt2.run_dir import exit_codes
from ds_gpt2.tools.models.open import open_model

_RULE = "\n" + "-" * 8 + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a run, a checkpoint, an exported file, a Hugging Face directory or a name on the hub (gpt2, OWNER/NAME)",
    )
    parser.add_argument("--tag", metavar="TAG", help="which checkpoint of a run (default: the newest)")
    add_weights_argument(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prompt", default="", metavar="TEXT", help="the text to continue; - reads it from stdin (default: empty)"
    )
    what.add_argument("--interactive", action="store_true", help="read prompts from the keyboard, one after another")
    parser.add_argument(
        "--tokens", type=positive, default=200, metavar="N", help="maximum number of new tokens (default: 200)"
    )
    parser.add_argument(
        "--samples", type=positive, default=1, metavar="N", help="number of continuations per prompt (default: 1)"
    )
    parser.add_argument(
        "--temperature", type=number, default=0.8, metavar="T", help="0: always the most probable token (default: 0.8)"
    )
    parser.add_argument(
        "--top-k",
        type=whole_number,
        default=None,
        metavar="K",
        help="sample from the K most probable tokens (default: all)",
    )
    parser.add_argument(
        "--top-p",
        type=number,
        default=1.0,
        metavar="P",
        help="sample from the most probable tokens with total probability P",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="random seed; the same seed gives the same text (default: 0)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def run(options: argparse.Namespace) -> int:
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    chosen = device.choose(options.device)
    opened = open_model(options.model, options.tag, options.weights)
    print(one_line(f"{opened.title} on {chosen.type}"), file=sys.stderr)
    if opened.note is not None:
        print(opened.note, file=sys.stderr)
    model = as_model(opened.shape, opened.weights).to(chosen)
    checking = f"`./launch.sh verify {shlex.quote(str(opened.path))} --deep`"
    fix = f", {checking} shows which; choose another with --tag" if opened.manifest else ": use another model"
    for prompt in _prompts(options):
        for sample in range(options.samples):
            if sample:
                print(_RULE)
            _show(model, prompt, sampling, options.tokens, derived_seed(options.seed, sample), fix)
    return exit_codes.DONE


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    if not options.interactive:
        yield sys.stdin.read() if options.prompt == "-" else options.prompt
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("type a prompt and press Enter; an empty line or Ctrl+D exits", file=sys.stderr)
    while True:
        try:
            prompt = input("\n> " if is_terminal else "")
        except EOFError:
            return
        if not prompt:
            return
        yield prompt


def _show(model: GPT2, prompt: str, sampling: Sampling, tokens: int, seed: int, fix: str) -> None:
    """Print the prompt and its continuation, each character as soon as it is complete; Ctrl+C stops this text only.

    Args:
        fix: what to do if the weights are not finite, for the error.
    """
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown = printable_lines if sys.stdout.isatty() else str  # a model can generate any bytes
    sys.stdout.write(prompt)
    try:
        for token in itertools.islice(stream(model, prompt, sampling, seed=seed), tokens):
            if token == END_OF_TEXT:
                break
            sys.stdout.write(shown(characters.decode(gpt2().decode_single_token_bytes(token))))
            sys.stdout.flush()
    except FloatingPointError as error:
        raise UserError(f"{error}: some weights are Inf or NaN{fix}") from None
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print(shown(characters.decode(b"", final=True)), flush=True)


def _seed(text: str) -> int:
    """Parse a seed, as a type for argparse."""
    return whole_number(text, 0, "of 0 or more")
