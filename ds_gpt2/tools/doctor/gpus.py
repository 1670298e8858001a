"""The GPUs, asked through NVIDIA's management library (NVML); and what the kernel has logged of them and of the disks.

Functions take the library as an argument: ``pynvml``, or anything with the same functions.
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
from ds_gpt2.tools.doctor.row import Finding

_BUSY = 1_000_000_000  # bytes: more than a desktop takes
_HOT = 15  # degrees below the point where a GPU slows itself down
# nvml.h, nvmlClocksEventReason*: those that mean trouble. Running at the power cap is not among them.
_SLOWED_BY = {
    0x08: "hardware (heat, power supply or its brake)",
    0x20: "heat, by the driver",
    0x40: "heat, by the hardware",
    0x80: "the power supply's brake",
}
# NVIDIA's catalogue of Xid errors, those that weeks of training meet; the others are named by number only.
_XIDS = {
    13: "a program's error, or a memory fault",
    31: "a program's access to memory that is not there",
    43: "a program was stopped after an error",
    45: "a program was ended early",
    48: "memory: an error of two bits",
    63: "memory: a row was remapped or a page retired",
    64: "memory: a row could not be remapped",
    74: "NVLink",
    79: "fell off the bus: power, heat or the slot",
    94: "memory: an error that hit one program",
    95: "memory: an error that hit all programs",
    119: "its own processor does not answer",
    120: "its own processor failed",
}
_TROUBLE = {
    "out of memory": r"Out of memory: Killed process|oom-kill:constraint",
    "disk errors": r"I/O error, dev |critical medium error|EXT4-fs error|XFS .*[Cc]orruption|BTRFS error",
    "hardware errors": r"\[Hardware Error\]|Machine check events logged|EDAC .*\bUE\b|AER: .*(Uncorrect|Fatal)",
}


def unused(accelerator: str, ranks: int, devices: Path = Path("/dev")) -> Finding:
    """For a run on the CPU: whether a GPU lies idle."""
    found = f"none used: {counted(ranks, 'rank')} on the CPU"
    if (devices / "nvidia0").exists():
        fix = "for a GPU, install a CUDA build of PyTorch and set run.device=cuda"
        return Finding("GPUs", "warn", f"{found}, though there is an NVIDIA device", fix)
    return Finding("GPUs", "ok", found)


def driver(nvml: Any) -> Finding | None:
    """None where NVML answers; else the row that says why not. CUDA may work without it, as in some containers."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            found = "was updated while it was loaded: what starts now finds no GPU"
            return Finding("GPU driver", "fail", found, "reboot: `sudo reboot`")
        fix = "`nvidia-smi` says more; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return Finding("GPU driver", "unknown", f"the GPUs cannot be looked at: {error}", fix)
    return None


def count(nvml: Any, gpus: list[Any], ranks: int) -> Finding:
    """As many as ranks, and of one kind."""
    names = Counter(_text(nvml.nvmlDeviceGetName(gpu)) for gpu in gpus)
    found = ", ".join(f"{number} x {name}" for name, number in names.items()) or "none"
    if len(gpus) < ranks:
        return Finding(
            "GPUs",
            "fail",
            f"{found}; {counted(ranks, 'rank')}",
            f"start with --num_gpus {len(gpus)}, or look at `nvidia-smi`",
        )
    if len(names) > 1:
        return Finding("GPUs", "warn", found, "the slowest sets the pace: choose alike ones with CUDA_VISIBLE_DEVICES")
    return Finding("GPUs", "ok", found)


def memory(nvml: Any, gpus: list[Any], need: int) -> Finding:
    """
    Args:
        need: bytes on each, without activations.
    """
    infos = [nvml.nvmlDeviceGetMemoryInfo(gpu) for gpu in gpus]
    least = min(info.free for info in infos)
    found = f"{size(least)} free of {size(min(info.total for info in infos))}; weights and state take {size(need)}"
    if least < need:
        return Finding("GPU memory", "fail", found, "end what else uses them, or take more GPUs or a smaller model")
    busy = [str(number) for number, info in enumerate(infos) if info.used > _BUSY]
    if busy:
        return Finding("GPU memory", "warn", f"{found}; GPU {' '.join(busy)} already in use", "see who, below; end it")
    return Finding("GPU memory", "ok", found)


