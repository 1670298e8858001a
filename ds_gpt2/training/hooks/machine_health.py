"""State of the machine: memory, and temperature, power and throttling of GPUs by NVIDIA's library."""

from __future__ import annotations

import logging
import time
from typing import Any

import psutil
import torch

from ds_gpt2.config.interval import Every
from ds_gpt2.distributed import collectives
from ds_gpt2.engine.engine import Engine
from ds_gpt2.engine.train_state import TrainState
from ds_gpt2.monitoring.monitor import StepMetrics
from ds_gpt2.training.hooks.hook import Hook

log = logging.getLogger(__name__)

_SECONDS = 30.0  # between two measurements, regardless of the step time
# nvml.h, nvmlClocksEventReason*: HwSlowdown, SwThermalSlowdown, HwThermalSlowdown, HwPowerBrakeSlowdown. Running at the
# power cap is not among them: it is normal under full load.
_SLOWED_DOWN = 0x08 | 0x20 | 0x40 | 0x80


class Health(Hook):
    """Measures this machine on rank 0: the rank's host memory now, its peak GPU memory, and all GPUs of the run."""

    name = "state of the machine"
    can_be_repeated = False  # it is another one later

    def __init__(self, device: torch.device) -> None:
        self.every = Every(1)
        self._device = device
        self._next = 0.0
        self._gpus: list[Any] = []
        if device.type == "cuda" and collectives.is_main():
            self._gpus = _open_gpus()

    def observe(self, engine: Engine, state: TrainState) -> StepMetrics:
        if not collectives.is_main() or time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + _SECONDS
        metrics: StepMetrics = {"perf/host_memory_gb": psutil.Process().memory_info().rss / 1e9}
        if self._device.type == "cuda":
            metrics["perf/gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return metrics | self._gpu_metrics()

    def _gpu_metrics(self) -> StepMetrics:
        if not self._gpus:
            return {}
        import pynvml

        try:
            temperatures = [pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU) for gpu in self._gpus]
            milliwatts = [pynvml.nvmlDeviceGetPowerUsage(gpu) for gpu in self._gpus]
            reasons = [pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) for gpu in self._gpus]
        except pynvml.NVMLError as error:
            log.warning(f"temperature and power of the GPUs can no longer be read: {error}")
            self._gpus = []
            return {}
        return {
            "perf/gpu_temperature_c": float(max(temperatures)),
            "perf/gpu_power_w": sum(milliwatts) / 1000,
            "perf/gpu_throttled": float(sum(bool(reason & _SLOWED_DOWN) for reason in reasons)),
        }


def _open_gpus() -> list[Any]:
    """Return NVML's handles of the GPUs that torch sees; none, with a warning, if they are not available."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuids = [f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in range(torch.cuda.device_count())]
        return [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
    except Exception as error:  # no library, no driver, a container without permissions; a run does not need NVML
        log.warning(f"temperature and power of the GPUs cannot be read: {error}")
        return []
