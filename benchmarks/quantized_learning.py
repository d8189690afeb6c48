"""What training the scales of a quantized model alone learns (QZO), and the memory that it takes over the quantized model's inference.

python benchmarks/quantized_learning.py --json benchmarks/results/quantized_learning.json      int8 and int4, the grid, then three seeds
python benchmarks/quantized_learning.py --steps 20 --factors 1 --seeds 0 --no-memory           seconds

MiniLM on docstring topics, weights quantized by torchao (int8 a row, int4 a group of 32), batch 64, lr decaying linearly to 0. The grid is
lr = 1e-3 f for f in --factors, with the first seed; the best of it gets the other seeds. Loss and accuracy are of the held-out texts. Peak
memory is of tensors, on a batch of 64, over what is there before: inference, and a step of each kind beside it; the last row is MeZO on all
weights of the model in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from grid import Grid
from learning import Docstrings, train
from measure import environment, peak_bytes
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from zo_lightning import ZOOptimizer
from zo_lightning.engine.parameters import total_bytes
from zo_lightning.quantized import train_scales

LR = 1e-3
KINDS: dict[str, Callable[[], Any]] = {
    "int8, a scale a row": Int8WeightOnlyConfig,
    "int4, groups of 32": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),  # type: ignore[attr-defined]
}


class Job(NamedTuple):
    """One run."""

    kind: str
    factor: float
    eps: float
    seed: int
    steps: int
    every: int


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--factors", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--eps", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory, too")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def quantized(run: Docstrings, kind: str) -> nn.Module:
    """The run's model, quantized."""
    quantize_(run.model, KINDS[kind]())
    return run.model


def learn(job: Job) -> dict[str, Any]:
    """One run: held-out loss and accuracy on its way, the first before any step."""
    run = Docstrings(job.seed, 64)
    model = quantized(run, job.kind)
    train_scales(model)
    integers = _digest(model)
    optimizer = ZOOptimizer(model, lr=LR * job.factor, eps=job.eps, seed=job.seed, dropout=False)
    accuracies, losses = [run.accuracy()], [held_out_loss(run)]

    def look(step: int) -> None:
        if step % job.every == 0 or step == job.steps:
            accuracies.append(round(run.accuracy(), 4))
            losses.append(round(held_out_loss(run), 4))

    with contextlib.suppress(FloatingPointError, RuntimeError):
        train(run, optimizer, job.steps, look)
    done = optimizer.steps == job.steps
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {"trained": trained, "accuracies": accuracies, "losses": losses, "integers_equal": _digest(model) == integers}
    return {**job._asdict(), **result, "accuracy": accuracies[-1] if done else None, "loss": losses[-1] if done else None}


@torch.no_grad()
def held_out_loss(run: Docstrings) -> float:
    """Mean cross entropy of the held-out texts."""
    run.model.eval()
    total, rows = 0.0, run.task.held_out
    for at in range(0, len(rows), 64):
        batch = run.collate([dict(row) for row in rows[at : at + 64]])
        total += float(F.cross_entropy(run.model(**batch)["logits"], batch["labels"], reduction="sum"))
    run.model.train()
    return total / len(rows)


def _digest(model: nn.Module) -> str:
    """Of the integers of all quantized weights."""
    digest = blake2b()
    for parameter in model.parameters():
        if hasattr(parameter, "qdata"):
            digest.update(parameter.qdata.contiguous().numpy().tobytes())
    return digest.hexdigest()


def memory(kinds: Sequence[str]) -> dict[str, Any]:
    """Bytes of tensors: the model's weights, the peak of a forward pass over them, and of a step with what it keeps."""
    rows: dict[str, Any] = {}
    for kind in kinds:
        for weights in ("exact", "copy", "inplace"):
            run = Docstrings(0, 64)
            train_scales(quantized(run, kind))
            rows[f"{kind}, {weights}"] = _memory(run, weights)
    rows["all weights in bfloat16, exact"] = _memory(Docstrings(0, 64, torch.bfloat16), "exact")
    for name, row in rows.items():
        print(
            f"{name:36} weights {row['weights'] / 1e6:7.2f} MB, inference {row['inference'] / 1e6:7.2f} MB, step {row['ratio']:.4f} of it"
        )
    return rows


