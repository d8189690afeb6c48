"""Run by test_trajectory_processes: "zo_ddp" with a step log on two gloo processes, begun, cut off by an exception, or begun again."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning_models import lightning, lit, loader, loss_of, net, state, trainer
from scissors import CutError, Scissors

from zo_lightning.callbacks import TrajectoryLog
from zo_lightning.strategy import ZODDPStrategy


class Module(lit()):  # type: ignore[misc]
    """Other weights on each rank and at each start."""

    def validation_step(self, batch: object, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch), sync_dist=True)  # type: ignore[arg-type]


def main(folder: Path, weights: str, save: int, cut: int, seed: int) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    warnings.simplefilter("ignore")
    model = net()
    draw = torch.Generator().manual_seed(seed + rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    module = Module(model)
    callbacks = [TrajectoryLog(), Scissors(cut)]
    if save:
        callbacks.append(lightning().callbacks.ModelCheckpoint(every_n_train_steps=save, save_top_k=-1))
    host = trainer(
        folder, strategy=ZODDPStrategy(weights=weights), devices=2, max_epochs=3, callbacks=callbacks, enable_checkpointing=bool(save)
    )
    try:
        host.fit(module, loader(shuffle=True), loader(16))
    except CutError:
        return
    zo = host.strategy.zo_optimizer.state_dict()["zo"]
    torch.save({"weights": state(module), "steps": zo["steps"], "passes": zo["forward_passes"]}, folder / f"{host.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
