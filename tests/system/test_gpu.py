"""Tests that need a GPU; skipped on machines without one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import PROJECT, Launched, launch
from small_run import hellaswag_item

from ds_gpt2.checkpoint.catalog import newest_tag
from ds_gpt2.engine.host_copy import HostMemory
from ds_gpt2.model.gpt2 import GPT2
from ds_gpt2.model.loss import cross_entropy
from ds_gpt2.model.shape import ModelShape
from ds_gpt2.run_dir.metrics import read_metrics
from ds_gpt2.tools.drill.compare import checkpoint_differences, curve_differences

pytestmark = pytest.mark.gpu

Configure = Callable[..., Path]

# Large enough for results that may differ between runs: attention's backward pass accumulates several blocks of keys in
# one gradient, and the loss sums several chunks.
LARGE_ENOUGH: dict[str, Any] = {
    "model": {"layers": 2, "heads": 4, "width": 256, "dropout": 0.1},
    "batch": {"sequence_length": 1024, "micro_batch": 16, "tokens_per_step": 2 * 16 * 1024},
    "validation": {"every": 6, "tokens": 7 * 1024},
}


def train(config: Path, *arguments: str) -> Launched:
    launched = launch(1, "--config", str(config), *arguments, accelerator="cuda", timeout=400)
    assert launched.code == 0, launched.output
    assert launched.left_over == []
    return launched


def metrics(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / "runs" / "test" / "metrics.jsonl"))


def on_gpu(folder: Path, write_config: Configure, **sections: Any) -> Path:
    run = {"name": "test", "dir": str(folder / "runs"), "device": "auto", **sections.pop("run", {})}
    return write_config(folder, run=run, **sections)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, write_config: Configure) -> tuple[Launched, Path]:
    """Run a compiled model in deterministic mode with all evaluations and two saves."""
    folder = tmp_path_factory.mktemp("compiled")
    items = folder / "items.jsonl"
    items.write_text("".join(json.dumps(hellaswag_item(number)) + "\n" for number in range(30)), encoding="utf-8")
    evaluations: dict[str, Any] = {"histograms": {"every": 6}, "hellaswag": {"every": 6, "path": str(items)}}
    config = on_gpu(folder, write_config, run={"deterministic": True, "compile": True}, **LARGE_ENOUGH, **evaluations)
    return train(config), folder


def test_one_rank_trains_over_nccl(compiled: tuple[Launched, Path]) -> None:
    launched, folder = compiled
    assert f"1 rank on {torch.cuda.get_device_name()}, NCCL" in launched.output
    records = metrics(folder)
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5


def test_evaluations_work_with_a_compiled_model(compiled: tuple[Launched, Path]) -> None:
    last = metrics(compiled[1])[-1]
    assert {"val/loss", "hellaswag/acc_norm"} <= set(last)
    samples = [file.read_text() for file in (compiled[1] / "runs" / "test" / "samples").glob("*")]
    assert any("The statement" in text for text in samples)
    assert "recompile" not in compiled[0].output


def test_metrics_have_values_of_nvml(compiled: tuple[Launched, Path]) -> None:
    first = metrics(compiled[1])[0]
    assert 10 < first["perf/gpu_temperature_c"] < 110
    assert first["perf/gpu_power_w"] > 10
    assert first["perf/gpu_throttled"] in (0, 1)
    assert 0 < first["perf/gpu_memory_gb"] < 10


def test_a_resume_is_bitwise_identical_in_deterministic_mode(compiled: tuple[Launched, Path], tmp_path: Path) -> None:
    """A thread has copied the state on another stream while training continued."""
    original = compiled[1]
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    config = folder / "run.yaml"
    config.write_text(config.read_text().replace(str(original), str(folder)))
    train(config, "--resume", "6")
    assert curve_differences(original / "runs" / "test", folder / "runs" / "test") == []
    ours, theirs = (path / "checkpoints" / "test" for path in (folder, original))
    assert newest_tag(ours) == newest_tag(theirs)
    assert checkpoint_differences(theirs / str(newest_tag(theirs)), ours / str(newest_tag(ours))) == []


def test_an_eager_model_is_deterministic(tmp_path: Path, write_config: Configure) -> None:
    curves = []
    for number in range(2):
        folder = tmp_path / str(number)
        train(on_gpu(folder, write_config, run={"deterministic": True, "compile": False}, **LARGE_ENOUGH))
        curves.append(folder / "runs" / "test")
    assert curve_differences(*curves) == []


def test_a_step_waits_for_the_gpu_once(tmp_path: Path, dataset_dir: Path) -> None:
    """It waits for the norm of the gradients, which decides on the update. The loop also reads the loss."""
    out, script = tmp_path / "waits.json", PROJECT / "tests" / "ranks_gpu.py"
    launched = launch(1, str(dataset_dir), str(out), script=script, accelerator="cuda")
    assert launched.code == 0, launched.output
    found = json.loads(out.read_text())
    assert found["accumulate"] == []
    assert len(found["apply"]) == 1 and "zero.py" in found["apply"][0]


def test_training_works_with_deepspeeds_fused_adam(tmp_path: Path, write_config: Configure) -> None:
    content = json.loads((PROJECT / "ds_configs" / "zero2_bf16.json").read_text())
    content["optimizer"] = {"type": "AdamW", "params": {}}
    file = tmp_path / "fused.json"
    file.write_text(json.dumps(content))
    train(on_gpu(tmp_path, write_config, deepspeed=str(file)))
    records = metrics(tmp_path)
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_agrees_with_the_cpu(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(300, 64, generator=generator), torch.randn(50_304, 64, generator=generator)
    targets = torch.randint(50_257, (300,), generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        h, w = (tensor.detach().to(device).requires_grad_() for tensor in (hidden, head))
        loss = cross_entropy(h, w, targets.to(device), 50_257, compiled and device == "cuda")
        loss.backward()
        assert h.grad is not None and w.grad is not None
        found.append([loss.detach().cpu(), h.grad.cpu(), w.grad.cpu()])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_cpu, on_gpu, rtol=1e-4, atol=1e-4)


def test_the_compiled_model_agrees_with_the_eager_model() -> None:
    torch.manual_seed(0)
    model = GPT2(ModelShape(3, 4, 128, 256)).to("cuda")
    tokens, targets = torch.randint(50_257, (2, 4, 256), device="cuda")
    found = []
    for _ in range(2):
        loss = model(tokens, targets)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
        model.compile_blocks()
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_a_snapshot_has_the_values_at_its_request() -> None:
    """The copy waits for work queued before it, runs on another stream, and is in pinned memory."""
    tensor = torch.zeros(2**24, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # cycles: delays the value by about 0.1 s
    tensor.fill_(7)
    ready = torch.cuda.Event()
    ready.record()
    memory, copies = HostMemory(), []
    thread = threading.Thread(target=lambda: copies.append(memory.copy({"tensor": tensor}, ready)))
    thread.start()
    thread.join()
    tensor.fill_(8)
    (copied,) = copies
    assert copied["tensor"].is_pinned()
    assert bool((copied["tensor"] == 7).all())
