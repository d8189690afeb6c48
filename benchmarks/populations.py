"""Pairs of points in one forward pass: time and memory of an estimate and a step, a pair, over two plain forward passes.

python benchmarks/populations.py --threads 1 --json benchmarks/results/populations.json
python benchmarks/populations.py --shapes 8x64 --queries 8 32 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import environment, interleaved, peak_bytes, stamps, summary, write
from workload import Workload, add_options, build

from zo_lightning.engine import SPSA, LowRank, ZOOptimizer

WAYS = {
    "batched, rank 1": ("batched", LowRank(1, refresh=1)),
    "batched, rank 1, one basis": ("batched", LowRank(1, refresh=50)),
    "batched, rank 4": ("batched", LowRank(4, refresh=1)),
}
ALONE = {"exact, rank 1": ("exact", LowRank(1, refresh=1)), "exact, rademacher": ("exact", "rademacher")}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--shapes", nargs="+", default=["1x32", "1x128", "8x64"], help="sequences x tokens of the batch")
    parser.add_argument("--queries", type=int, nargs="+", default=[8], help="pairs of points a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="write the result to this file")
    return parser.parse_args(arguments)


def optimizer_of(workload: Workload, weights: str, noise: Any, queries: int) -> ZOOptimizer:
    """Whose steps move next to nothing."""
    return ZOOptimizer(workload.model, lr=1e-9, eps=1e-3, noise=noise, estimator=SPSA(queries), weights=weights, safeguard=None)


def estimating(optimizer: ZOOptimizer, workload: Workload) -> Callable[[], object]:
    """The evaluations of a step without its update."""

    def estimate() -> None:
        optimizer.estimate(workload.loss)
        optimizer.discard()

    return estimate


def difference(workload: Workload, queries: int) -> float:
    """The largest relative difference of the losses from those of perturbed copies of the weights."""
    values = []
    for weights in ("batched", "copy"):
        optimizer = optimizer_of(workload, weights, LowRank(1, refresh=1), queries)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step(workload.loss)
        values.append(torch.tensor(optimizer.report.values if optimizer.report else ()))
    return float(((values[0] - values[1]) / values[1]).abs().max())


def forwards(workload: Workload) -> Callable[[], object]:
    """Two plain forward passes."""

    @torch.no_grad()
    def both() -> None:
        workload.loss()
        workload.loss()

    return both


def measured(workload: Workload, queries: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a pair and their ratio to two forwards; peak tensor memory over what was there before."""
    contenders = {"two forwards": forwards(workload)}
    for name, (weights, noise) in {**WAYS, **ALONE}.items():
        optimizer = optimizer_of(workload, weights, noise, queries)
        if weights == "batched":
            contenders[f"{name}: estimate"] = estimating(optimizer, workload)
        contenders[f"{name}: step"] = partial(optimizer.step, workload.loss)
    seconds = interleaved({name: stamps(step, options.device) for name, step in contenders.items()}, options.rounds, 1)
    found: dict[str, Any] = {"largest_relative_difference_of_losses": difference(workload, queries)}
    base = summary(seconds["two forwards"])["median_ms"]
    for name, step in contenders.items():
        pairs = 1 if name == "two forwards" else queries
        a_pair = summary(second / pairs for second in seconds[name])
        peak, _ = peak_bytes(step, options.device)
        found[name] = {**a_pair, "over_two_forwards": round(a_pair["median_ms"] / base, 3), "peak_mb": round(peak / 1e6, 1)}
        print(f"  {name:32s} {a_pair['median_ms']:9.2f} ms a pair  {found[name]['over_two_forwards']:6.3f}  {peak / 1e6:8.1f} MB")
    return found


def main() -> None:
    """Every shape with every number of queries."""
    options = parse()
    rows = []
    for shape in options.shapes:
        options.batch, options.length = map(int, shape.split("x"))
        workload = build(options)
        for queries in options.queries:
            print(f"{shape}, {queries} pairs")
            rows.append({"shape": shape, "queries": queries, **measured(workload, queries, options)})
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items() if name != "json"}
    write(options.json, {"options": said, "environment": environment(options.device), "rows": rows})


if __name__ == "__main__":
    main()
