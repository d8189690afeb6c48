"""Run by test_sharded_hosts: trains with ZOModelParallelStrategy on two gloo processes and saves what each ends with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning_models import Recorder, lightning, trainer
from shard_worker import WORDS, Case, build, full
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning import ZOModelParallelStrategy, ZOStrategy
from zo_lightning.callbacks import TrajectoryLog
from zo_lightning.engine.shards import is_sharded

STEPS, HALF = 8, 5
Module = lightning("lightning.pytorch").LightningModule


class Lit(Module):  # type: ignore[misc,valid-type]
    """A model that shards itself where there is a mesh."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.net: Any = build(Case())
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded and not is_sharded(self.net.head.weight):
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, index: int) -> Any:
        ids, target = batch
        return (self.net(ids) - target).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.training_step(batch, index), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}]


def rows() -> DataLoader[Any]:
    """The same ones in the same order on all ranks."""
    draw = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randint(WORDS, (16, 5), generator=draw), torch.randn(16, 5, generator=draw)), 4)


def fit(folder: Path, steps: int, sharded: bool, path: Path | None = None, callbacks: tuple[Any, ...] = (), **options: Any) -> Any:
    """(Trainer, what it ended with)."""
    module, recorder = Lit(sharded), Recorder()
    if sharded:
        strategy: Any = ZOModelParallelStrategy(eps=1e-2, data_parallel_size=2, tensor_parallel_size=1, **options)
    else:
        strategy = ZOStrategy(eps=1e-2)
    more = {"strategy": strategy, "max_steps": steps, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    host = trainer(folder, callbacks=[recorder, *callbacks], devices=2 if sharded else 1, **more)
    host.fit(module, rows(), rows(), ckpt_path=path, weights_only=None if path is None else True)
    weights = {name: full(p) for name, p in module.state_dict().items()}
    moments = sum(len(state) for state in module.optimizers().optimizer.state.values())
    return host, {
        "weights": weights,
        "values": recorder.values,
        "val_loss": float(host.callback_metrics["val_loss"]),
        "moments": moments,
        "sharded": sum(map(is_sharded, module.parameters())),
    }


def main(folder: Path) -> None:
    """Lightning starts the second process itself, with the same command line."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    _, results = fit(folder, STEPS, True, callbacks=(TrajectoryLog(folder / "log"),))
    for name, distributed in (("shards", True), ("one file", False)):
        half, _ = fit(folder, HALF, True, save_distributed_checkpoint=distributed)
        path = folder / f"{name}.ckpt"
        half.save_checkpoint(path)
        half.strategy.barrier()
        _, rest = fit(folder, STEPS, True, path, save_distributed_checkpoint=distributed)
        results[name] = rest
        results[f"{name} is a folder"] = path.is_dir()
    fit(folder, HALF, True, callbacks=(TrajectoryLog(folder / "cut"), Cut(HALF)))
    _, results["continued"] = fit(folder, STEPS, True, callbacks=(TrajectoryLog(folder / "cut"),))
    torch.save(results, folder / f"{rank}.pt")


class Cut(lightning("lightning.pytorch").Callback):  # type: ignore[misc]
    """The log of a run that was cut off has no end: it is taken away behind the last step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.strategy.zo_optimizer.journal.end = lambda optimizer: None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