def others(nvml: Any, gpus: list[Any]) -> Finding:
    """Processes that compute on these GPUs."""
    found = []
    for number, gpu in enumerate(gpus):
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu):
            found.append(f"{process.pid} ({_name(process.pid)}) on GPU {number}")
    if found:
        return Finding(
            "GPU programs", "warn", ", ".join(found), "they take memory and time: wait for them, or end them"
        )
    return Finding("GPU programs", "ok", "nothing else computes on them")


def errors(nvml: Any, gpus: list[Any]) -> Finding:
    """Memory errors that ECC could not correct, since the driver was loaded."""
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    counts = _each(nvml, gpus, lambda gpu: nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, since))
    if not counts:
        return Finding("ECC", "ok", "these cards have none, or it is off: memory errors would go unnoticed")
    if bad := {number: errors for number, errors in counts.items() if errors}:
        found = ", ".join(f"GPU {number}: {errors}" for number, errors in bad.items())
        fix = "reset them (`sudo nvidia-smi --gpu-reset`) or reboot; a card where it comes again is broken"
        return Finding("ECC", "warn", f"errors that could not be corrected: {found}", fix)
    return Finding("ECC", "ok", "no error that could not be corrected")


def remapped(nvml: Any, gpus: list[Any]) -> Finding:
    """Rows of memory that were replaced by spare ones."""
    rows = _each(nvml, gpus, nvml.nvmlDeviceGetRemappedRows)
    if broken := [str(number) for number, (_, _, _, failed) in rows.items() if failed]:
        return Finding(
            "remapped rows", "fail", f"GPU {' '.join(broken)} has no spare rows left", "have the card replaced"
        )
    if waiting := [str(number) for number, (_, _, pending, _) in rows.items() if pending]:
        return Finding(
            "remapped rows", "warn", f"GPU {' '.join(waiting)} waits for a reset", "`sudo nvidia-smi --gpu-reset`"
        )
    total = sum(corrected + uncorrected for corrected, uncorrected, _, _ in rows.values())
    return Finding("remapped rows", "ok", f"{total} rows, none waits" if rows else "these cards do not count them")


