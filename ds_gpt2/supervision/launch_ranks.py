"""DeepSpeed's launcher of one machine, what ``python -m deepspeed.launcher.launch`` starts.

``-m`` would put the working directory first on the module search path: a file called random.py there would be taken
for Python's. DeepSpeed's multi-node runner also ends every process whose command line has those words.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from ds_gpt2.common.own_modules import ignore_working_directory

    ignore_working_directory()
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)
