"""Entry point of ``python -m ds_gpt2``, and of launch.sh, which runs this file by its path."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C during the imports exits without a traceback

import sys
from pathlib import Path

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()

from ds_gpt2.cli import main

if __name__ == "__main__":  # not when a worker process of ``prepare`` imports it
    sys.exit(main())
