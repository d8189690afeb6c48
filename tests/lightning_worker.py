"""Run by test_lightning_processes: trains each case with strategy "zo_ddp" on two gloo processes and saves what each ends with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_models import NAMES, Recorder, lightning, lit, loader, loss_of, net, state, trainer
from ranking_worker import smallest_first
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler
from torchmetrics.classification import MulticlassF1Score

from zo_lightning import ZODDPStrategy, ZOStrategy
from zo_lightning.callbacks import MetricObjective, RankingObjective
from zo_lightning.engine import Backprop

CASES: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 4},
    "other namespace": {"batch_size": 4, "name": NAMES[1]},
    "accumulated": {"batch_size": 2, "accumulate_grad_batches": 2},
    "buffers": {"batch_size": 4},
    "f1": {"batch_size": 1, "accumulate_grad_batches": 4},
    "ranked": {"batch_size": 2, "accumulate_grad_batches": 2},
    "hybrid": {"batch_size": 2, "accumulate_grad_batches": 2},
}


class Oracle:
    """Notes the shapes of what it is asked, and fails at a step if it is told to."""

    def __init__(self, fails: int | None = None) -> None:
        self.asked: list[list[tuple[int, ...]]] = []
        self.fails = fails

    def __call__(self, outputs: list[torch.Tensor]) -> list[int]:
        if len(self.asked) == self.fails:
            raise KeyError("who?")
        self.asked.append([tuple(output.shape) for output in outputs])
        return smallest_first(outputs)


def signs(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Whether the target is positive, as classes."""
    logits = model(batch[0])
    return {"preds": (logits[:, 0] > 0).long(), "target": (batch[1][:, 0] > 0).long()}


def make(case: str, rank: int) -> Any:
    """The module of a case; every rank begins with other weights."""
    pl_module = lit(CASES[case].get("name", NAMES[0]))

    class Module(pl_module):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if case == "ranked":
                return {"outputs": self.net(batch[0])}
            loss = super().training_step(batch, batch_idx)
            if case == "f1":
                return {**signs(self.net, batch), "loss": loss}
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net, batch), sync_dist=True)

    draw = torch.Generator().manual_seed(rank)
    model = net(torch.float64) if case == "buffers" else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3)
    return Module(model)


class InLightningsOrder(Sampler[int]):
    """The rows in the order in which two ranks take them from the sampler that Lightning puts in."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[int]:
        ranks = [DistributedSampler(range(64), 2, rank, shuffle=True, seed=0) for rank in range(2)]  # type: ignore[arg-type]
        for sampler in ranks:
            sampler.set_epoch(self.epoch)
        return (index for pair in zip(*ranks, strict=True) for index in pair)


def host_of(case: str, folder: Path, callbacks: list[Any], oracle: Oracle | None = None, **options: Any) -> Any:
    """The Trainer of a case."""
    given = {key: value for key, value in CASES[case].items() if key not in ("name", "batch_size")}
    if case in ("f1", "ranked"):
        objective = MetricObjective(MulticlassF1Score(2)) if case == "f1" else RankingObjective(oracle or Oracle(), samples=4, top=2)
        options["strategy"] = (ZODDPStrategy if "devices" in options else ZOStrategy)(eps=0.3, lr=0.1)
        callbacks = [objective, *callbacks]
    if case == "hybrid":
        options["strategy"] = (ZODDPStrategy if "devices" in options else ZOStrategy)(backprop=Backprop("2.*", lr=1e-2))
    return trainer(folder, CASES[case].get("name", NAMES[0]), callbacks=callbacks, num_sanity_val_steps=0, **given, **options)


def fit(case: str, folder: Path, rank: int = 0, path: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train a case for two epochs; what it ends with."""
    name, batch_size = CASES[case].get("name", NAMES[0]), CASES[case]["batch_size"] * (1 if "devices" in options else 2)
    module, recorder, ranks = make(case, rank), Recorder(), []
    wrapped: list[bool] = []
    oracle = Oracle()
    watch = lightning(name).callbacks.LambdaCallback(
        on_train_start=lambda host, module: wrapped.append(isinstance(host.strategy.model, DistributedDataParallel)),
        on_validation_end=lambda host, module: ranks.append(state(module)),
    )
    host = host_of(case, folder, [recorder, watch], oracle, max_epochs=2, **options)
    data = loader(batch_size, dtype=torch.float64, sampler=None if "devices" in options else InLightningsOrder())
    host.fit(module, data, loader(8, dtype=torch.float64), ckpt_path=path, weights_only=None if path is None else True)
    checkpoint = folder / f"{case}.ckpt"
    if path is None:
        host.save_checkpoint(checkpoint)
    return {
        "weights": state(module.net),
        "validated": ranks,
        "values": recorder.values,
        "wrapped": wrapped,
        "logged": {key: float(value) for key, value in host.callback_metrics.items()},
        "rank": host.global_rank,
        "asked": oracle.asked,
    }


def stopped(folder: Path, rank: int, **options: Any) -> dict[str, Any]:
    """What a run ends with whose oracle fails at its third question."""
    module, recorder = make("ranked", rank), Recorder()
    host = host_of("ranked", folder, [recorder], Oracle(fails=2), max_steps=4, **options)
    try:
        host.fit(module, loader(CASES["ranked"]["batch_size"], dtype=torch.float64))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "steps": len(recorder.reports), "weights": state(module.net)}
    return {"error": "none"}


def resume(case: str, folder: Path, rank: int, **options: Any) -> dict[str, Any]:
    """The same run, broken off after an odd number of batches, and resumed."""
    half = host_of(case, folder, [], max_steps=3, **options)
    half.fit(make(case, rank), loader(CASES[case]["batch_size"], dtype=torch.float64))
    half.save_checkpoint(folder / f"{case}.half.ckpt")
    rest = make(case, rank + 2)
    host = host_of(case, folder, [], max_steps=16, **options)
    host.fit(rest, loader(CASES[case]["batch_size"], dtype=torch.float64), ckpt_path=folder / f"{case}.half.ckpt", weights_only=True)
    return state(rest.net)


def main(folder: Path) -> None:
    """Lightning starts the second process itself, with the same command line."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    processes = {"strategy": "zo_ddp", "devices": 2}
    for case in CASES:
        result = fit(case, folder, rank, **processes)
        if case != "buffers":
            result["resumed"] = resume(case, folder, rank, **processes)
        torch.save(result, folder / f"{case}.{rank}.pt")
    torch.save(stopped(folder, rank, **processes), folder / f"stopped.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
