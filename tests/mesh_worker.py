"""Run by test_mesh: trains each case on one of some gloo processes and saves what it ends with."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_models import regression
from torch import Tensor, nn
from torchmetrics.classification import BinaryF1Score

from zo_lightning.engine import (
    SPSA,
    SVRG,
    Conservative,
    Coordinatewise,
    ForwardGradient,
    LowRank,
    Momentum,
    OneSided,
    Processes,
    RankSGD,
    ZOOptimizer,
)
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.objectives import Score
from zo_lightning.engine.parallel import broadcast_parameters

STEPS = 5
ROWS = 16


@dataclass(frozen=True)
class Case:
    """A mesh, the options of the optimizer, and micro-batches a step."""

    parallel: str
    options: dict[str, Any] = field(default_factory=dict)
    micro: int = 1
    world: int = 2
    norm: bool = False
    dtype: torch.dtype = torch.float32
    metric: bool = False


BATCHED: dict[str, Any] = {"weights": "batched", "noise": LowRank(2, refresh=1)}
CASES = {
    "two sides": Case("perturbation=2"),
    "two sides, copied, bfloat16": Case("perturbation=2", {"weights": "copy"}, dtype=torch.bfloat16),
    "two sides, accumulated, dropout and normalization": Case("perturbation=2", micro=2, norm=True),
    "five queries on two": Case("perturbation=2", {"estimator": SPSA(5), "noise": "gaussian", "weight_decay": 0.1}),
    "ranks of values": Case("perturbation=2", {"estimator": SPSA(2, fitness="ranks")}),
    "line search": Case("perturbation=2", {"estimator": RankSGD(5, search=3)}),
    "one-sided on two": Case("perturbation=2", {"estimator": OneSided(4)}),
    "conservative on two": Case("perturbation=2", {"estimator": Conservative()}),
    "derivatives on two": Case("perturbation=2", {"estimator": ForwardGradient(3)}, micro=2),
    "SVRG on two": Case("perturbation=2", {"estimator": SVRG(refresh=3, anchor=1)}, micro=2),
    "SVRG on two, its anchor on one": Case("perturbation=2", {"estimator": SVRG(2, refresh=4, anchor=2), "weights": "copy"}),
    "coordinates on two": Case("perturbation=2", {"estimator": Coordinatewise()}, micro=2, norm=True),
    "coordinates of a mask on two": Case(
        "perturbation=2", {"estimator": Coordinatewise(central=True), "mask": Mask("random", 0.1, refresh=2), "weights": "inplace"}
    ),
    "momentum on two": Case("perturbation=2", {"update": Momentum(0.8, window=3)}),
    "adam on two, bfloat16": Case("perturbation=2", {"update": "adam"}, dtype=torch.bfloat16),
    "a metric": Case("perturbation=2", {"estimator": SPSA(2)}, metric=True),
    "two queries on four": Case("perturbation=4", {"estimator": SPSA(2)}, world=4),
    "data and sides": Case("data=2,perturbation=2", {"estimator": SPSA(3)}, world=4, micro=2),
    "data and sides, SVRG": Case("data=2,perturbation=2", {"estimator": SVRG(refresh=3, anchor=1)}, world=4, micro=2),
    "data and sides, a metric": Case("data=2,perturbation=2", {"estimator": SPSA(2)}, world=4, micro=2, metric=True),
    "data and coordinates": Case("data=2,perturbation=2", {"estimator": Coordinatewise()}, world=4),
    "data and points in one pass": Case("data=2,perturbation=2", {**BATCHED, "estimator": SPSA(4)}, world=4, micro=2),
    "points in one pass on two": Case("perturbation=2", {**BATCHED, "estimator": SPSA(4)}),
    "seeds": Case("seeds=4", world=4),
    "seeds of two queries, and sides": Case("seeds=2,perturbation=2", {"estimator": SPSA(2)}, world=4),
    "one-sided seeds": Case("seeds=4", {"estimator": OneSided(3)}, world=4),
    "derivatives of four seeds": Case("seeds=4", {"estimator": ForwardGradient(2)}, world=4),
    "SVRG of two seeds, and sides": Case("seeds=2,perturbation=2", {"estimator": SVRG(2, refresh=4, anchor=2)}, world=4),
    "sign of four seeds": Case("seeds=4", {"update": "sign"}, world=4),
    "seeds and data": Case("data=2,seeds=2", world=4),
}


def model_of(case: Case) -> nn.Sequential:
    torch.manual_seed(0)
    between: list[nn.Module] = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if case.norm else [nn.Identity()]
    return nn.Sequential(nn.Linear(10, 8), *between, nn.Tanh(), nn.Linear(8, 3)).to(case.dtype)


def part(stream: int, streams: int, micro: int, count: int) -> slice:
    """The rows of a stream of data in a micro-batch."""
    piece = ROWS // streams // count
    begin = (micro * streams + stream) * piece
    return slice(begin, begin + piece)


def answer(model: nn.Module, rows: slice, metric: bool) -> Any:
    x, y = regression(next(model.parameters()).dtype, rows=ROWS)
    out = model(x[rows])
    if metric:
        return {"preds": out[:, 0].double().sigmoid(), "target": (x[rows][:, 0] > 0.4).long()}
    return (out - y[rows]).float().square().mean()


def build(case: Case, model: nn.Module) -> ZOOptimizer:
    objective = Score(BinaryF1Score()) if case.metric else None
    return ZOOptimizer(model, lr=0.02, eps=0.2 if case.metric else 0.05, objective=objective, **case.options)


def run(case: Case, exchange: Processes | None) -> dict[str, Any]:
    """Train for STEPS steps."""
    model = model_of(case)
    optimizer = build(case, model)
    streams, stream = 1, 0
    if exchange is not None:
        optimizer.exchange = exchange
        streams, stream = exchange.mesh.streams, exchange.stream
    values, losses = [], []
    for _ in range(STEPS):
        for micro in range(case.micro):
            rows = part(stream, streams, micro, case.micro)
            objective = optimizer.objective
            taken = {} if objective is None else {"loss_of": objective.loss_of}
            estimate = optimizer.estimate(lambda rows=rows: answer(model, rows, case.metric), weight=1 / case.micro, **taken)
            losses.append(float(estimate.loss if estimate.loss is not None else 0.0))
        report = optimizer.apply()
        assert report is not None
        values.append(list(report.values))
    whole: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    counts = [optimizer.forward_passes, 0 if exchange is None else exchange.sent, 0 if exchange is None else exchange.meetings]
    return {"weights": whole, "values": values, "counts": counts, "losses": losses}


class Trouble:
    """What goes wrong on rank 1 (of 2), and what each rank says."""

    @staticmethod
    def raises_in_a_forward() -> None:
        optimizer = ready()
        for step in range(3):
            optimizer.step(lambda step=step: failing(optimizer.module, step == 1))

    @staticmethod
    def data_end_early() -> None:
        optimizer = ready()
        for _ in range(2 if dist.get_rank() else 3):
            optimizer.step(lambda: answer(optimizer.module, slice(0, 4), False))
        optimizer.exchange.leave()

    @staticmethod
    def other_eps() -> None:
        optimizer = ready(eps=0.1 if dist.get_rank() else 0.2)
        optimizer.step(lambda: answer(optimizer.module, slice(0, 4), False))

    @staticmethod
    def other_weights() -> None:
        optimizer = ready()
        if dist.get_rank():
            with torch.no_grad():
                optimizer.module[0].bias[1] += 1e-6
        optimizer.step(lambda: answer(optimizer.module, slice(0, 4), False))

    @staticmethod
    def in_place() -> None:
        optimizer = ready("perturbation=2", weights="inplace")
        optimizer.step(lambda: answer(optimizer.module, slice(0, 4), False))

    @staticmethod
    def broadcasts_another_dtype() -> None:
        model = model_of(Case("", dtype=torch.bfloat16 if dist.get_rank() else torch.float32))
        broadcast_parameters(list(model.parameters()))

    @staticmethod
    def broadcasts_fewer_tensors() -> None:
        broadcast_parameters(list(model_of(Case("")).parameters())[dist.get_rank() :])

    @staticmethod
    def window_of_another_rank() -> None:
        optimizer = ready()
        optimizer.estimate(lambda: answer(optimizer.module, slice(0, 4), False))
        state = optimizer.exchange.share(optimizer.state_dict())  # that of rank 0
        optimizer.load_state_dict(state)
        raise ValueError("rank 0 may")

    @staticmethod
    def goes_on_after_an_error() -> None:
        optimizer = ready()
        with contextlib.suppress(RuntimeError, ArithmeticError):
            optimizer.step(lambda: failing(optimizer.module, True))
        optimizer.step(lambda: answer(optimizer.module, slice(0, 4), False))
        raise ValueError(f"made {optimizer.steps} step")

    @staticmethod
    def dies() -> None:
        optimizer = ready()
        optimizer.step(lambda: answer(optimizer.module, slice(0, 4), False))
        if dist.get_rank():
            os._exit(0)
        optimizer.step(lambda: answer(optimizer.module, slice(0, 4), False))


def failing(model: Any, now: bool) -> Tensor:
    if now and dist.get_rank():
        raise ArithmeticError("what rank 1 says")
    return answer(model, slice(0, 4), False)


def ready(parallel: str = "data=2", **options: Any) -> Any:
    optimizer = ZOOptimizer(model_of(Case("")), lr=0.02, **{"eps": 0.05, **options})
    optimizer.exchange = Processes(parallel)
    return optimizer


TROUBLES = [name for name in vars(Trouble) if not name.startswith("_")]


def main(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results: dict[str, Any] = {name: run(case, Processes(case.parallel)) for name, case in CASES.items() if case.world == world}
    said: dict[str, str] = {}
    for name in TROUBLES if world == 2 else ():
        torch.save({**results, "said": said}, folder / f"{rank}.pt")  # in the last one a rank dies
        try:
            getattr(Trouble, name)()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    torch.save({**results, "said": said}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