def slowed(nvml: Any, gpus: list[Any]) -> Finding:
    """Whether a GPU is slowed down now, at rest."""
    reasons = _each(nvml, gpus, nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    words = [
        f"GPU {number}: {word}" for number, bits in reasons.items() for bit, word in _SLOWED_BY.items() if bits & bit
    ]
    if words:
        fix = "look at fans, air and power cables; `nvidia-smi -q -d PERFORMANCE` says more"
        return Finding("throttling", "warn", f"slowed down already: {', '.join(words)}", fix)
    return Finding("throttling", "ok", "none is slowed down")


def temperature(nvml: Any, gpus: list[Any]) -> Finding:
    """How hot they are before there is any work."""
    degrees = _each(nvml, gpus, lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
    limit = nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    limits = _each(nvml, gpus, lambda gpu: nvml.nvmlDeviceGetTemperatureThreshold(gpu, limit))
    found = ", ".join(
        f"{now} C" + (f" of {limits[number]}" if number in limits else "") for number, now in degrees.items()
    )
    if any(now > limits[number] - _HOT for number, now in degrees.items() if number in limits):
        return Finding("temperature", "warn", found, "close to where they slow down, and nothing runs yet: more air")
    return Finding("temperature", "ok", found or "these cards do not tell")


def persistence(nvml: Any, gpus: list[Any]) -> Finding:
    """Whether the driver stays loaded between two starts."""
    modes = _each(nvml, gpus, nvml.nvmlDeviceGetPersistenceMode)
    if not all(modes.values()):
        fix = "`sudo systemctl enable --now nvidia-persistenced`, or `sudo nvidia-smi -pm 1`"
        return Finding("persistence", "warn", "off: each start loads the driver anew and forgets error counts", fix)
    return Finding("persistence", "ok", "the driver stays loaded")


def versions(nvml: Any, torch_cuda: str | None) -> Finding:
    """The driver's CUDA against PyTorch's: the major version must not be older (minor version compatibility).

    Args:
        torch_cuda: ``torch.version.cuda``.
    """
    number = nvml.nvmlSystemGetCudaDriverVersion()  # 12040 for 12.4
    theirs = (number // 1000, number % 1000 // 10)
    found = f"driver {_text(nvml.nvmlSystemGetDriverVersion())} for CUDA up to {theirs[0]}.{theirs[1]}"
    if torch_cuda is None:
        fix = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
        return Finding("CUDA", "fail", f"{found}; this PyTorch is built for the CPU", fix)
    ours = tuple(int(part) for part in torch_cuda.split(".")[:2])
    found += f"; PyTorch is built for {torch_cuda}"
    if theirs[0] < ours[0]:
        return Finding("CUDA", "fail", found, f"a driver for CUDA {ours[0]}, or a PyTorch built for CUDA {theirs[0]}")
    if theirs < ours:
        return Finding("CUDA", "warn", found, "most of it works; should a kernel be refused, update the driver")
    return Finding("CUDA", "ok", found)


def xids(lines: Iterable[tuple[float, str]], uptime: float) -> Finding:
    """The GPUs' errors in the kernel's log.

    Args:
        lines: of the log, each with the seconds after the start of the machine.
        uptime: seconds since then.
    """
    found = [(when, int(match[1])) for when, line in lines if (match := re.search(r"NVRM: Xid \([^)]*\): (\d+)", line))]
    if not found:
        return Finding("Xid", "ok", "the kernel has logged no error of a GPU")
    counts = Counter(code for _, code in found)
    told = ", ".join(f"{times} x {code}" + _meaning(code) for code, times in counts.most_common())
    fix = "`sudo dmesg | grep Xid`; one that comes again after a reboot is the card, its slot or its power"
    return Finding("Xid", "warn", f"{told}; the last {duration(uptime - found[-1][0])} ago", fix)


def kernel_log(lines: Iterable[tuple[float, str]], uptime: float) -> Finding:
    """What else the kernel has complained of: memory that ran out, disks, hardware; arguments as of ``xids``."""
    last: dict[str, tuple[int, float]] = {}
    for when, line in lines:
        for word, pattern in _TROUBLE.items():
            if re.search(pattern, line):
                last[word] = (last.get(word, (0, 0.0))[0] + 1, when)
    if last:
        found = ", ".join(f"{word}: {times}, {duration(uptime - when)} ago" for word, (times, when) in last.items())
        return Finding(
            "kernel log", "warn", found, "`sudo dmesg -T` shows them: a disk or memory module may be failing"
        )
    return Finding("kernel log", "ok", f"no trouble in {duration(uptime)} since the machine started")


def read_kernel_log(file: Path = Path("/dev/kmsg")) -> Iterator[tuple[float, str]]:
    """Its lines, each with the seconds after the start of the machine.

    Raises:
        PermissionError: only root may read it here.
    """
    log = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):  # that was the last
            while True:
                with contextlib.suppress(BrokenPipeError):  # overwritten while it was read: the next one
                    prefix, _, text = os.read(log, 8192).decode(errors="replace").partition(";")
                    yield int(prefix.split(",")[2]) / 1e6, text
    finally:
        os.close(log)


def _each(nvml: Any, gpus: list[Any], ask: Callable[[Any], Any]) -> dict[int, Any]:
    """What each GPU answers, by number; those that do not know the question are left out."""
    answers = {}
    for number, gpu in enumerate(gpus):
        try:
            answers[number] = ask(gpu)
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
    """Older versions of the library return bytes."""
    return value.decode() if isinstance(value, bytes) else value
