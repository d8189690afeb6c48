"""Run by test_prompt_runs: prompted tasks in the Hugging Face Trainer on one of two gloo processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from hf_tools import arguments, weights
from prompt_tools import model, tokenizer_of
from ranks import run_launched
from scissors import Scissors

from zo_lightning.hf_integration import ZOTrainer
from zo_lightning.prompts import Prompt

WORDS = ["great", "terrible", "fine"]
OPTIONS = ["great", "a terrible film", "really fine fun"]
CASES: dict[str, dict[str, Any]] = {
    "mask": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "options": {},
    "accuracy": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def examples(count: int = 32) -> list[dict[str, Any]]:
    """Texts of several lengths, so that batches differ in their padding."""
    words = "a great film that was really fun to see and terrible waste of time".split()
    return [{"text": " ".join(words[(3 * i + j) % len(words)] for j in range(2 + i % 7)), "label": i % 3} for i in range(count)]


def task_of(kind: str) -> Prompt:
    """With a tokenizer that comes out the same in every process."""
    if kind == "options":
        return Prompt(tokenizer_of("bert"), "{text} . it was", options=OPTIONS, kind=kind)
    return Prompt(tokenizer_of("bert"), "{text} . it was {mask} .", WORDS)


def right(preds: torch.Tensor, target: torch.Tensor) -> float:
    """Not the mean of its parts: the squared share of right answers."""
    return float((preds.argmax(-1) == target).double().mean() ** 2)


def run(case: str, folder: Path, size: int, **given: Any) -> dict[str, Any]:
    """Train in float64; other ranks begin with other weights."""
    task, seen = task_of(case), Scissors()
    net = model("gpt2" if case == "options" else "bert", int(os.environ.get("RANK", "0"))).double()
    objective = [task.objective(right)] if case == "accuracy" else []
    settings = {"per_device_train_batch_size": size, "learning_rate": 1e-3, "remove_unused_columns": False, **given}
    host = ZOTrainer(
        net,
        arguments(folder / case, **settings),
        train_dataset=examples(),
        callbacks=[seen, *objective],
        zo_eps=0.3 if objective else 1e-2,
        **task.hooks(),
    )
    host.train()
    return {"weights": weights(net), "values": [report.values for report in seen.reports]}


def start(folder: Path) -> None:
    """Both processes; AssertionError with what they wrote where one fails."""
    run_launched("prompt_worker.py", folder)


def main(folder: Path) -> None:
    for case, given in CASES.items():
        result = run(case, folder, 4, ddp_backend="gloo", **given)
        torch.save(result, folder / f"{case}.{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
