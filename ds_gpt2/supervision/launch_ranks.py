"""Run DeepSpeed's launcher of one machine, as ``python -m deepspeed.launcher.launch`` would.

``-m`` would add the working directory to the module search path, where a file named random.py hides Python's module.
DeepSpeed's multi-node runner also ends every process with those words on its command line.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from ds_gpt2.common.module_search_path import ignore_working_directory

    ignore_working_directory()
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)
