"""Check the GPUs through NVIDIA's management library (NVML), and the kernel log for errors of GPUs, disks and memory.

The functions take the library as an argument: ``pynvml``, or an object with the same functions.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ds_gpt2.common.formatting import counted, duration, size
from ds_gpt2.tools.doctor.finding import Finding

_BUSY = 1_000_000_000  # bytes: more than a desktop environment uses
_HOT = 15  # degrees below the temperature at which a GPU slows down
# nvml.h, nvmlClocksEventReason*: the reasons that indicate a fault. Running at the power cap is not one of them.
_THROTTLED_BY = {
    0x08: "hardware (heat, power supply or its brake)",
    0x20: "heat, by the driver",
    0x40: "heat, by the hardware",
    0x80: "the power supply's brake",
}
# From NVIDIA's catalog of Xid errors: those that occur in long training. The others are reported by number only.
_XIDS = {
    13: "a program's error, or a memory fault",
    31: "a program accessed an invalid address",
    43: "a program was stopped after an error",
    45: "a program was ended early",
    48: "memory: a double-bit error",
    63: "memory: a row was remapped or a page retired",
    64: "memory: a row could not be remapped",
    74: "NVLink",
    79: "fell off the bus: power, heat or the slot",
    94: "memory: a contained error, one program affected",
    95: "memory: an uncontained error, all programs affected",
    119: "the GPU's system processor (GSP) does not answer",
    120: "the GPU's system processor (GSP) failed",
}
_KERNEL_ERRORS = {
    "out of memory": r"Out of memory: Killed process|oom-kill:constraint",
    "disk errors": r"I/O error, dev |critical medium error|EXT4-fs error|XFS .*[Cc]orruption|BTRFS error",
    "hardware errors": r"\[Hardware Error\]|Machine check events logged|EDAC .*\bUE\b|AER: .*(Uncorrect|Fatal)",
}


def unused(accelerator: str, ranks: int, devices: Path = Path("/dev")) -> Finding:
    """Check, for a run on the CPU, whether this machine has an unused GPU."""
    found = f"none used: {counted(ranks, 'rank')} on the CPU"
    if (devices / "nvidia0").exists():
        fix = "for a GPU, install a CUDA build of PyTorch and set run.device=cuda"
        return Finding("GPUs", "warn", f"{found}, although there is an NVIDIA device", fix)
    return Finding("GPUs", "ok", found)


def driver(nvml: Any) -> Finding | None:
    """Return None if NVML answers, else a finding with the reason. CUDA may work without NVML in some containers."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            found = "was updated while it was loaded: new programs find no GPU"
            return Finding("GPU driver", "fail", found, "reboot: `sudo reboot`")
        fix = "see `nvidia-smi`; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return Finding("GPU driver", "unknown", f"the GPUs cannot be queried: {error}", fix)
    return None


def count(nvml: Any, gpus: list[Any], ranks: int) -> Finding:
    """Check that there is a GPU for each rank, and that all are the same model."""
    names = Counter(_text(nvml.nvmlDeviceGetName(gpu)) for gpu in gpus)
    found = ", ".join(f"{number} x {name}" for name, number in names.items()) or "none"
    if len(gpus) < ranks:
        fix = f"start with --num_gpus {len(gpus)}, or check `nvidia-smi`"
        return Finding("GPUs", "fail", f"{found}; {counted(ranks, 'rank')}", fix)
    if len(names) > 1:
        fix = "the slowest GPU limits all ranks: select GPUs of one model with CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", "warn", found, fix)
    return Finding("GPUs", "ok", found)


def memory(nvml: Any, gpus: list[Any], need: int) -> Finding:
    """Check the free memory of each GPU.

    Args:
        need: bytes on each GPU, without activations.
    """
    infos = [nvml.nvmlDeviceGetMemoryInfo(gpu) for gpu in gpus]
    least = min(info.free for info in infos)
    found = f"{size(least)} free of {size(min(info.total for info in infos))}; weights and state take {size(need)}"
    if least < need:
        fix = "stop other programs on the GPUs, or use more GPUs or a smaller model"
        return Finding("GPU memory", "fail", found, fix)
    busy = [str(number) for number, info in enumerate(infos) if info.used > _BUSY]
    if busy:
        fix = "stop the programs that are listed below"
        return Finding("GPU memory", "warn", f"{found}; GPU {' '.join(busy)} already in use", fix)
    return Finding("GPU memory", "ok", found)


