"""Run by test_hybrid_processes: trains each case on one of two gloo processes and saves what it ends with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import mean_square, mlp, regression, snapshot
from torch import nn

from zo_lightning.engine import SPSA, Backprop, OneSided, Processes, ZOOptimizer
from zo_lightning.engine.parallel import Equality, broadcast_parameters

STEPS, ROWS, WORLD = 5, 16, 2
CASES: dict[str, dict[str, Any]] = {
    "data": {},
    "data, one-sided": {"estimator": OneSided(2)},
    "data, accumulated": {"micro_batches": 4},
    "data, no batch on one rank": {"absent": True},
    "data, bfloat16": {"dtype": torch.bfloat16},
    "perturbation": {"parallel": "perturbation=2", "estimator": SPSA(2)},
    "perturbation, one-sided": {"parallel": "perturbation=2", "estimator": OneSided(3)},
    "seeds": {"parallel": "seeds=2"},
    "seeds, one-sided": {"parallel": "seeds=2", "estimator": OneSided(2)},
}


def run(name: str, rank: int, world: int, steps: int = STEPS) -> dict[str, Any]:
    """The weights after the steps of a case, and its bytes."""
    case = CASES[name]
    dtype, parallel, pieces = case.get("dtype", torch.float64), case.get("parallel"), case.get("micro_batches", 1)
    model = mlp(seed=10 + rank, dtype=dtype)
    if world > 1:
        broadcast_parameters(list(model.parameters()))
    rule = Backprop("3.*", lr=1e-2) if steps == STEPS else Backprop("3.*", lr=1.0, optimizer="SGD")
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, estimator=case.get("estimator"), backprop=rule)
    if world > 1:
        optimizer.exchange = Processes(parallel)
    x, y = regression(dtype, ROWS)
    shared = parallel is not None and parallel.startswith("perturbation")
    size = ROWS // (1 if shared else world) // pieces
    equality = Equality(every=2)
    for step in range(steps):
        for piece in range(pieces):
            begin = piece * size if shared else (piece * world + rank) * size
            rows = slice(begin, begin + size)
            if case.get("absent") and step == 2 and rank == 1:
                continue
            optimizer.estimate(
                lambda rows=rows: (model(x[rows]) - y[rows]).to(torch.promote_types(dtype, torch.float32)).square().mean(),
                weight=1 / pieces,
            )
        optimizer.apply()
        equality.stepped(optimizer)
    tail = [tensor.detach().clone() for tensor in optimizer.tail.tensors()]
    return {"weights": snapshot(model), "tail": tail, "sent": getattr(optimizer.exchange, "sent", 0)}


def disagreeing(rank: int) -> str:
    """What ranks with other options are told."""
    model = mlp(seed=10)
    optimizer = ZOOptimizer(model, lr=1e-3, backprop=Backprop("3.*", lr=1e-2 * (1 + rank)))
    optimizer.exchange = Processes()
    try:
        optimizer.step(mean_square(model, regression()))
    except ValueError as error:
        return str(error)
    return "nothing"


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {name: {**run(name, rank, WORLD), "first": run(name, rank, WORLD, steps=1)} for name in CASES}
    results["disagreeing"] = disagreeing(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def tail_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for name, parameter in model.named_parameters() if name.startswith("3.")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
