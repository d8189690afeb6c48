"""One of two gloo processes of test_hf_processes: trains each case and saves what it ends with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from hf_tools import bert, llama, losses, per_token, texts, tokens, trainer
from scissors import Scissors
from torchmetrics.classification import MulticlassF1Score

from zo_lightning.callbacks import MetricObjective

CASES = {
    "classes": {},
    "tokens": {},
    "f1": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def build(name: str, folder: Path, seed: int, size: int, **given: Any) -> Any:
    """The trainer of a case; `seed` is that of the weights."""
    if name == "tokens":
        given["compute_loss_func"] = per_token  # transformers' own computes in float32
        return trainer(folder, llama(seed, torch.float64), data=tokens(), per_device_train_batch_size=size, **given)
    if name == "f1":
        given = {
            "zo_eps": 0.1,
            "learning_rate": 0.1,
            **given,
            "callbacks": [MetricObjective(MulticlassF1Score(2)), *given.get("callbacks", ())],
        }
    model = bert(seed, dropout=0.0, dtype=torch.float64)
    return trainer(folder, model, data=texts(), **{"per_device_train_batch_size": size, **given})


def resumed(name: str, folder: Path, rank: int, **given: Any) -> dict[str, torch.Tensor]:
    """The weights after a resume from the middle of the run."""
    torch.distributed.barrier()
    host = build(name, folder / name, rank, 4, ddp_backend="gloo", **given)
    host.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
    return host.model.state_dict()


def main(folder: Path) -> None:
    for name, given in CASES.items():
        rank = int(os.environ["RANK"])
        seen = Scissors()
        own = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 2, "callbacks": [seen], **given}
        host = build(name, folder / name, rank, 4, **own)
        averaged = []
        host.create_optimizer()
        mean = host.zo_optimizer.exchange.mean
        host.zo_optimizer.exchange.mean = lambda values, mean=mean, seen=averaged: seen.append(len(values)) or mean(values)
        host.train()
        result = {
            "weights": host.model.state_dict(),
            "losses": losses(host),
            "averaged": averaged,
            "wrapped": type(host.model_wrapped).__name__,
            "resumed": resumed(name, folder, rank, **given),
            "values": [report.values for report in seen.reports],
        }
        torch.save(result, folder / f"{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