def other_programs(nvml: Any, gpus: list[Any]) -> Finding:
    """Check whether other processes compute on these GPUs."""
    found = []
    for number, gpu in enumerate(gpus):
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu):
            found.append(f"{process.pid} ({_name(process.pid)}) on GPU {number}")
    if found:
        fix = "they use memory and compute time: wait until they end, or stop them"
        return Finding("GPU programs", "warn", ", ".join(found), fix)
    return Finding("GPU programs", "ok", "no other program computes on them")


def ecc_errors(nvml: Any, gpus: list[Any]) -> Finding:
    """Check for memory errors that ECC could not correct since the driver was loaded."""
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    counts = _each(nvml, gpus, lambda gpu: nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, since))
    if not counts:
        return Finding("ECC", "ok", "not supported by these GPUs, or off: memory errors are not detected")
    if bad := {number: errors for number, errors in counts.items() if errors}:
        found = ", ".join(f"GPU {number}: {errors}" for number, errors in bad.items())
        fix = "reset them (`sudo nvidia-smi --gpu-reset`) or reboot; replace a GPU that reports errors again"
        return Finding("ECC", "warn", f"uncorrectable errors: {found}", fix)
    return Finding("ECC", "ok", "no uncorrectable error")


def remapped_rows(nvml: Any, gpus: list[Any]) -> Finding:
    """Check the rows of memory that were replaced by spare rows."""
    rows = _each(nvml, gpus, nvml.nvmlDeviceGetRemappedRows)
    if broken := [str(number) for number, (_, _, _, failed) in rows.items() if failed]:
        return Finding("remapped rows", "fail", f"GPU {' '.join(broken)} has no spare rows left", "replace the GPU")
    if waiting := [str(number) for number, (_, _, pending, _) in rows.items() if pending]:
        found = f"GPU {' '.join(waiting)} needs a reset"
        return Finding("remapped rows", "warn", found, "`sudo nvidia-smi --gpu-reset`")
    total = sum(corrected + uncorrected for corrected, uncorrected, _, _ in rows.values())
    found = f"{total} rows, no reset pending" if rows else "not reported by these GPUs"
    return Finding("remapped rows", "ok", found)


