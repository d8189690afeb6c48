"""FSDP2 over several processes beside one process: the losses of a run and the peak memory of each rank.

python benchmarks/sharded.py --json benchmarks/results/sharded.json
python benchmarks/sharded.py --blocks 2 --width 64 --steps 3

Every process trains the same model on the same data, from weights that are the engine's own noise, so that no process ever holds a whole
model to shard it. Peak memory is what the process took at most (resident set) beyond what it had before the model was made.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import environment, write
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from zo_lightning.engine import DataParallel, ZOOptimizer
from zo_lightning.engine.noise import Gaussian, Item, sweep
from zo_lightning.engine.shards import fsdp_modules

WORDS, HEADS = 8192, 8


class Block(nn.Module):
    """A transformer's: attention and a feed-forward layer of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attend(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return out


class Model(nn.Module):
    """A small language model."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most that they have been."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(blocks: int, width: int, sharded: bool) -> nn.Module:
    """Weights 0.02 z, for whatever part of them is here."""
    with torch.device("meta"):
        model = Model(blocks, width)
    if sharded:
        for part in (model.embedding, *model.blocks, model):
            fully_shard(part)
    model.to_empty(device="cpu")
    optimizer = ZOOptimizer(model, weights="inplace")
    with torch.no_grad():
        items = []
        for p in optimizer.residency.trained:
            p.tensor.zero_()
            if "norms" in p.name and p.name.endswith("weight"):
                p.tensor.fill_(1.0)
            items.append(Item(p.tensor, p.tensor, p.key, 1.0, (0.02,), region=p.region))
        sweep(items, [12345], Gaussian())
    return model


def train(rank: int, world: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    before = resident()
    model = build(args.blocks, args.width, world > 1)
    optimizer = ZOOptimizer(model, lr=1e-6, eps=1e-3, weights="exact")
    if world > 1:
        optimizer.exchange = DataParallel()
    values, draw = [], torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for _ in range(args.steps):
        ids = torch.randint(WORDS, (2, 16), generator=draw)
        target = ids % 2
        optimizer.step(lambda ids=ids, target=target: nn.functional.cross_entropy(model(ids).flatten(0, 1), target.flatten()))  # type: ignore[misc]
        values.append(list(optimizer.report.values))  # type: ignore[union-attr]
    seconds = (time.perf_counter() - began) / args.steps
    numel = sum(p.numel for p in optimizer.residency.trained)
    return {
        "rank": rank,
        "before": before,
        "peak": peak(),
        "peak_of_model": peak() - before,
        "weights": 4 * numel,
        "own_weights": sum(p.tensor.nbytes for p in optimizer.residency.trained),
        "modules": len(fsdp_modules(model)),
        "seconds_a_step": seconds,
        "values": values,
    }


def start(folder: Path, world: int, given: list[str]) -> list[dict[str, Any]]:
    """What each process of a run measured."""
    settings = {"OMP_NUM_THREADS": "1", "ZO_LIGHTNING_COMPILE": "0", **os.environ}  # compilers take memory, too
    command = [sys.executable, __file__, *given, "--folder", str(folder), "--world", str(world)]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=settings) for rank in range(world)]
    try:
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise SystemExit("a process failed")
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"{world}.{rank}.json").read_text()) for rank in range(world)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder is not None:
        if args.world > 1:
            dist.init_process_group("gloo", init_method=f"file://{args.folder}/store", rank=args.rank, world_size=args.world)
        found = train(args.rank, args.world, args)
        (args.folder / f"{args.world}.{args.rank}.json").write_text(json.dumps(found))
        if args.world > 1:
            dist.destroy_process_group()
        return
    given = [f"--{name}={getattr(args, name)}" for name in ("blocks", "width", "steps")]
    with tempfile.TemporaryDirectory() as folder:
        (alone,), ranks = start(Path(folder), 1, given), start(Path(folder), args.processes, given)
    equal = [rank["values"] == alone["values"] for rank in ranks]
    result = {
        "weights_MB": alone["weights"] / 1e6,
        "steps": args.steps,
        "processes": args.processes,
        "losses_bit_equal": all(equal),
        "first_and_last_loss": [alone["values"][0][0], alone["values"][-1][0]],
        "peak_MB": {"one process": alone["peak_of_model"] / 1e6, "ranks": [rank["peak_of_model"] / 1e6 for rank in ranks]},
        "peak_of_process_MB": {"one process": alone["peak"] / 1e6, "ranks": [rank["peak"] / 1e6 for rank in ranks]},
        "share": max(rank["peak_of_model"] for rank in ranks) / alone["peak_of_model"],
        "share_of_process": max(rank["peak"] for rank in ranks) / alone["peak"],
        "seconds_a_step": {"one process": alone["seconds_a_step"], "ranks": [rank["seconds_a_step"] for rank in ranks]},
    }
    print(json.dumps(result, indent=2))
    write(args.json, {"environment": environment("cpu"), **result})


if __name__ == "__main__":
    main()
