"""Whether streamed weights make the steps of weights="exact", bit for bit: 100 steps of four models, in engine and hosts; the bytes read.

python benchmarks/offload_equal.py --json benchmarks/results/offload_equal.json
python benchmarks/offload_equal.py --steps 5 --models opt --runs plain
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("ZO_LIGHTNING_COMPILE", "0")  # many small models, each for a few seconds

import lightning as L
import torch
import transformers
from exact_drift import DTYPES, INTEGERS, VOCABULARY, make
from measure import environment, write
from torch import Tensor
from torch.utils.data import DataLoader

from zo_lightning import ZOOptimizer, ZOStrategy
from zo_lightning.callbacks import SparseMask, WeightOffload
from zo_lightning.engine import SPSA
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.residency import Offload, Offloaded
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

KINDS = ("opt", "llama", "bert", "t5")
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask": ("random", 0.3)},
    "listed": {"mask": ("random", 0.001)},
    "accumulated": {"micro": 2},
    "masked and accumulated": {"mask": ("random", 0.3), "micro": 2},
    "two queries": {"queries": 2},
}
ROWS = 16
BATCH = 4


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, 12), generator=torch.Generator().manual_seed(5))


def loss_of(model: Any, rows: Tensor) -> Tensor:
    """Cross-entropy of predicting the inputs."""
    logits = model(input_ids=rows, labels=rows).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows.flatten())


Found = tuple[list[Any], dict[str, Tensor], int]
"""Losses, weights, bytes read."""


def engine(kind: str, dtype: torch.dtype, weights: Any, steps: int, run: dict[str, Any]) -> Found:
    """Steps of the engine alone."""
    model, _ = make(kind, dtype)
    mask: Any = Mask(run["mask"][0], run["mask"][1], refresh=20) if "mask" in run else None
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=weights, mask=mask, estimator=SPSA(run.get("queries", 1)))
    micro, rows, losses = run.get("micro", 1), ids(), []
    for step in range(steps):
        for part in range(micro):
            batch = rows.roll(-BATCH * (step * micro + part), 0)[:BATCH]
            optimizer.estimate(lambda batch=batch: loss_of(model, batch), weight=1 / micro)  # type: ignore[misc]
        report = optimizer.apply()
        losses.append(None if report is None else report.values)
    residency = optimizer.residency
    return losses, model.state_dict(), residency.traffic.read if isinstance(residency, Offloaded) else 0


class Module(L.LightningModule):
    """A causal or masked model as people write it."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, _ = make(kind, dtype)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def callbacks(weights: Any, run: dict[str, Any]) -> list[Any]:
    found: list[Any] = [SparseMask(*run["mask"], refresh=20, summary=False)] if "mask" in run else []
    return found if weights == "exact" else [*found, WeightOffload(lockstep=weights.lockstep)]


def in_lightning(kind: str, dtype: torch.dtype, weights: Any, steps: int, run: dict[str, Any]) -> Found:
    """Steps of Lightning's loop."""
    module = Module(kind, dtype)
    strategy = ZOStrategy(eps=1e-2, weights="exact" if weights == "exact" else "auto", estimator=SPSA(run.get("queries", 1)))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    micro = run.get("micro", 1)
    trainer = L.Trainer(
        accelerator="cpu", strategy=strategy, max_steps=steps, accumulate_grad_batches=micro, callbacks=callbacks(weights, run), **quiet
    )
    trainer.fit(module, DataLoader(list(ids()), BATCH))  # type: ignore[arg-type]
    optimizer: Any = strategy.zo_optimizer
    residency = optimizer.residency
    return module.losses, module.model.state_dict(), residency.traffic.read if isinstance(residency, Offloaded) else 0


def in_hugging_face(kind: str, dtype: torch.dtype, weights: Any, steps: int, run: dict[str, Any]) -> Found:
    """Steps of the Trainer's loop."""
    model, _ = make(kind, dtype)
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            output_dir=folder, optim="zo", use_cpu=True, max_steps=steps, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, learning_rate=1e-3, zo_eps=1e-2, zo_queries=run.get("queries", 1), per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=run.get("micro", 1), zo_weights="exact" if weights == "exact" else "auto",
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in ids()]
        trainer = ZOTrainer(model=model, args=args, train_dataset=data, callbacks=callbacks(weights, run))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        residency = trainer.zo_optimizer.residency
        return losses, model.state_dict(), residency.traffic.read if isinstance(residency, Offloaded) else 0


HOSTS = {"engine": engine, "lightning": in_lightning, "hugging face": in_hugging_face}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(bits(tensor), bits(other[name])) for name, tensor in one.items())


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers."""
    return tensor.contiguous().view(INTEGERS.get(tensor.element_size(), tensor.dtype)) if tensor.is_floating_point() else tensor


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Print a row for each run; `--json` writes them. Exits with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows = []
    for host in options.hosts:
        for kind in options.models:
            for name in options.dtypes:
                for run in options.runs:
                    given = DTYPES[name], options.steps, RUNS[run]
                    whole, streamed, apart = (
                        HOSTS[host](kind, given[0], weights, *given[1:]) for weights in ("exact", Offload(), Offload(lockstep=False))
                    )
                    row = {
                        "host": host, "model": kind, "dtype": name, "run": run, "steps": options.steps,
                        "equal_losses": len(whole[0]) >= options.steps and whole[0] == streamed[0] == apart[0],
                        "equal_weights": equal(whole[1], streamed[1]) and equal(whole[1], apart[1]),
                        "read_in_lockstep": streamed[2], "read_one_after_another": apart[2],
                    }  # fmt: skip
                    rows.append(row)
                    print(*row.values(), flush=True)
    different = [row for row in rows if not (row["equal_losses"] and row["equal_weights"])]
    result = {"environment": environment("cpu"), "runs": len(rows), "different": len(different), "rows": rows}
    print(f"{len(rows)} runs, {len(different)} different")
    if options.json is not None:
        write(options.json, result)
    return result


if __name__ == "__main__":
    raise SystemExit(1 if main()["different"] else 0)
