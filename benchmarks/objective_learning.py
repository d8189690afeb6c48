"""What a model learns from a metric alone beside the loss, with equal forward passes: accuracy, macro F1, their mix with the loss.

python benchmarks/objective_learning.py --seeds 0 1 2 --jobs 2 --json benchmarks/results/objective_learning.json    the table
python benchmarks/objective_learning.py --only accuracy --batch 128 --steps 200 --points 8e-3:6e-2 --json FILE.json  another setting
python benchmarks/objective_learning.py --only loss accuracy --steps 3 --every 3 --points 3e-3:3e-2                 seconds

MiniLM on docstring topics, no dropout, lr decaying linearly to 0; all objectives get the same batches in the same order, and two forward
passes a step and query. Trained are the layer norms (--train norms), biases and norms (vectors), or all weights (all). The first seed tries
every lr:eps of --points, or of the objective's own; the other seeds take the pair that was best there, by the held-out value of what is
trained (accuracy where that is the loss). A run that falls below half of what it began with is given up. Runs that the JSON file has are
kept and not made again, so that settings, grids and seeds can be added.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from grid import Grid, follow
from learning import Docstrings, answers
from mask_learning import vectors
from measure import environment
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.functional.classification import multiclass_f1_score

from zo_lightning import ZOOptimizer
from zo_lightning.engine import SPSA
from zo_lightning.engine.estimators import FITNESS
from zo_lightning.engine.masks import Mask, Where
from zo_lightning.engine.objectives import Objective, Ramp, Score

TOPICS, GIVEN_UP = 7, 0.5
PIECE = 32
"""Texts of a forward pass; a larger batch is passed in pieces of like length, which saves a quarter of the time: less is padded."""


def accuracy(**weights: Any) -> Score:
    """The share of the batch whose topic is found."""
    return Score(MulticlassAccuracy(num_classes=TOPICS, average="micro"), **weights)


def macro_f1(**weights: Any) -> Score:
    """The mean over topics of F1 in the batch."""
    return Score(MulticlassF1Score(num_classes=TOPICS, average="macro"), **weights)


OBJECTIVES: dict[str, Callable[[int], Objective | None]] = {
    "loss": lambda steps: None,
    "accuracy": lambda steps: accuracy(),
    "macro F1": lambda steps: macro_f1(),
    "loss + accuracy": lambda steps: accuracy(loss_weight=1.0),
    "loss, then accuracy": lambda steps: accuracy(loss_weight=Ramp(1.0, 0.0, steps=steps), weight=Ramp(0.0, 1.0, steps=steps)),
}
MASKS: dict[str, Mask | None] = {
    "norms": Mask(Where(lambda name, tensor: "LayerNorm" in name)),
    "vectors": Mask(Where(vectors)),
    "all": None,
}
POINTS: dict[str, tuple[tuple[float, float], ...]] = {
    "loss": ((4e-3, 6e-2),),
    "accuracy": ((6e-3, 6e-2),),
    "macro F1": ((6e-3, 6e-2),),
    "loss + accuracy": ((4e-3, 6e-2),),
    "loss, then accuracy": ((4e-3, 6e-2),),
}
"""(lr, eps) of biases and norms."""


SETTING = ("objective", "train", "batch", "steps", "every", "queries", "fitness")
"""Runs that differ in one of these are not compared."""


class Job(NamedTuple):
    """One run."""

    objective: str
    lr: float
    eps: float
    seed: int
    steps: int
    every: int
    batch: int
    train: str
    queries: int
    fitness: str


def pair(text: str) -> tuple[float, float]:
    """An argparse type: lr:eps."""
    lr, eps = text.split(":")
    return float(lr), float(eps)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(OBJECTIVES), default=list(OBJECTIVES)[:4])
    parser.add_argument("--points", type=pair, nargs="+", default=None, metavar="LR:EPS", help="instead of each objective's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one chooses lr and eps")
    parser.add_argument("--train", choices=tuple(MASKS), default="vectors", help="norms alone, biases and norms, or all weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--queries", type=int, default=1, help="pairs of points a step, all on one batch")
    parser.add_argument("--fitness", choices=tuple(FITNESS), default="values", help="what an estimate takes of a step's values")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def passed(model: Any, batch: Any) -> dict[str, Any]:
    """What the closure returns for a batch of up to `PIECE` texts, or for all pieces of a larger one: loss, predictions and targets."""
    labels = batch["labels"]
    if len(labels) <= PIECE:
        out = model(**batch)
        return {"loss": out["loss"], "preds": out["logits"], "target": labels}
    lengths = batch["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    logits = [
        model(**{name: batch[name][rows, : int(lengths[rows].max())] for name in ("input_ids", "attention_mask")})["logits"]
        for rows in order.split(PIECE)
    ]
    found, labels = torch.cat(logits), labels[order]
    return {"loss": F.cross_entropy(found, labels), "preds": found, "target": labels}


def learn(job: Job) -> dict[str, Any]:
    """One run: held-out accuracy and macro F1 on its way, and how often both sides had the same value."""
    task = Docstrings(job.seed, job.batch)
    optimizer = ZOOptimizer(
        task.model,
        lr=job.lr,
        eps=job.eps,
        mask=MASKS[job.train],
        seed=job.seed,
        dropout=False,
        safeguard=None,
        estimator=SPSA(job.queries, job.fitness),
        objective=OBJECTIVES[job.objective](job.steps),
    )
    equal: list[bool] = []
    sides: list[float] = []

    def output(batch: Any) -> Any:
        found = passed(task.model, batch)
        return found["loss"] if job.objective == "loss" else found

    def measure() -> dict[str, float]:
        task.model.eval()
        found, topics = answers(task.model, task.collate, task.task.held_out)
        task.model.train()
        f1 = multiclass_f1_score(found, topics, num_classes=TOPICS, average="macro")
        return {"accuracy": round(float((found == topics).float().mean()), 4), "macro_f1": round(float(f1), 4)}

    def after(step: int) -> None:
        report: Any = optimizer.report
        equal.append(report.zero_difference)
        sides.append(abs(report.loss_plus - report.loss_minus))

    def lost(start: dict[str, float], now: dict[str, float]) -> bool:
        return now["accuracy"] < GIVEN_UP * start["accuracy"]

    run = follow(task, optimizer, job.steps, job.every, measure, lost, after, output)
    result = {**job._asdict(), "start": run.start, "curve": run.curve, "end": run.curve[-1] if run.ended else None}
    result |= {"equal_values": round(statistics.fmean(equal), 4), "mean_difference": statistics.fmean(sides)}
    return {**result, "forward_passes": optimizer.forward_passes, "seconds_per_step": run.seconds_per_step}


def aim(objective: str) -> str:
    """The held-out value by which lr and eps of an objective are chosen."""
    return "macro_f1" if objective == "macro F1" else "accuracy"


def best(runs: list[dict[str, Any]], seed: int) -> tuple[float, float] | None:
    """(lr, eps) with which this seed of one objective ended best; None without such a run."""
    ended = [run for run in runs if run["seed"] == seed and run["end"] is not None]
    if not ended:
        return None
    found = max(ended, key=lambda run: float(run["end"][aim(run["objective"])]))
    return found["lr"], found["eps"]


def summary(runs: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """For each objective and setting the lr and eps that were best with `seed`, and over the seeds what was learned with them."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        settings.setdefault(tuple(run[name] for name in SETTING), []).append(run)
    rows = []
    for setting, own in settings.items():
        row: dict[str, Any] = dict(zip(SETTING, setting, strict=True))
        tried = sorted({(run["lr"], run["eps"]) for run in own})
        chosen = best(own, seed)
        made = sorted((run for run in own if (run["lr"], run["eps"]) == chosen), key=lambda run: int(run["seed"]))
        ended = [run for run in made if run["end"] is not None]
        row |= {"tried": tried, "lost": len(made) - len(ended), "seeds": [run["seed"] for run in ended]}
        if chosen is not None:
            row |= {"lr": chosen[0], "eps": chosen[1]}
            row |= {"equal_values": statistics.fmean(run["equal_values"] for run in ended)}
            row |= {"mean_difference": statistics.fmean(run["mean_difference"] for run in ended)}
            row |= {"seconds_per_step": statistics.median(run["seconds_per_step"] for run in ended)}
            for name in ("accuracy", "macro_f1"):
                gains = [run["end"][name] - run["start"][name] for run in ended]
                row[name] = {
                    "start": statistics.fmean(run["start"][name] for run in ended),
                    "end": statistics.fmean(run["end"][name] for run in ended),
                    "of_seeds": [run["end"][name] for run in ended],
                    "gain": statistics.fmean(gains),
                    "least_gain": min(gains),
                }
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    head = f"{row['objective']:20} {row['train']:7} {row['steps']:4} x {row['queries']} x {row['batch']} {row['fitness']}"
    if "accuracy" not in row:
        return f"{head}  given up with every lr and eps"
    found = {name: row[name] for name in ("accuracy", "macro_f1")}
    values = "  ".join(
        f"{name} {value['start']:6.1%} -> {value['end']:6.1%} ({100 * value['gain']:+.1f}, least {100 * value['least_gain']:+.1f})"
        for name, value in found.items()
    )
    tail = f"equal values in {row['equal_values']:.0%}  {len(row['seeds'])} seeds, {row['lost']} given up"
    return f"{head}  lr {row['lr']:.0e} eps {row['eps']:.0e}  {values}  {tail}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, and write JSON."""
    options = parse(arguments)
    chosen = {key: value for key, value in vars(options).items() if key != "json"} | ({} if options.points else {"own_points": POINTS})
    first = options.seeds[0]

    def job(objective: str, point: tuple[float, float], seed: int) -> Job:
        return Job(objective, *point, seed, options.steps, options.every, options.batch, options.train, options.queries, options.fitness)

    def of(objective: str) -> list[dict[str, Any]]:
        same = {**job(objective, (0, 0), 0)._asdict()}
        return [run for run in grid.runs if all(run[key] == same[key] for key in same.keys() - {"lr", "eps", "seed"})]

    result = {"environment": {**environment("cpu"), "torchmetrics": version("torchmetrics")}, "options": chosen}
    with Grid(learn, lambda runs: summary(runs, first), options.json, result, options.jobs, options.threads) as grid:
        grid.make([job(name, point, first) for name in options.only for point in options.points or POINTS[name]])
        points = {name: best(of(name), first) for name in options.only}
        grid.make([job(name, point, seed) for seed in options.seeds[1:] for name, point in points.items() if point is not None])
    for row in grid.result["summary"]:
        print(line(row))
    return grid.result


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
