"""How benchmarks measure: interleaved rounds, medians, tensor memory, and a JSON file that says on what."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Contender = Callable[[int], list[float]]
"""Runs n steps and returns the seconds of each."""


def stamps(step: Callable[[], object], device: str) -> Contender:
    """A contender out of a function that makes one step: CUDA events on a GPU, a monotonic clock elsewhere."""

    def run(count: int) -> list[float]:
        return [_on_gpu(step) if device.startswith("cuda") else _on_cpu(step) for _ in range(count)]

    return run


def _on_cpu(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _on_gpu(step: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def interleaved(contenders: Mapping[str, Contender], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every step: in each round every contender runs `steps` steps, in an order that turns by one each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name in contenders:
        contenders[name](2)  # warm-up: compilation, caches, the engine's look at the model
    names = list(contenders)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name] += contenders[name](steps)
    return seconds


def summary(seconds: Iterable[float]) -> dict[str, float]:
    """Milliseconds: median, quartiles, number of steps."""
    values = sorted(1e3 * s for s in seconds)
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median_ms": round(middle, 3), "quartile1_ms": round(low, 3), "quartile3_ms": round(high, 3), "steps": len(values)}


def peak_bytes(work: Callable[[], object], device: str) -> tuple[int, int]:
    """(peak, end) of the tensor memory while `work` runs, over what was there before, in bytes."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    events = run.profiler.kineto_results.events()
    deltas = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, nbytes in deltas:
        now += nbytes
        peak = max(peak, now)
    return peak, now


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware."""
    packages = ("torch", "lightning", "transformers", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """The result as JSON, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Written to {path}")