def throttling(nvml: Any, gpus: list[Any]) -> Finding:
    """Check whether a GPU is throttled while idle."""
    reasons = _each(nvml, gpus, nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    words = [
        f"GPU {number}: {word}" for number, bits in reasons.items() for bit, word in _THROTTLED_BY.items() if bits & bit
    ]
    if words:
        fix = "check fans, airflow and power cables; details: `nvidia-smi -q -d PERFORMANCE`"
        return Finding("throttling", "warn", f"throttled while idle: {', '.join(words)}", fix)
    return Finding("throttling", "ok", "none is throttled")


def temperature(nvml: Any, gpus: list[Any]) -> Finding:
    """Check the temperature of the idle GPUs."""
    degrees = _each(nvml, gpus, lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
    limit = nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    limits = _each(nvml, gpus, lambda gpu: nvml.nvmlDeviceGetTemperatureThreshold(gpu, limit))
    found = ", ".join(
        f"{now} C" + (f" of {limits[number]}" if number in limits else "") for number, now in degrees.items()
    )
    if any(now > limits[number] - _HOT for number, now in degrees.items() if number in limits):
        fix = "close to the throttling temperature without load: improve the cooling"
        return Finding("temperature", "warn", found, fix)
    return Finding("temperature", "ok", found or "not reported by these GPUs")


def persistence(nvml: Any, gpus: list[Any]) -> Finding:
    """Check whether the driver remains loaded between two starts (persistence mode)."""
    modes = _each(nvml, gpus, nvml.nvmlDeviceGetPersistenceMode)
    if not all(modes.values()):
        fix = "`sudo systemctl enable --now nvidia-persistenced`, or `sudo nvidia-smi -pm 1`"
        return Finding("persistence", "warn", "off: each start reloads the driver and resets error counts", fix)
    return Finding("persistence", "ok", "the driver remains loaded")


def versions(nvml: Any, torch_cuda: str | None) -> Finding:
    """Check that the driver's CUDA version is not older than PyTorch's (minor version compatibility).

    Args:
        torch_cuda: ``torch.version.cuda``.
    """
    number = nvml.nvmlSystemGetCudaDriverVersion()  # 12040 for 12.4
    supported = (number // 1000, number % 1000 // 10)
    found = f"driver {_text(nvml.nvmlSystemGetDriverVersion())} for CUDA up to {supported[0]}.{supported[1]}"
    if torch_cuda is None:
        fix = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
        return Finding("CUDA", "fail", f"{found}; this PyTorch is built for the CPU", fix)
    required = tuple(int(part) for part in torch_cuda.split(".")[:2])
    found += f"; PyTorch is built for {torch_cuda}"
    if supported[0] < required[0]:
        fix = f"install a driver for CUDA {required[0]}, or a PyTorch built for CUDA {supported[0]}"
        return Finding("CUDA", "fail", found, fix)
    if supported < required:
        return Finding("CUDA", "warn", found, "most kernels work; if one fails to load, update the driver")
    return Finding("CUDA", "ok", found)


def xids(lines: Iterable[tuple[float, str]], uptime: float) -> Finding:
    """Check the kernel log for errors of the GPUs.

    Args:
        lines: (seconds since boot, text) of each line.
        uptime: seconds since boot, now.
    """
    found = [(when, int(match[1])) for when, line in lines if (match := re.search(r"NVRM: Xid \([^)]*\): (\d+)", line))]
    if not found:
        return Finding("Xid", "ok", "the kernel has logged no error of a GPU")
    counts = Counter(code for _, code in found)
    errors = ", ".join(f"{times} x {code}" + _meaning(code) for code, times in counts.most_common())
    fix = "`sudo dmesg | grep Xid`; an error that returns after a reboot is due to the GPU, its slot or its power"
    return Finding("Xid", "warn", f"{errors}; the last {duration(uptime - found[-1][0])} ago", fix)


def kernel_log(lines: Iterable[tuple[float, str]], uptime: float) -> Finding:
    """Check the kernel log for other errors: out of memory, disks, hardware. Arguments as for ``xids``."""
    last: dict[str, tuple[int, float]] = {}
    for when, line in lines:
        for word, pattern in _KERNEL_ERRORS.items():
            if re.search(pattern, line):
                last[word] = (last.get(word, (0, 0.0))[0] + 1, when)
    if last:
        found = ", ".join(f"{word}: {times}, {duration(uptime - when)} ago" for word, (times, when) in last.items())
        fix = "see `sudo dmesg -T`: a disk or memory module may be failing"
        return Finding("kernel log", "warn", found, fix)
    return Finding("kernel log", "ok", f"no errors since the machine started, {duration(uptime)} ago")


def read_kernel_log(file: Path = Path("/dev/kmsg")) -> Iterator[tuple[float, str]]:
    """Yield (seconds since boot, text) of each line of the kernel log.

    Raises:
        PermissionError: only root may read the log on this machine.
    """
    log = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):  # raised after the last line
            while True:
                with contextlib.suppress(BrokenPipeError):  # the line was overwritten: continue with the next
                    prefix, _, text = os.read(log, 8192).decode(errors="replace").partition(";")
                    yield int(prefix.split(",")[2]) / 1e6, text
    finally:
        os.close(log)


def _each(nvml: Any, gpus: list[Any], query: Callable[[Any], Any]) -> dict[int, Any]:
    """Return the answer of each GPU by its number, without the GPUs that do not support the query."""
    answers = {}
    for number, gpu in enumerate(gpus):
        try:
            answers[number] = query(gpu)
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_NOT_SUPPORTED:
                raise
    return answers


def _meaning(code: int) -> str:
    return f" ({_XIDS[code]})" if code in _XIDS else ""


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "of another container or user"


def _text(value: str | bytes) -> str:
    """Return ``value`` as text: older versions of the library return bytes."""
    return value.decode() if isinstance(value, bytes) else value
