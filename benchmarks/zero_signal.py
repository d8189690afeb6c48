"""What stochastic rounding costs over a long run: 20,000 updates without signal on a trained MiniLM, in float32 and in 16 bits.

python benchmarks/zero_signal.py --json benchmarks/results/zero_signal.json
python benchmarks/zero_signal.py --steps 2000 --scales 3e-5 --seeds 0

Every update is theta <- theta + s lr g z with a random sign s: nothing to learn, a random walk. In float32 it is exact; in 16 bits rounding
adds its own variance. Held-out accuracy is that of float32 forward passes on the weights as they are stored.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from learning import accuracy
from measure import environment, write
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from workload import DTYPES

from zo_lightning.engine.noise import Change, Rademacher, apply_changes
from zo_lightning.engine.parameters import Trained, collect, names_of
from zo_lightning.engine.seeds import query_seed, rounding_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import demo_docstrings
import docstring_topics
import minilm

KINDS = {"gains": "LayerNorm.weight", "biases": "bias", "embeddings": "embeddings", "matrices": "weight"}
AT_ONCE = 250


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--scales", type=float, nargs="+", default=[3e-6, 3e-5], help="lr * g")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16", "float16"])
    parser.add_argument("--vectors", nargs="+", choices=("same", "float32"), default=["same", "float32"], help="dtype of 1-d tensors")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--training", type=int, default=60, help="AdamW steps before")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def trained_model(steps: int) -> tuple[nn.Module, Any, demo_docstrings.Task]:
    """MiniLM after some AdamW steps, in evaluation mode."""
    model, tokenizer = minilm.load(list(docstring_topics.TOPICS))
    task = demo_docstrings.make_task(tokenizer)
    arguments = TrainingArguments(
        output_dir="runs/zero_signal",
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=task.train, data_collator=DataCollatorWithPadding(tokenizer)).train()
    return model.eval(), DataCollatorWithPadding(tokenizer), task


def walked(start: list[Trained], dtype: torch.dtype, vectors: torch.dtype, scale: float, seed: int, steps: int) -> list[Tensor]:
    """The weights after `steps` updates without signal, as they are stored."""
    kept = [p.tensor.detach().to(vectors if p.tensor.dim() < 2 else dtype).clone() for p in start]
    weights = [Trained(p.name, p.key, tensor, 0, (tensor,)) for p, tensor in zip(start, kept, strict=True)]
    sign = random.Random(seed)
    for first in range(0, steps, AT_ONCE):
        changes = [
            Change((query_seed(seed, step, 0),), ((1.0, (sign.choice((-scale, scale)),)),), rounding_seed(seed, step))
            for step in range(first, min(first + AT_ONCE, steps))
        ]
        apply_changes(weights, changes, Rademacher())
    return kept


def kind_of(name: str) -> str:
    """Gains, biases, embeddings or matrices."""
    return next(kind for kind, part in KINDS.items() if part in name)


def variances(start: list[Trained], exact: list[Tensor], stored: list[Tensor]) -> dict[str, float]:
    """Mean square of (stored - exact) over that of the walk itself, for each kind of tensor."""
    sums: dict[str, list[float]] = {}
    for p, right, got in zip(start, exact, stored, strict=True):
        row = sums.setdefault(kind_of(p.name), [0.0, 0.0])
        begun = p.tensor.detach().to(got.dtype).double()
        walk = right.double() - p.tensor.detach().double()
        row[0] += float(((got.double() - begun) - walk).square().sum())
        row[1] += float(walk.square().sum())
    return {kind: round(extra / walk, 3) for kind, (extra, walk) in sums.items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    model, collate, task = trained_model(options.training)
    start = collect([{"params": list(model.parameters())}], names_of(model))
    before = [p.tensor.detach().clone() for p in start]
    result: dict[str, Any] = {"environment": environment("cpu"), "options": {**vars(options), "json": None}, "runs": []}
    result["accuracy_before"] = accuracy(model, collate, task.held_out)
    print(f"before: {100 * result['accuracy_before']:.2f} %", flush=True)
    for scale in options.scales:
        for seed in options.seeds:
            exact = walked(start, torch.float32, torch.float32, scale, seed, options.steps)
            for name in options.dtypes:
                for vectors in options.vectors if name != "float32" else ["same"]:
                    dtype = DTYPES[name]
                    small = dtype if vectors == "same" else torch.float32
                    stored = exact if name == "float32" else walked(start, dtype, small, scale, seed, options.steps)
                    with torch.no_grad():
                        for p, tensor in zip(start, stored, strict=True):
                            p.tensor.copy_(tensor)
                    row = {
                        "scale": scale,
                        "seed": seed,
                        "dtype": name,
                        "vectors": vectors,
                        "accuracy": accuracy(model, collate, task.held_out),
                    }
                    with torch.no_grad():
                        for p, tensor in zip(start, before, strict=True):
                            p.tensor.copy_(tensor)
                    row["extra_variance"] = variances(start, exact, stored)
                    result["runs"].append(row)
                    print(
                        f"{scale:g} seed {seed} {name:9} vectors {vectors:8} {100 * row['accuracy']:.2f} %  {row['extra_variance']}",
                        flush=True,
                    )
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
