"""Measure the time and memory of an export.

    python benchmarks/export.py [--preset 124M] [--ranks 4] [--scratch DIR] [--out FILE]

A checkpoint of random numbers, 14 bytes per parameter, is written as the given number of ranks would save it. Then the
command exports the model in each format. Reported are the seconds, including verification, and the peak memory of the
process, compared with a process that only imports the same modules.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.program import make_parser, report_result
from ds_gpt2.checkpoint import commit
from ds_gpt2.checkpoint.filesystem import Disk
from ds_gpt2.checkpoint.manifest import Manifest
from ds_gpt2.checkpoint.naming import rolling_tag
from ds_gpt2.config.sections import PRESETS
from ds_gpt2.config.settings import PROJECT_DIR
from ds_gpt2.distributed import device
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.shape import ModelShape

TAG = rolling_tag(1)


def main() -> None:
    options = _options()
    device.choose("cpu")
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        parameters = make_checkpoint(Path(name), options.preset, options.ranks)
        results: dict[str, Any] = {"preset": options.preset, "parameters": parameters, "ranks": options.ranks}
        imports = "import ds_gpt2.commands.export, ds_gpt2.checkpoint.weights"
        results["imports_mb"] = _peak([sys.executable, "-c", imports])[0]
        for kind in ("hf", "bf16", "fp32"):
            words = ["export", f"{name}/{TAG}", "--format", kind, "--out", f"{name}/out_{kind}"]
            megabytes, seconds = _peak([sys.executable, str(PROJECT_DIR / "ds_gpt2" / "__main__.py"), *words])
            beside = (megabytes - results["imports_mb"]) * 1e6 / parameters
            results[kind] = {"peak_mb": megabytes, "bytes_per_parameter": round(beside, 2), "seconds": seconds}
    report_result(options.out, results)


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="124M")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks of the checkpoint (default: 4)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="temporary directory (default: the system's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, too")
    return parser.parse_args()


def make_checkpoint(directory: Path, preset: str, ranks: int) -> int:
    """Write a checkpoint with everything that an export reads or must ignore; return the number of parameters."""
    from ds_gpt2.engine.checkpoint_io import MODEL_FILE, partition_file, pickle_into

    layers, heads, width = PRESETS[preset]
    with torch.device("meta"):
        model = GPT2(ModelShape(layers, heads, width, 1024))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    groups = [{name: shape for name, shape in shapes.items() if (len(shape) > 1) == matrix} for matrix in (True, False)]
    sizes = [-(-sum(shape.numel() for shape in group.values()) // ranks) for group in groups]
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    contents: dict[str, Any] = {MODEL_FILE: {"module": weights, "param_shapes": groups}}
    unfinished = directory / f"{TAG}.tmp"
    unfinished.mkdir()
    files = {}
    for name in (MODEL_FILE, *map(partition_file, range(ranks))):
        content = contents.get(name) or {"optimizer_state_dict": _partition(sizes)}
        files[name] = commit.write_with(Disk(), unfinished / name, 0.0, functools.partial(pickle_into, content))
    shape = {"model.layers": layers, "model.heads": heads, "model.width": width, "batch.sequence_length": 1024}
    manifest = Manifest(
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        epoch=0.0,
        state=TrainState(step=1).to_dict(),
        world_size=ranks,
        identity=shape,
        settings={},
        versions={},
        files=files,
    )
    commit.commit(Disk(), directory, TAG, manifest)
    return sum(shape.numel() for shape in shapes.values())


def _partition(sizes: list[int]) -> dict[str, Any]:
    moments = {
        group: {name: torch.rand(size) for name in ("exp_avg", "exp_avg_sq")} for group, size in enumerate(sizes)
    }
    masters = [torch.rand(size) for size in sizes]
    return {"single_partition_of_fp32_groups": masters, "base_optimizer_state": {"state": moments}}


def _peak(command: list[str]) -> tuple[int, float]:
    """Run ``command``; return (its peak memory in MB, its seconds)."""
    start_time = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:  # getrusage would include the memory of this process at the fork
        peak = max(peak, _high_water_mark(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return round(peak / 1e6), round(time.perf_counter() - start_time, 1)


def _high_water_mark(pid: int) -> int:
    """Return the peak resident bytes of a process; 0 after it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
