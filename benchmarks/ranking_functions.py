"""RankSGD on two test functions of its paper (Tang et al., arXiv 2303.03751), from rankings only: value over queries.

python benchmarks/ranking_functions.py --json benchmarks/results/rankings.json --plot docs/images/rankings.png
python benchmarks/ranking_functions.py --functions rosenbrock --samples 5 --queries 60000 --json benchmarks/results/rankings_long.json

Quadratic |x|^2 and Rosenbrock's function in 20 dimensions, from x ~ N(0, 1). Every step asks an oracle for the order of m points, and that
is all the optimizer learns; a query is one point. Curves: medians over seeds, bands from the least to the largest. The step size falls
linearly to zero, for a step's length says nothing of how near the minimum is. With a line search the longest step is the same all the time,
and the points that it ranks are queries as well. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, write
from torch import Tensor, nn

from zo_lightning.engine import RankSGD, ZOOptimizer
from zo_lightning.engine.objectives import Ranking

DIMENSION, EPS, STEP = 20, 1e-3, 0.03
SEARCH, LONGEST = 14, 0.3
"""Lengths that a line search tries, each half of the one before, and the first of them."""


def quadratic(x: Tensor) -> float:
    """|x|^2; 0 at 0."""
    return float(x.square().sum())


def rosenbrock(x: Tensor) -> float:
    """sum_i 100 (x_i+1 - x_i^2)^2 + (1 - x_i)^2; 0 where all are 1."""
    return float((100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum())


FUNCTIONS: dict[str, Callable[[Tensor], float]] = {"quadratic": quadratic, "rosenbrock": rosenbrock}


def run(
    function: Callable[[Tensor], float], samples: int, top: int, seed: int, queries: int, search: int = 0, looks: int = 50
) -> dict[str, list[float]]:
    """The value along one run."""
    x = nn.Parameter(torch.randn(DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))

    def oracle(outputs: list[Tensor]) -> list[int]:
        return sorted(range(len(outputs)), key=lambda i: function(outputs[i]))[: top if len(outputs) == samples else 1]

    estimator, objective = RankSGD(samples, top, search), Ranking(oracle, top=top)
    optimizer = ZOOptimizer([x], lr=0.0, eps=EPS, noise="gaussian", seed=seed, estimator=estimator, objective=objective)
    asked = samples + len(estimator.along)
    steps = queries // asked
    curve: dict[str, list[float]] = {"queries": [0], "values": [function(x.detach())]}
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = EPS * (LONGEST if search else STEP * (1 - step / steps))
        optimizer.step(lambda: {"outputs": x})
        if (step + 1) % max(1, steps // looks) == 0 or step + 1 == steps:
            curve["queries"].append((step + 1) * asked)
            curve["values"].append(function(x.detach()))
    return curve


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """One panel a function."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = dict(zip(FUNCTIONS, figure.subplots(1, len(FUNCTIONS)), strict=True))
    for row in rows:
        queries = row["runs"][0]["queries"]
        values = list(zip(*(one["values"] for one in row["runs"]), strict=True))
        style = ":" if row["search"] else "-" if row["top"] == row["samples"] else "--"
        name = f"m = {row['samples']}, k = {row['top']}{', line search' if row['search'] else ''}"
        color = {3: "C0", 5: "C1", 10: "C2"}.get(row["samples"], "C3")
        ax = axes[row["function"]]
        ax.semilogy(queries, [statistics.median(v) for v in values], style, color=color, label=name)
        ax.fill_between(queries, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.1)
    for name, ax in axes.items():
        ax.set(title=f"{name}, {DIMENSION} dimensions", xlabel="queries (points that were ranked)", ylabel="value")
    axes["rosenbrock"].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(given: list[str] | None = None) -> None:
    """Run all and print where each ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=FUNCTIONS)
    parser.add_argument("--queries", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", default=None)
    parser.add_argument("--plot", default=None)
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    rows = []
    for name, function in ((name, FUNCTIONS[name]) for name in args.functions):
        for samples in args.samples:
            for top, search in ((1, 0), (samples, 0), (samples, SEARCH)):
                runs = [run(function, samples, top, seed, args.queries, search) for seed in range(args.seeds)]
                rows.append({"function": name, "samples": samples, "top": top, "search": search, "runs": runs})
                first, last = ([one["values"][i] for one in runs] for i in (0, -1))
                ends = f"{statistics.median(first):10.4g} -> {statistics.median(last):10.4g}"
                print(f"{name:10} m={samples:<3} k={top:<3} search={search:<3} {ends}  (median of {args.seeds})", flush=True)
    if args.json:
        options = {"dimension": DIMENSION, "eps": EPS, "step": STEP, "longest": LONGEST, "queries": args.queries, "seeds": args.seeds}
        write(Path(args.json), {"environment": environment("cpu"), "options": options, "rows": rows})
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed.")
    elif args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
