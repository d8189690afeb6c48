"""What sparse masks learn beside dense MeZO: the demo's task, every rule with its best learning rate of one stated grid.

python benchmarks/mask_learning.py --json benchmarks/results/mask_learning_screen.json                      every rule, one seed
python benchmarks/mask_learning.py --rules dense vectors --best SCREEN.json --seeds 0 1 2 --json FILE.json   with the lr that was best there
python benchmarks/mask_learning.py --rules dense --factors 1 --steps 20 --every 10                           seconds

MiniLM on docstring topics, batch 64, eps 1e-2, lr decaying linearly to 0. The grid is lr = 2e-4 f / sqrt(share of the weights that is
trained) for f in --factors; dense has share 1. Held-out accuracy is looked at every --every steps. A run whose accuracy falls below 30 % is
given up. Runs that the JSON file has are kept and not made again, so that grids can be widened.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grid import Grid, follow
from learning import Docstrings
from measure import environment
from torch import Tensor

from zo_lightning import ZOOptimizer
from zo_lightning.engine.masks import Blockwise, HalfLayers, LayerSampling, Mask, NofM, PrincipalWeights, Sensitive, Structured, Where
from zo_lightning.engine.masks.report import shares

LR, GIVEN_UP = 2e-4, 0.3
Losses = Callable[[], Iterator[Tensor]]


def vectors(name: str, tensor: Tensor) -> bool:
    """Biases and norms."""
    return tensor.dim() < 2


MASKS: dict[str, Callable[[Losses], Mask | None]] = {
    "dense": lambda losses: None,
    "small_weights 25 %": lambda losses: Mask("small_weights", 0.25),
    "small_weights 50 %": lambda losses: Mask("small_weights", 0.5),
    "large_weights 25 %": lambda losses: Mask("large_weights", 0.25),
    "random 25 %": lambda losses: Mask("random", 0.25),
    "random 0.1 %": lambda losses: Mask("random", 0.001),
    "n_of_m 1:4": lambda losses: Mask(NofM(1, 4)),
    "sensitive 0.1 %, backward": lambda losses: Mask(Sensitive(losses), 0.001),
    "sensitive 5 %, backward": lambda losses: Mask(Sensitive(losses), 0.05),
    "sensitive 0.1 %, 60 forward steps": lambda losses: Mask(Sensitive(steps=60), 0.001),
    "principal_weights 5 %, rank 32": lambda losses: Mask(PrincipalWeights(32, vectors="rest"), 0.05),
    "half_layers, refresh 50": lambda losses: Mask(HalfLayers(), refresh=50),
    "layer_sampling 2 of 6, refresh 50": lambda losses: Mask(LayerSampling(2), refresh=50),
    "blockwise, refresh 10": lambda losses: Mask(Blockwise(), refresh=10),
    "structured 25 %, columns of heads": lambda losses: Mask(Structured("columns", 32), 0.25, exclude="*token_type*"),
    "vectors": lambda losses: Mask(Where(vectors)),
}


class Job(NamedTuple):
    """One run."""

    rule: str
    factor: float
    seed: int
    steps: int
    every: int


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rules", nargs="+", choices=tuple(MASKS), default=list(MASKS))
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--best", type=Path, default=None, help="JSON of an earlier screening, whose best factor each rule gets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def learn(job: Job) -> dict[str, Any]:
    """One run: the accuracies on its way."""
    run = Docstrings(job.seed, 64)
    few = [run.collate([run.task.train[row] for row in range(first, first + 64)]) for first in range(0, 4 * 64, 64)]
    mask = MASKS[job.rule](lambda: (run.loss(batch) for batch in few))
    optimizer = ZOOptimizer(run.model, lr=LR, eps=1e-2, mask=mask, seed=job.seed, dropout=False, safeguard=None)
    share = _share(optimizer)
    optimizer.param_groups[0]["lr"] = lr = LR * job.factor / math.sqrt(share)
    way = follow(run, optimizer, job.steps, job.every, measure=lambda: round(run.accuracy(), 4), lost=lambda start, now: now < GIVEN_UP)
    return {**job._asdict(), "lr": lr, "share": share, "curve": way.curve, "accuracy": way.curve[-1] if way.ended else None}


def _share(optimizer: ZOOptimizer) -> float:
    """The share of the weights that the first mask trains; of a mask that is measured first, its density."""
    mask, trained = optimizer.masks.mask, optimizer.residency.trained
    if mask is None or mask.rule.measures:
        return 1.0 if mask is None else float(mask.density)  # type: ignore[arg-type]
    optimizer.masks.begin(0, trained, optimizer.seed, optimizer.noise)
    found = shares(optimizer.masks, trained)
    return sum(share.trained for share in found) / sum(share.numel for share in found)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each rule its best factor; over the seeds, final accuracy and the steps to dense's final accuracy."""
    target = max((_final(runs, "dense", factor) for factor in {run["factor"] for run in runs if run["rule"] == "dense"}), default=math.nan)
    rows = []
    for rule in dict.fromkeys(run["rule"] for run in runs):
        own = [run for run in runs if run["rule"] == rule]
        factor = max({run["factor"] for run in own}, key=lambda factor: _final(runs, rule, factor))
        best = [run for run in own if run["factor"] == factor and run["accuracy"] is not None]
        if best:
            mean = [statistics.fmean(values) for values in zip(*(run["curve"] for run in best), strict=True)]
            reached = next((best[0]["every"] * (i + 1) for i, value in enumerate(mean) if value >= target), None)
            final = [run["accuracy"] for run in best]
            row = {"rule": rule, "share": best[0]["share"], "factor": factor, "lr": best[0]["lr"], "seeds": len(best)}
            rows.append({**row, "accuracy": statistics.fmean(final), "of_seeds": final, "best": max(mean), "steps_to_dense": reached})
    return sorted(rows, key=lambda row: -row["accuracy"])


def _final(runs: list[dict[str, Any]], rule: str, factor: float) -> float:
    own = [run["accuracy"] for run in runs if run["rule"] == rule and run["factor"] == factor]
    return 0.0 if None in own or not own else statistics.fmean(own)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, and write JSON."""
    options = parse(arguments)
    factors = dict.fromkeys(options.rules, options.factors)
    if options.best is not None:
        factors.update({row["rule"]: [row["factor"]] for row in json.loads(options.best.read_text())["summary"] if row["rule"] in factors})
    jobs = [Job(rule, f, seed, options.steps, options.every) for seed in options.seeds for rule in options.rules for f in factors[rule]]
    chosen = {key: value for key, value in vars(options).items() if key not in ("json", "best")}
    with Grid(learn, summary, options.json, {"environment": environment("cpu"), "options": chosen}, options.jobs) as grid:
        grid.make(jobs)
    for row in grid.result["summary"]:
        to = "-" if row["steps_to_dense"] is None else row["steps_to_dense"]
        print(f"{row['rule']:36} {row['share']:8.3%}  lr {row['lr']:.1e}  {row['accuracy']:6.1%}  steps to dense's accuracy: {to}")
    return grid.result


if __name__ == "__main__":
    main()
