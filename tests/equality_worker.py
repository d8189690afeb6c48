"""Run by test_equality: one of three gloo processes, whose weights are spoilt in the middle of a run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zo_lightning.engine import SPSA, Processes, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.parallel import Equality
from zo_lightning.engine.trajectory import Trajectory, replay

WORLD, STEPS, SPOILT = 3, 11, 5


def flipped(model: nn.Module, rank: int) -> None:
    """A bit of memory, another one on each rank, which no tensor knows of."""
    words = next(model.parameters()).detach().view(torch.uint8).numpy()
    words[rank, 3] ^= 8


def scaled(model: nn.Module, rank: int) -> None:
    """What a callback of a user may do on one rank."""
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)


@dataclass(frozen=True)
class Case:
    """Which ranks are spoilt and how; whether they are healed, with a log."""

    ranks: tuple[int, ...] = (1,)
    spoil: Callable[[nn.Module, int], None] = flipped
    heal: bool = True
    log: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    parallel: str | None = None


CASES = {
    "one of three": Case(),
    "no two alike": Case(ranks=(1, 2)),
    "all but the log's": Case(ranks=(0,), spoil=scaled),
    "16-bit vectors": Case(dtype=torch.bfloat16, options={"estimator": SPSA(2)}),
    "masked": Case(spoil=scaled, options={"mask": Mask("large_weights", 0.5, refresh=3)}),
    "in place": Case(options={"weights": "inplace"}),
    "seeds": Case(parallel="seeds=3"),
    "not healed": Case(heal=False),
    "no log": Case(log=False),
}


def train(case: Case, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(case.dtype)
    optimizer = ZOOptimizer(model, lr=0.02, eps=0.05, **case.options)
    exchange = optimizer.exchange = Processes(case.parallel)
    equality, log = Equality(every=4, heal=case.heal), Trajectory(folder)
    if case.log:
        log.begin(optimizer)
    said = ""
    try:
        for step in range(STEPS):
            if step == SPOILT and exchange.rank in case.ranks:
                case.spoil(model, exchange.rank)
            draw = torch.Generator().manual_seed(10 * step + exchange.stream)
            x, y = torch.randn(8, 10, generator=draw).to(case.dtype), torch.randn(8, 3, generator=draw).to(case.dtype)
            optimizer.step(lambda x=x, y=y: (model(x) - y).float().square().mean())
            equality.stepped(optimizer)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    again: dict[str, torch.Tensor] = {}
    if case.log:
        log.end(optimizer)
        log.close(optimizer)
        dist.barrier()  # the end of rank 0's file
        torch.manual_seed(0)
        other = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(case.dtype)
        replay(other, log.path, to_step=optimizer.steps)
        again = {name: value.clone() for name, value in other.state_dict().items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    masters = {name: value.clone() for name, value in optimizer.masters.state_dict().items()}
    return {"weights": weights, "masters": masters, "replayed": again, "said": said, "healed": equality.healed, "steps": optimizer.steps}


def main(folder: Path, rank: int) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {name: train(case, folder / name) for name, case in CASES.items()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
