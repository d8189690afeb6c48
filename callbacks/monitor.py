"""ZOMonitor: what forward-only training measures, as charts in the host's loggers (TensorBoard and others)."""

from __future__ import annotations

import importlib.util
import math
import sys

import torch

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.report import StepReport

_MEANS = ("loss_plus", "loss_minus", "projected_grad", "step_seconds", "resolution")


class ZOMonitor(ZOCallback):
    """Logs, each time the host logs, under the prefix "zo/" (docs/metrics.md says what each chart tells):

    - means over the steps since the last time: `loss_plus`, `loss_minus`, `projected_grad`, `step_seconds`, and `resolution`, the
      difference of the losses over the float32 spacing at the loss; `projected_grad_rms`, its root mean square;
    - shares of those steps: `zero_difference_share`, `skipped_share`;
    - the state now: `eps`, `lr`, `forward_passes`, `peak_memory_gb` (torch's peak on a GPU, else that of the process; 1e9 bytes).
    """

    def __init__(self) -> None:
        self._reports: list[StepReport] = []
        self._device = torch.device("cpu")

    def on_run_start(self, run: Run) -> None:
        self._reports = []
        devices = run.optimizer.residency.devices()
        self._device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self._reports.append(report)

    def metrics(self) -> dict[str, float]:
        reports, self._reports = self._reports, []
        if not reports:
            return {}
        last, used = reports[-1], [r for r in reports if not r.skipped]
        charts = {
            "eps": last.eps,
            "lr": last.lr,
            "forward_passes": float(last.forward_passes),
            "zero_difference_share": _mean([float(r.zero_difference) for r in reports]),
            "skipped_share": _mean([float(r.skipped) for r in reports]),
        }
        peak = peak_memory(self._device)
        if peak is not None:
            charts["peak_memory_gb"] = peak / 1e9
        for name in _MEANS:
            values = [getattr(r, "seconds" if name == "step_seconds" else name) for r in used]
            if values:
                charts[name] = _mean(values)
        if used:
            charts["projected_grad_rms"] = math.sqrt(_mean([r.projected_grad**2 for r in used]))
        return {f"zo/{name}": value for name, value in charts.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: torch's peak allocation on a CUDA device, else the largest resident size that the process had; None where Windows hides it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
