"""One of two gloo processes of test_hf_processes: trains each case and saves what it ends with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from hf_tools import bert, llama, losses, per_token, texts, tokenizer, tokens, trainer
from objective_worker import Written
from ranking_worker import smallest_first
from scissors import Scissors
from torchmetrics.classification import MulticlassF1Score

from zo_lightning.callbacks import GenerationObjective, MetricObjective, RankingObjective
from zo_lightning.engine import Backprop

CASES = {
    "classes": {},
    "tokens": {},
    "f1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "ranked": {},
    "hybrid": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "generated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


class Oracle:
    """Notes what it is asked, and fails at a step if it is told to."""

    def __init__(self, fails: int | None = None) -> None:
        self.asked: list[torch.Tensor] = []
        self.fails = fails

    def __call__(self, outputs: list[torch.Tensor]) -> list[int]:
        if len(self.asked) == self.fails:
            raise KeyError("who?")
        self.asked.append(torch.stack(outputs))
        return smallest_first(outputs)


def prompts() -> list[dict[str, Any]]:
    """Prompts of three tokens and their answers."""
    return [{**row, "labels": [-100] * 3 + row["input_ids"][3:]} for row in texts()]


def build(name: str, folder: Path, seed: int, size: int, **given: Any) -> Any:
    """The trainer of a case; `seed` is that of the weights."""
    if name == "tokens":
        given["compute_loss_func"] = per_token  # transformers' own computes in float32
        return trainer(folder, llama(seed, torch.float64), data=tokens(), per_device_train_batch_size=size, **given)
    if name == "generated":
        objective: Any = GenerationObjective(Written(), tokenizer(), max_new_tokens=3)
        given = {"zo_eps": 0.05, "learning_rate": 1e-4, **given, "callbacks": [objective, *given.get("callbacks", ())]}
        return trainer(folder, llama(seed, torch.float64), data=prompts(), **{"per_device_train_batch_size": size, **given})
    if name == "ranked":
        objective = RankingObjective(given.pop("oracle", None) or Oracle(), samples=4, top=2)
        given = {"zo_eps": 0.1, "learning_rate": 1e-2, **given, "callbacks": [objective, *given.get("callbacks", ())]}
    if name == "hybrid":
        given = {"zo_backprop": Backprop("classifier*", lr=1e-2), **given}
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


def stopped(folder: Path, rank: int) -> dict[str, Any]:
    """What a run ends with whose oracle fails at its third question."""
    seen, oracle = Scissors(), Oracle(fails=2)
    host = build("ranked", folder / "stopped", rank, 4, ddp_backend="gloo", oracle=oracle, callbacks=[seen], save_strategy="no")
    try:
        host.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "weights": host.model.state_dict(), "steps": len(seen.reports)}
    return {"error": "none"}


def main(folder: Path) -> None:
    for name, given in CASES.items():
        rank = int(os.environ["RANK"])
        seen, oracle = Scissors(), Oracle()
        own = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 2, "callbacks": [seen], **given}
        own |= {"oracle": oracle} if name == "ranked" else {}
        host = build(name, folder / name, rank, 4, **own)
        averaged = []
        host.create_optimizer()
        values = host.zo_optimizer.exchange.values
        host.zo_optimizer.exchange.values = lambda *given, values=values, seen=averaged: seen.append(given[1]) or values(*given)
        host.train()
        result = {
            "weights": host.model.state_dict(),
            "losses": losses(host),
            "averaged": averaged,
            "wrapped": type(host.model_wrapped).__name__,
            "resumed": resumed(name, folder, rank, **given),
            "values": [report.values for report in seen.reports],
            "asked": oracle.asked,
        }
        torch.save(result, folder / f"{name}.{rank}.pt")
    torch.save(stopped(folder, rank), folder / f"stopped.{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
