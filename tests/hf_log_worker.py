"""Run by test_trajectory_processes: a ZOTrainer with a step log on one of two gloo processes, begun, cut off, or begun again."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch
from hf_tools import bert, texts, trainer, weights
from scissors import CutError, Scissors

from zo_lightning.callbacks import TrajectoryLog


def main(folder: Path, kind: str, save: int, cut: int, seed: int) -> None:
    rank = int(os.environ["RANK"])
    warnings.simplefilter("ignore")
    given = {"save_strategy": "steps", "save_steps": save} if save else {}
    host = trainer(
        folder,
        bert(seed + rank, dropout=0.2),  # other weights on each rank and at each start
        data=texts(),
        callbacks=[TrajectoryLog(), Scissors(cut)],
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="random",
        lr_scheduler_type="linear",
        max_steps=12,
        zo_weights=kind,
        zo_eps=1e-2,
        **given,
    )
    with contextlib.suppress(CutError):  # a rank that was cut off leaves nothing
        host.train()
        zo = host.zo_optimizer.state_dict()["zo"]
        result = {"weights": weights(host.model), "steps": zo["steps"], "passes": zo["forward_passes"], "rank": host.args.process_index}
        torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