def _memory(run: Docstrings, weights: str) -> dict[str, Any]:
    batch = run.batch()
    gc.collect()  # nothing of before may be freed while memory is measured
    held = sum(total_bytes(_parts(p)) for p in run.model.parameters()) + total_bytes(run.model.buffers())

    def loss() -> torch.Tensor:
        return run.loss(batch)

    @torch.no_grad()
    def inference() -> None:
        float(loss())

    inference()
    forward, _ = peak_bytes(inference, "cpu")
    optimizer = ZOOptimizer(run.model, lr=0.0, eps=1e-2, weights=weights, dropout=False, safeguard=None)
    _, kept = peak_bytes(lambda: [optimizer.step(loss) for _ in range(2)], "cpu")
    peak, _ = peak_bytes(lambda: optimizer.step(loss), "cpu")
    total = held + forward
    return {"weights": held, "inference": total, "step": held + kept + peak, "ratio": round((held + kept + peak) / total, 4)}


def _parts(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors inside a quantized weight but its scale, which is a parameter itself; or the tensor."""
    if not hasattr(parameter, "qdata"):
        return [parameter]
    return [part for part in vars(parameter).values() if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter)]


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind the lr and eps that were best with the first seed, and what all seeds learned with them."""
    rows = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        best = max((run for run in runs if run["kind"] == kind), key=lambda run: (_seeds(runs, run), run["accuracy"] or 0.0))
        own = [run for run in runs if all(run[name] == best[name] for name in ("kind", "factor", "eps")) and run["accuracy"] is not None]
        if own:
            start, end = ([run[name][at] for run in own] for name, at in (("accuracies", 0), ("accuracies", -1)))
            before, after = ([run["losses"][at] for run in own] for at in (0, -1))
            rows.append(
                {
                    **{name: best[name] for name in ("kind", "factor", "eps", "trained")},
                    "accuracy_before": statistics.fmean(start),
                    "accuracies": end,
                    "accuracy": statistics.fmean(end),
                    "loss_before": statistics.fmean(before),
                    "losses": after,
                    "integers_equal": all(run["integers_equal"] for run in own),
                }
            )
    return rows


def _seeds(runs: list[dict[str, Any]], like: dict[str, Any]) -> int:
    return sum(all(run[name] == like[name] for name in ("kind", "factor", "eps")) for run in runs)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, and write JSON. Runs that the file has are kept."""
    options = parse(arguments)
    chosen = {key: value for key, value in vars(options).items() if key != "json"}
    result = {"environment": environment("cpu") | {"torchao": version("torchao")}, "options": chosen}
    points = [
        Job(kind, f, eps, options.seeds[0], options.steps, options.every)
        for kind in options.kinds
        for f in options.factors
        for eps in options.eps
    ]
    with Grid(learn, summary, options.json, result, options.jobs, kept=["memory"]) as grid:
        if options.memory:
            grid.result["memory"] = memory(options.kinds)
        grid.make(points)
        first = {row["kind"]: row for row in summary([run for run in grid.runs if run["seed"] == options.seeds[0]])}
        more = [
            Job(kind, row["factor"], row["eps"], seed, options.steps, options.every)
            for kind, row in first.items()
            for seed in options.seeds
        ]
        grid.make(more)
    for row in grid.result["summary"]:
        accuracy = f"accuracy {row['accuracy_before']:.1%} -> {row['accuracies']}"
        print(f"{row['kind']:20} lr {LR * row['factor']:.0e}  {accuracy}, loss {row['loss_before']:.4f} -> {row['losses']}")
    return grid.result


if __name__ == "__main__":
    main()
