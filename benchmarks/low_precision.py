"""16-bit weights: what of an update arrives, and what a bfloat16 run learns beside a float32 one.

python benchmarks/low_precision.py --json benchmarks/results/low_precision.json
python benchmarks/low_precision.py --steps 0                          only the applied update: seconds

Applied update: weights N(0, 0.02), lr 1e-7, projected gradient 30, 1,000 steps; the mean of (change of theta) z / (-lr g).
Learning: MiniLM on docstring topics, as in the demo. "nearest" is round-to-nearest in place, MeZO's arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from learning import Docstrings, train
from measure import environment, write
from workload import DTYPES

from zo_lightning import ZOOptimizer
from zo_lightning.engine.noise import Item, Rademacher, sweep
from zo_lightning.engine.residency import Residency
from zo_lightning.engine.seeds import query_seed, rounding_seed

RUNS = {"float32 exact": ("float32", "exact", True), "bfloat16 exact": ("bfloat16", "exact", True)}
RUNS["bfloat16 in place, nearest"] = ("bfloat16", "inplace", False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of each run; 0 leaves learning out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def applied(dtype: torch.dtype, stochastic: bool, steps: int = 1000, count: int = 1 << 18, c: float = -3e-6) -> dict[str, float]:
    """Mean over weights and steps of the applied update over the exact one, and the share of weights that a step leaves as they are."""
    torch.manual_seed(0)
    theta = (torch.randn(count) * 0.02).to(dtype)
    done, unchanged, noise = 0.0, 0.0, Rademacher()
    for step in range(steps):
        before, z = theta.clone(), torch.zeros(count)
        seed = query_seed(0, step, 0)
        sweep([Item(z, z, 1, 0.0, (1.0,))], [seed], noise)
        sweep([Item(theta, theta, 1, 1.0, (c,))], [seed], noise, rounding=rounding_seed(0, step) if stochastic else None)
        moved = theta.double() - before.double()
        done += float((moved * z).mean()) / c
        unchanged += float((moved == 0).double().mean())
    return {"applied": round(done / steps, 4), "unchanged": round(unchanged / steps, 4)}


def nearest(residency: Residency) -> None:
    """Let a residency round its updates to nearest."""
    update = residency.update
    residency.update = lambda change: update(change._replace(rounding=None))  # type: ignore[method-assign]


def learn(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run of the demo's task in a plain loop, linear decay of lr; held-out accuracy in the dtype of the run."""
    dtype, weights, stochastic = RUNS[name]
    run = Docstrings(seed, options.batch, DTYPES[dtype])
    optimizer = ZOOptimizer(run.model, lr=options.lr, eps=options.eps, weights=weights, seed=seed, dropout=False, safeguard=None)
    if not stochastic:
        nearest(optimizer.residency)
    began = time.perf_counter()
    train(run, optimizer, options.steps)
    seconds = time.perf_counter() - began
    return {
        "run": name,
        "seed": seed,
        "accuracy": run.accuracy(),
        "seconds_per_step": round(seconds / options.steps, 3),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = {key: value for key, value in vars(options).items() if key != "json"}
    result: dict[str, Any] = {"environment": environment("cpu"), "options": chosen, "applied": {}, "learning": []}
    for dtype in ("bfloat16", "float16"):
        for how in ("stochastic", "nearest"):
            row = applied(DTYPES[dtype], how == "stochastic")
            result["applied"][f"{dtype} {how}"] = row
            print(f"{dtype:9} {how:10} {row}", flush=True)
    for seed in options.seeds if options.steps else ():
        for name in options.runs:
            result["learning"].append(learn(options, name, seed))
            print(result["learning"][-1], flush=True)
            write(options.json, result)
    for name in options.runs if result["learning"] else ():
        mean = statistics.fmean(row["accuracy"] for row in result["learning"] if row["run"] == name)
        result.setdefault("mean_accuracy", {})[name] = round(mean, 4)
        print(f"{name:28} mean accuracy {100 * mean:.2f} %", flush=True)
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
