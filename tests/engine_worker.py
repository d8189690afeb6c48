"""Run by test_engine_processes: trains each case on one of two gloo processes and saves what it ends with."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import Closure, mean_square, mlp, regression, snapshot
from mask_tools import masks_of
from torch import Tensor, nn

from zo_lightning.engine import SPSA, DataParallel, RankSGD, ZOOptimizer
from zo_lightning.engine.masks import Mask, Sensitive
from zo_lightning.engine.parallel import broadcast_parameters

STEPS = 6
ROWS = 16
WORLD = 2


@dataclass(frozen=True)
class Case:
    """Options of the optimizer, micro-batches a step, and what a rank returns instead of a loss at (step, rank)."""

    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    spoil: Callable[[Tensor], object] | None = None
    at: tuple[int, int] = (2, 1)
    absent: bool = False
    dropout: float = 0.0
    mask: Callable[[nn.Module, int], Mask] | None = None
    """Of a model, on a rank."""


def by_gradients(model: Any, rank: int) -> Mask:
    """Of losses on other rows on each rank, so that each would choose other weights."""
    x, y = regression(rows=ROWS)
    rows = slice(rank * 3, rank * 3 + 3)
    return Mask(Sensitive(lambda: [(model[3](torch.tanh(model[0](x[rows]))) - y[rows]).square().mean()]), 0.2, refresh=3)


CASES = {
    "exact": Case({"weights": "exact"}),
    "copy": Case({"weights": "copy"}),
    "inplace": Case({"weights": "inplace"}),
    "queries, decay and Gaussian noise": Case({"estimator": SPSA(3), "weight_decay": 0.1, "noise": "gaussian"}),
    "accumulated": Case(micro_batches=4),
    "not finite on one rank": Case(spoil=lambda loss: loss * math.nan),
    "infinite on one rank": Case(spoil=lambda loss: loss + math.inf),
    "skipped on one rank": Case(spoil=lambda loss: None),
    "skipped on both ranks": Case(spoil=lambda loss: None, at=(2, -1)),
    "no batch on one rank": Case(absent=True),
    "dropout": Case(dropout=0.5),
    "line search": Case({"estimator": RankSGD(4, search=3), "eps": 0.3}, micro_batches=2, dropout=0.0),
    "line search, no batch on one rank": Case({"estimator": RankSGD(4, search=3), "eps": 0.3}, absent=True),
    "measured": Case(mask=lambda model, rank: Mask(Sensitive(steps=2), 0.2, refresh=4)),
    "gradients of each rank": Case(mask=by_gradients),
}


def rows_of(rank: int, world: int, micro_batch: int, count: int) -> tuple[Tensor, Tensor]:
    """The part of the batch that a rank sees in a micro-batch."""
    x, y = regression(rows=ROWS)
    piece = ROWS // world // count
    begin = (micro_batch * world + rank) * piece
    return x[begin : begin + piece], y[begin : begin + piece]


def run(case: Case, rank: int, world: int) -> dict[str, Any]:
    """Train for STEPS steps: the weights at the end, the values of every step, and the dropout masks of its first evaluation."""
    model = mlp(seed=10 + rank, dropout=case.dropout)
    if world > 1:
        broadcast_parameters(list(model.parameters()))
    optimizer = ZOOptimizer(model, lr=0.1, mask=None if case.mask is None else case.mask(model, rank), **case.options)
    if world > 1:
        optimizer.exchange = DataParallel()
    started, values, masks, chosen_masks = snapshot(model), [], [], []
    model[2].register_forward_hook(lambda module, args, output: masks.append(output != 0))
    for step in range(STEPS):
        for micro_batch in range(case.micro_batches):
            loss = mean_square(model, rows_of(rank, world, micro_batch, case.micro_batches))
            chosen = step == case.at[0] and case.at[1] in (rank, -1)
            if case.absent and chosen:
                continue
            wrong = case.spoil is not None and chosen
            optimizer.estimate(spoilt(loss, case.spoil) if wrong else loss, weight=1 / case.micro_batches)
        report = optimizer.apply()
        chosen_masks.append(masks_of(optimizer))
        values.append(None if report is None else list(report.values))
    return {
        "start": started,
        "weights": snapshot(model),
        "values": values,
        "masks": torch.stack(masks[:2]),
        "chosen": chosen_masks,
        "counts": [optimizer.steps, optimizer.skipped_steps],
    }


def spoilt(loss: Closure, change: Callable[[Tensor], object] | None) -> Closure:
    return lambda: change(loss())  # type: ignore[misc,return-value]


def layouts(rank: int) -> list[Tensor]:
    """Weights of several dtypes and layouts, other ones on each rank, after the broadcast."""
    draw = torch.Generator().manual_seed(rank)
    tensors = [
        nn.Parameter(torch.randn(4, 6, generator=draw).t()),
        nn.Parameter(torch.randn(2, 3, 4, 4, generator=draw).contiguous(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn((), generator=draw).to(torch.bfloat16)),
        nn.Parameter(torch.randn(0, 3, generator=draw)),
        torch.randint(100, (3,), generator=draw),
    ]
    before = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
    broadcast_parameters(tensors)
    if before != [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]:
        raise RuntimeError("a broadcast replaced memory")
    return [tensor.detach() for tensor in tensors]


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {name: run(case, rank, WORLD) for name, case in CASES.items()}
    results["layouts"] = layouts(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
