"""Every mode of several processes over 200 steps, in the engine, Lightning and Hugging Face: equal ranks, and equal to one process.

python benchmarks/mesh_equal.py --json benchmarks/results/mesh_equal.json
python benchmarks/mesh_equal.py --hosts engine --steps 20 --worlds 2

A tiny BERT with random weights is trained by 2 and by 4 gloo processes, started by torchrun (and once by `accelerate launch`), one thread
each. Ranks must end with the same bits. Processes that share the points of a step must end with those of one process; dropout is on. Data
parallel processes see parts of the batch that one process sees whole: there, dropout is off, for masks belong to ranks, and the largest
difference of a weight is measured. The bytes that a rank sends in a step are counted, also for a model of eight times the width.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ZO_LIGHTNING_COMPILE", "0")  # by each of many processes
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from measure import environment, write
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import BertConfig, BertForSequenceClassification

from zo_lightning.engine import SPSA, Processes, ZOOptimizer
from zo_lightning.engine.parallel import Exchange, as_mesh, broadcast_parameters

MODES = {
    2: ["data=2", "perturbation=2", "seeds=2"],
    4: ["data=4", "perturbation=4", "data=2,perturbation=2", "seeds=4", "seeds=2,perturbation=2"],
}
BATCH, ROWS, LENGTH, WORDS = 8, 1024, 12, 64
LR, EPS = 1e-3, 1e-2
DTYPE = "MESH_EQUAL_DTYPE"
"""An environment variable: of the weights."""


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens of two classes."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 2, (ROWS,), generator=draw)
        self.ids = torch.randint(0, WORDS // 2, (ROWS, LENGTH), generator=draw) + self.labels[:, None] * (WORDS // 2)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: Any) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "attention_mask": torch.ones_like(self.ids[row]), "labels": self.labels[row]}


def model_of(dropout: float, width: int = 32) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    rates: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes, **rates))
    model.to(getattr(torch, os.environ.get(DTYPE, "float32")))
    return model


class Work:
    """What one mode needs: a mesh or none, rows a batch, queries, dropout."""

    def __init__(self, mode: str, world: int, alone: bool) -> None:
        mesh = as_mesh(mode, world)
        self.mode = None if alone else mode
        self.batch = BATCH * mesh.data if alone else BATCH
        self.estimator = SPSA(2 if mesh.perturbation == 4 else 1)
        self.dropout = 0.0 if mesh.data > 1 else 0.1


def in_engine(work: Work, steps: int, folder: Path, width: int = 32) -> tuple[Any, Exchange]:
    """A plain loop."""
    model, data = model_of(work.dropout, width), Texts()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=work.estimator)
    exchange = optimizer.exchange = Processes(work.mode) if work.mode else Exchange()
    broadcast_parameters(list(model.parameters())) if work.mode else None
    for step in range(steps):
        begin = (step * exchange.mesh.streams + exchange.stream) * work.batch % ROWS
        batch = data[slice(begin, begin + work.batch)]
        optimizer.step(lambda: model(**batch).loss, batch=batch)  # noqa: B023  # it is called at once
    if isinstance(exchange, Processes):
        exchange.leave()
    return model, exchange


def in_lightning(work: Work, steps: int, folder: Path) -> tuple[Any, Exchange]:
    """A module that knows nothing of it, and its Trainer."""
    import lightning as L

    from zo_lightning import ZODDPStrategy, ZOStrategy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model_of(work.dropout)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.net(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR)

    options: dict[str, Any] = {"eps": EPS, "estimator": work.estimator}
    strategy = ZODDPStrategy(parallel=work.mode, **options) if work.mode else ZOStrategy(**options)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    devices = int(os.environ["WORLD_SIZE"]) if work.mode else 1
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=devices, max_steps=steps, max_epochs=-1, **quiet)
    module = Module()
    # several processes get this sampler from Lightning, in which training data are always shuffled
    sampler: Any = None if work.mode else DistributedSampler(Texts(), 1, 0, shuffle=True, seed=0)
    trainer.fit(module, DataLoader(Texts(), work.batch, sampler=sampler))
    optimizer: Any = strategy.zo_optimizer
    return module.net, optimizer.exchange


def in_hugging_face(work: Work, steps: int, folder: Path) -> tuple[Any, Exchange]:
    """A ZOTrainer."""
    from zo_lightning.hf_integration import ZOConfig, ZOTrainer

    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    rows: dict[str, Any] = {
        "per_device_train_batch_size": work.batch,
        "max_steps": steps,
        "learning_rate": LR,
        "dataloader_pin_memory": False,
    }
    several: dict[str, Any] = {"zo_estimator": work.estimator}
    several |= {"ddp_backend": "gloo", "zo_parallel": work.mode} if work.mode else {}
    config = ZOConfig(output_dir=str(folder / "hf"), zo_eps=EPS, **quiet, **rows, **several)
    trainer = ZOTrainer(model=model_of(work.dropout), args=config, train_dataset=Texts())
    trainer.train()
    return trainer.model, trainer.zo_optimizer.exchange


HOSTS = {"engine": in_engine, "lightning": in_lightning, "hf": in_hugging_face}


def worker(host: str, steps: int, folder: Path, alone: int) -> None:
    """One rank, through all modes; `alone`: the single process beside so many."""
    warnings.simplefilter("ignore")
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if host == "engine" and not alone:
        dist.init_process_group("gloo")
    for mode in MODES[alone or world]:
        if alone and as_mesh(mode, alone).seeds > 1:
            continue
        found: dict[str, Any] = {}
        model, exchange = HOSTS[host](Work(mode, alone or world, bool(alone)), steps, folder)
        found["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
        found["bytes"] = sent_by(exchange) / steps
        if host == "engine" and not alone:
            _, wide = in_engine(Work(mode, world, False), 3, folder, width=256)
            found["bytes of a wide model"] = sent_by(wide) / 3
        torch.save(found, folder / f"{host}.{'alone' if alone else 'together'}.{mode}.{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def sent_by(exchange: Exchange) -> int:
    """What steps made it send; the last meeting is the end of the run, the first the comparison at the start."""
    if not isinstance(exchange, Processes):
        return 0
    return exchange.sent - 2 * exchange.sent // exchange.meetings


def start(launcher: Sequence[str], given: Sequence[object]) -> None:
    """Run the workers. RuntimeError with what they said."""
    command = [sys.executable, *launcher, __file__, "--worker", *map(str, given)]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-6000:])


def compare(host: str, launched: str, mode: str, world: int, folder: Path) -> dict[str, Any]:
    """One row."""
    ranks = [torch.load(folder / f"{host}.together.{mode}.{rank}.pt") for rank in range(world)]
    first, mesh = ranks[0]["weights"], as_mesh(mode, world)
    queries = (2 if mesh.perturbation == 4 else 1) * mesh.seeds
    row = {"host": host, "launched": launched, "processes": world, "mode": mode, "queries": queries}
    row["ranks_equal"] = all(torch.equal(rank["weights"][name], first[name]) for rank in ranks for name in first)
    alone = folder / f"{host}.alone.{mode}.0.pt"
    if alone.exists():
        single = torch.load(alone)["weights"]
        row["bits_of_one_process"] = all(torch.equal(single[name], first[name]) for name in first)
        row["largest_difference"] = max(float((single[name] - first[name]).abs().max()) for name in first)
    start_of = model_of(0.0).state_dict()
    row["largest_change"] = max(float((start_of[name] - first[name]).abs().max()) for name in first)
    row["bytes_a_step_and_rank"] = round(max(rank["bytes"] for rank in ranks), 1)
    if "bytes of a wide model" in ranks[0]:
        row["bytes_of_a_wide_model"] = round(ranks[0]["bytes of a wide model"], 1)
    return row


def line(row: dict[str, Any]) -> str:
    """For people."""
    single = (
        "" if "bits_of_one_process" not in row else "as one process" if row["bits_of_one_process"] else f"{row['largest_difference']:.1e}"
    )
    equal = "equal" if row["ranks_equal"] else "DIFFERENT"
    where = f"{row['host']:9} {row['launched']:10} {row['processes']} x {row['mode']:24}"
    return f"{where} ranks {equal:9} {single:16} moved {row['largest_change']:.1e}   {row['bytes_a_step_and_rank']} bytes"


def main(given: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=4, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--worlds", nargs="+", type=int, choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(given)
    if args.worker is not None:
        host, steps, folder, alone = args.worker
        worker(host, int(steps), Path(folder), int(alone))
        return []
    os.environ[DTYPE] = args.dtype  # for the workers, too
    rows = []
    for host, world in itertools.product(args.hosts, args.worlds):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        launchers = {"torchrun": torchrun}
        if host == "hf" and world == 2:
            # without MPI its CPU launcher starts one process; this one is torchrun inside, and ZOConfig(use_cpu=True) does the rest
            several = ["--multi_gpu", f"--num_processes={world}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
            launchers["accelerate"] = ["-m", "accelerate.commands.launch", *several]
        with tempfile.TemporaryDirectory() as name:
            start([], [host, args.steps, name, world])
            for launched, launcher in launchers.items():
                start(launcher, [host, args.steps, name, 0])
                for mode in MODES[world]:
                    rows.append(compare(host, launched, mode, world, Path(name)))
                    print(line(rows[-1]), flush=True)
    if args.json:
        options = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}
        write(Path(args.json), {"environment": environment("cpu"), "options": options, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
