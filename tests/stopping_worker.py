"""Run by test_stopping: what happens to two Lightning processes when one of them raises, or is resumed from within a window."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning_models import lightning, lit, loader, state, trainer
from torch import nn

from zo_lightning import ZODDPStrategy


class Raising(lightning().Callback):  # type: ignore[misc]
    """Raises on one rank, outside of every step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 2 and trainer.global_rank == self.rank:
            raise ArithmeticError(f"what rank {self.rank} says")


class Saving(lightning().Callback):  # type: ignore[misc]
    """Writes a checkpoint behind the second micro-batch of a window of three."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 4:
            trainer.save_checkpoint(self.path)


def strategy(parallel: str) -> Any:
    return ZODDPStrategy(lr=1e-2, parallel=parallel, process_group_backend="gloo")


def fit(folder: Path, parallel: str, callbacks: list[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    module = lit()(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    given = {"strategy": strategy(parallel), "devices": 2, "max_epochs": 1, "accumulate_grad_batches": 3, "callbacks": callbacks}
    host = trainer(folder, **given)
    host.fit(module, loader(4, dtype=torch.float64), **options)
    return host.global_rank, state(module.net)


def main(folder: Path, what: str) -> None:
    if what.startswith("raises"):
        fit(folder, "data=2", [Raising(int(what[-1]))])
        return
    path = folder / f"{what}.ckpt"
    rank, whole = fit(folder, what, [Saving(path)])
    _, rest = fit(folder, what, [], ckpt_path=path)
    torch.save([whole, rest], folder / f"{what}.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
