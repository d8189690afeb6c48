"""Run by test_ranking: a host's run whose questions people answer through files, under a step log; started again, it goes on.

Without a folder for questions: the whole run, answered at once.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from hf_tools import bert, texts
from hf_tools import trainer as hf_trainer
from lightning_models import lit, loader, trainer

from zo_lightning.callbacks import RankingObjective, TrajectoryLog
from zo_lightning.engine.objectives import FileOracle

STEPS = 3


class Shown(lit()):  # type: ignore[misc]
    """Its outputs are what people see."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"outputs": self.net(batch[0])}


def run(host: str, folder: Path, oracle: Any, *more: Any, search: int = 0, accumulated: int = 1) -> dict[str, torch.Tensor]:
    """The weights at the end."""
    callbacks = [RankingObjective(oracle, samples=3, search=search), *more]
    if host == "hf":
        own = {"max_steps": STEPS, "per_device_train_batch_size": 4, "zo_eps": 0.1, "learning_rate": 1e-2}
        own["gradient_accumulation_steps"] = accumulated
        made = hf_trainer(folder, bert(0, dropout=0.0), data=texts(), callbacks=callbacks, **own)
        made.train()
        model = made.model
    else:
        module = Shown()
        trainer(folder, max_steps=STEPS, callbacks=callbacks, accumulate_grad_batches=accumulated).fit(module, loader(shuffle=False))
        model = module
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def smallest_first(outputs: list[Any]) -> list[int]:
    """Another order in every step, from numbers alone."""
    return sorted(range(len(outputs)), key=lambda i: float(torch.as_tensor(outputs[i]).double().sum()))


def main(host: str, folder: Path, questions: Path | None = None) -> None:
    warnings.simplefilter("ignore")
    oracle = FileOracle(questions, timeout=120, poll=0.01) if questions is not None else smallest_first
    torch.save(run(host, folder, oracle, *([TrajectoryLog()] if questions is not None else [])), folder / "end.pt")


if __name__ == "__main__":
    main(sys.argv[1], *(Path(folder) for folder in sys.argv[2:]))
