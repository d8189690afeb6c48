"""The machine of a plan: its memory, and how fast it computes and moves bytes, measured, given or assumed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

ASSUMED_DISK, ASSUMED_BUS, ASSUMED_GPU = 1.0e9, 20.0e9, 50.0e12
"""Bytes a second of a disk and of PCIe 4 x16 with pinned memory; floating-point operations a second of a GPU in 16 bits."""
ASSUMED_PROCESS = 400_000_000
"""Resident bytes of Python with torch and transformers."""


@dataclass(frozen=True)
class Machine:
    """`device` is "cpu" or "cuda"; bytes, bytes a second, floating-point operations a second, and where each of these comes from.

    `memory` None: modes are compared, and all fit. `process` is the resident memory of Python and its packages, which counts on a CPU.
    """

    device: str
    memory: int | None
    flops: float
    flops_source: str = "given"
    disk_bandwidth: float = ASSUMED_DISK
    disk_source: str = "assumed"
    bus_bandwidth: float = ASSUMED_BUS
    bus_source: str = "assumed"
    process: int = ASSUMED_PROCESS
    process_source: str = "assumed"

    @property
    def on_gpu(self) -> bool:
        """Whether the device has memory of its own."""
        return self.device != "cpu"


def measured_flops(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second of square matrix products, the best of those that `seconds` allow."""
    size = 1024 if device == "cpu" else 8192
    one = torch.randn(size, size, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        began = time.perf_counter()
        one @ one
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def resident_bytes() -> int | None:
    """The memory of this process just now; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next((1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS")), None)
