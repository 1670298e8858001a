"""Host memory and GPU health are measured at intervals; the GPU metrics come from a fake NVML."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.training.hooks import Health, machine_health


class NVMLError(Exception):
    """Like the exception of pynvml."""


def _library(throttled: dict[str, int], broken: bool = False) -> Any:
    """Return a fake NVML of two GPUs."""

    def power(gpu: str) -> int:
        if broken:
            raise NVMLError("GPU is lost")
        return {"a": 300_000, "b": 250_500}[gpu]

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetTemperature=lambda gpu, sensor: {"a": 61, "b": 83}[gpu],
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetCurrentClocksThrottleReasons=throttled.__getitem__,
    )


def _observe(hook: Health) -> dict[str, Any]:
    nothing: Any = None
    return hook.observe(nothing, TrainState())


def test_the_machine_is_measured_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    hook = Health(torch.device("cpu"))
    assert 0.01 < _observe(hook)["perf/host_memory_gb"] < 100
    now[0] += 29
    assert _observe(hook) == {}
    now[0] += 1
    assert list(_observe(hook)) == ["perf/host_memory_gb"]


def test_gpu_metrics_are_the_maximum_temperature_total_power_and_throttled_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_the_power_cap, too_hot = 0x4, 0x40
    monkeypatch.setitem(sys.modules, "pynvml", _library({"a": at_the_power_cap, "b": too_hot | at_the_power_cap}))
    hook = Health(torch.device("cpu"))
    hook._gpus = ["a", "b"]
    seen = _observe(hook)
    del seen["perf/host_memory_gb"]
    assert seen == {"perf/gpu_temperature_c": 83.0, "perf/gpu_power_w": 550.5, "perf/gpu_throttled": 1.0}


def test_a_gpu_that_stops_answering_is_reported_once(monkeypatch: pytest.MonkeyPatch, log_messages: list[str]) -> None:
    monkeypatch.setattr(machine_health, "_SECONDS", 0.0)
    monkeypatch.setitem(sys.modules, "pynvml", _library({}, broken=True))
    hook = Health(torch.device("cpu"))
    hook._gpus = ["a", "b"]
    assert [list(_observe(hook)) for _ in range(3)] == [["perf/host_memory_gb"]] * 3
    assert log_messages == ["temperature and power of the GPUs can no longer be read: GPU is lost"]


def test_unavailable_gpu_metrics_are_reported_once(log_messages: list[str]) -> None:
    assert machine_health._open_gpus() == [] or torch.cuda.is_available()
    assert torch.cuda.is_available() or log_messages[0].startswith("temperature and power of the GPUs cannot be read")
