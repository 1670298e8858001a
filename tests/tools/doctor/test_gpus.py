"""Checks of the GPUs with a fake NVML, and of the kernel log."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_gpt2.tools.doctor import gpus
from ds_gpt2.tools.doctor.finding import Check, Finding, run_check
from ds_gpt2.tools.resources.gpus import open_gpus


class NVMLError(Exception):
    """Like the exception of pynvml."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


def nvml(**answers: Any) -> Any:
    """Return a fake NVML of two healthy GPUs, with some functions replaced by ``answers``."""

    def not_supported(*_: object) -> None:
        raise NVMLError(3)

    healthy = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-one": 1}[uuid],
        "nvmlDeviceGetName": lambda gpu: "RTX 4090",
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=24e9, free=23.5e9, used=0.5e9),
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [],
        "nvmlDeviceGetTotalEccErrors": lambda gpu, kind, since: 0,
        "nvmlDeviceGetRemappedRows": not_supported,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: 0x4,  # the power cap is not a fault
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 41,
        "nvmlDeviceGetTemperatureThreshold": lambda gpu, kind: 90,
        "nvmlDeviceGetPersistenceMode": lambda gpu: 1,
        "nvmlSystemGetCudaDriverVersion": lambda: 12_040,
        "nvmlSystemGetDriverVersion": lambda: "550.54",
    }
    constants = {
        "NVMLError": NVMLError,
        "NVML_ERROR_NOT_SUPPORTED": 3,
        "NVML_ERROR_LIB_RM_VERSION_MISMATCH": 18,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_VOLATILE_ECC": 0,
        "NVML_TEMPERATURE_GPU": 0,
        "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN": 1,
    }
    return SimpleNamespace(**{**healthy, **constants, **answers})


CHECKS: dict[str, Callable[[Any, list[Any]], Finding]] = {
    "count": lambda library, two: gpus.count(library, two, 2),
    "memory": lambda library, two: gpus.memory(library, two, 2 * 10**9),
    "other_programs": gpus.other_programs,
    "ecc_errors": gpus.ecc_errors,
    "remapped_rows": gpus.remapped_rows,
    "throttling": gpus.throttling,
    "temperature": gpus.temperature,
    "persistence": gpus.persistence,
}


@pytest.mark.parametrize("name", CHECKS)
def test_healthy_gpus(name: str) -> None:
    row = CHECKS[name](nvml(), [0, 1])
    assert (row.status, row.fix) == ("ok", "")


@pytest.mark.parametrize(
    ("name", "function", "answer", "status", "word"),
    [
        ("count", "nvmlDeviceGetName", ["RTX 4090", b"RTX 3090"].__getitem__, "warn", "1 x RTX 3090"),
        ("memory", "nvmlDeviceGetMemoryInfo", 1.5e9, "fail", "1.50 GB free of 24.00 GB"),
        ("memory", "nvmlDeviceGetMemoryInfo", 20e9, "warn", "GPU 0 1 already in use"),
        ("other_programs", "nvmlDeviceGetComputeRunningProcesses", os.getpid(), "warn", f"{os.getpid()} ("),
        ("ecc_errors", "nvmlDeviceGetTotalEccErrors", lambda gpu, kind, since: 2 * gpu, "warn", "GPU 1: 2"),
        ("remapped_rows", "nvmlDeviceGetRemappedRows", lambda gpu: (0, 1, 0, gpu), "fail", "GPU 1 has no spare"),
        ("remapped_rows", "nvmlDeviceGetRemappedRows", lambda gpu: (0, 1, gpu, 0), "warn", "GPU 1 needs a reset"),
        ("throttling", "nvmlDeviceGetCurrentClocksThrottleReasons", lambda gpu: 0x44 * gpu, "warn", "GPU 1: heat"),
        ("temperature", "nvmlDeviceGetTemperature", lambda gpu, sensor: 80, "warn", "80 C of 90"),
        ("persistence", "nvmlDeviceGetPersistenceMode", lambda gpu: 0, "warn", "reloads the driver"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_faulty_gpus(name: str, function: str, answer: Any, status: str, word: str) -> None:
    answers = {
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=24e9, free=answer, used=24e9 - answer),
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [SimpleNamespace(pid=answer)],
    }
    row = CHECKS[name](nvml(**{function: answers.get(function, answer)}), [0, 1])
    assert (row.status, word in row.found, bool(row.fix)) == (status, True, True), row


def test_selection_and_number_of_gpus() -> None:
    assert open_gpus(nvml(), "", 4) == [0, 1]
    assert open_gpus(nvml(), "1,0", 1) == [1]
    assert open_gpus(nvml(), "GPU-one", 1) == [1]
    assert gpus.count(nvml(), [0, 1], 4).status == "fail"


def test_a_driver_that_does_not_answer() -> None:
    def fails(code: int) -> Callable[[], None]:
        def init() -> None:
            raise NVMLError(code)

        return init

    assert gpus.driver(nvml()) is None
    updated, absent = gpus.driver(nvml(nvmlInit=fails(18))), gpus.driver(nvml(nvmlInit=fails(12)))
    assert updated is not None and (updated.status, "reboot" in updated.fix) == ("fail", True)
    assert absent is not None and absent.status == "unknown"


@pytest.mark.parametrize(
    ("driver", "built_for", "status"),
    [
        (12_040, "12.4", "ok"),
        (13_000, "12.8", "ok"),
        (12_040, "12.8", "warn"),
        (12_080, "13.0", "fail"),
        (1, None, "fail"),
    ],
)
def test_cuda_version_of_driver_and_pytorch(driver: int, built_for: str | None, status: str) -> None:
    assert gpus.versions(nvml(nvmlSystemGetCudaDriverVersion=lambda: driver), built_for).status == status


def test_an_unused_gpu_is_reported(tmp_path: Path) -> None:
    assert gpus.unused("cpu", 4, tmp_path).status == "ok"
    (tmp_path / "nvidia0").touch()
    assert gpus.unused("cpu", 4, tmp_path).status == "warn"


def test_kernel_log() -> None:
    lines = [
        (10.0, "NVRM: Xid (PCI:0000:65:00): 31, pid=1234, name=python, Ch 00000008"),
        (20.0, "Out of memory: Killed process 77 (python)"),
        (4000.0, "NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', GPU has fallen off the bus."),
        (4100.0, "I/O error, dev nvme0n1, sector 2048 op 0x0:(READ)"),
        (4200.0, "usb 1-1: new high-speed USB device"),
    ]
    xid = gpus.xids(lines, uptime=7600.0)
    assert xid.status == "warn"
    assert "1 x 79 (fell off the bus: power, heat or the slot); the last 1h ago" in xid.found
    errors = gpus.kernel_log(lines, uptime=7600.0)
    assert errors.found == "out of memory: 1, 2h 6m ago, disk errors: 1, 58m 20s ago"
    assert gpus.xids(lines[-1:], 7600.0).status == gpus.kernel_log(lines[-1:], 7600.0).status == "ok"
    row = run_check(Check("machine", "kernel log", lambda: gpus.kernel_log(gpus.read_kernel_log(), 1.0)))[0]
    assert row.status in ("ok", "warn", "unknown")  # not every user may read it
