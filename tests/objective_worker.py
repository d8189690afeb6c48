"""Run by test_objective_processes: rankings and generated texts on one of two gloo processes; saves what each case ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import mlp, snapshot
from engine_worker import WORLD, rows_of
from hf_tools import llama, tokenizer
from torch import Tensor

from zo_lightning.engine import DataParallel, RankSGD, ZOOptimizer
from zo_lightning.engine.objectives import Generated, Ranking
from zo_lightning.engine.parallel import Exchange, broadcast_parameters

STEPS = 4
PROMPTS = 8


@dataclass(frozen=True)
class Case:
    """`spoil` is the step that the oracle answers wrongly once; `absent` the rank that has no batch in step 1."""

    micro_batches: int = 1
    spoil: int | None = None
    bad: Any = None
    absent: int | None = None


RANKED = {
    "ranked": Case(),
    "accumulated": Case(micro_batches=2),
    "an oracle that raises": Case(spoil=2, bad=KeyError("who?")),
    "no order": Case(spoil=2, bad=[0, 0, 1, 2]),
    "no batch on the second rank": Case(absent=1),
    "no batch on the first rank": Case(absent=0),
}


class Player(Exchange):
    """One process that draws as a rank would, on its own."""

    def __init__(self, rank: int) -> None:
        self.stream = rank


def best_first(outputs: Sequence[Any]) -> list[int]:
    """By the mean of outputs that are numbered by their place, so that another order of rows is another answer."""
    score = [float((output[:, 0] * torch.arange(1, len(output) + 1)).sum()) for output in outputs]
    return sorted(range(len(outputs)), key=lambda i: score[i])


class Oracle:
    """Notes what it is asked, and answers wrongly once."""

    def __init__(self, case: Case) -> None:
        self.case, self.asked = case, []  # type: ignore[var-annotated]

    def __call__(self, outputs: list[Tensor]) -> Any:
        self.asked.append(torch.stack(outputs))
        if self.case.spoil is not None and len(self.asked) == self.case.spoil + 1:
            if isinstance(self.case.bad, Exception):
                raise self.case.bad
            return self.case.bad
        return best_first(outputs)


def ranked(case: Case, parts: Callable[[int], list[Tensor]], seed: int = 10, exchange: Exchange | None = None) -> dict[str, Any]:
    """Train by rankings on the micro-batches that `parts` has for a step; one that failed is made again."""
    model, oracle, errors = mlp(seed=seed), Oracle(case), []
    if exchange is not None:
        broadcast_parameters(list(model.parameters()))
    optimizer = ZOOptimizer(model, lr=0.01, eps=0.1, estimator=RankSGD(4, 2), objective=Ranking(oracle))
    optimizer.exchange = exchange or optimizer.exchange
    values, kept = [], []
    while optimizer.steps < STEPS:
        before = snapshot(model)
        for x in parts(optimizer.steps):
            optimizer.estimate(lambda x=x: {"outputs": model(x)})  # type: ignore[misc]
        try:
            report = optimizer.apply()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            kept.append(all(torch.equal(before[name], value) for name, value in snapshot(model).items()))
            continue
        values.append(None if report is None else list(report.values))
    return {"weights": snapshot(model), "asked": oracle.asked, "values": values, "errors": errors, "kept": kept}


def on_rank(case: Case, rank: int) -> dict[str, Any]:
    def parts(step: int) -> list[Tensor]:
        if step == 1 and rank == case.absent:
            return []
        return [rows_of(rank, WORLD, i, case.micro_batches)[0] for i in range(case.micro_batches)]

    return ranked(case, parts, 10 + rank, DataParallel())


def alone(case: Case) -> dict[str, Any]:
    """One process with the rows of both ranks, those of the first rank first."""

    def whole(step: int) -> list[Tensor]:
        present = [rank for rank in range(WORLD) if step != 1 or rank != case.absent]
        return [torch.cat([rows_of(rank, WORLD, i, case.micro_batches)[0] for rank in present for i in range(case.micro_batches)])]

    return ranked(case, whole)


# ---- Generated texts


def prompts(rows: slice) -> dict[str, Tensor]:
    """Prompts of 2 to 5 tokens, padded on the left, and the number of each, by which it is known."""
    ids = [[0] * (3 - i % 4) + [4 + (5 * i + j) % 28 for j in range(2 + i % 4)] for i in range(PROMPTS)]
    mask = [[int(token > 0) for token in row] for row in ids]
    return {"input_ids": torch.tensor(ids)[rows], "attention_mask": torch.tensor(mask)[rows], "number": torch.arange(PROMPTS)[rows]}


def worth(prompts: list[str], completions: list[str], batch: Any) -> list[float]:
    """Whole numbers, whose sum does not depend on the order; those of a prompt depend on its number."""
    return [
        float(sum((1 + int(number)) * (i + 1) * int(word[1:]) for i, word in enumerate(text.split()) if word[1:].isdigit()))
        for text, number in zip(completions, batch["number"], strict=True)
    ]


class Written:
    """A metric of texts that notes them: how many of their letters there are."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, completions: list[str], references: list[Any]) -> float:
        self.seen.append(list(completions))
        return sum(int(word[1:]) * (i + 1) for text in completions for i, word in enumerate(text.split()) if word[1:].isdigit()) / 64


GENERATED: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 3.0}, "rewards": {}}


def generated(name: str, parts: list[slice], seed: int = 0, exchange: Exchange | None = None) -> dict[str, Any]:
    """Train by what is generated from the prompts of each part. Samples are drawn at points that are as good as equal."""
    model, written = llama(seed, torch.float64), Written()
    if exchange is not None and exchange.world_size > 1:
        broadcast_parameters(list(model.parameters()))
    what: dict[str, Any] = {"rewards": [worth]} if name == "rewards" else {"metric": written, "references": "input_ids"}
    objective = Generated(tokenizer=tokenizer(), generation_config=GENERATED[name], max_new_tokens=3, **what)
    still: dict[str, Any] = {"lr": 0.0, "eps": 1e-9} if name == "sampled" else {"lr": 1e-4, "eps": 0.05}
    optimizer = ZOOptimizer(model, objective=objective, safeguard=None, **still)
    values = []
    optimizer.exchange = exchange or Exchange()
    for _ in range(STEPS):
        for rows in parts:
            optimizer.estimate(dict, batch=prompts(rows))
        report = optimizer.apply()
        values.append(None if report is None else list(report.values))
    return {"weights": snapshot(model), "values": values, "seen": written.seen}


def rows_on(rank: int) -> list[slice]:
    """Two micro-batches of a rank."""
    return [slice((2 * i + rank) * 2, (2 * i + rank) * 2 + 2) for i in range(2)]


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {name: on_rank(case, rank) for name, case in RANKED.items()}
    results |= {name: generated(name, rows_on(rank), rank, DataParallel()) for name in GENERATED}
    results["same prompts"] = generated("sampled", [slice(0, 4)], rank, DataParallel())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
