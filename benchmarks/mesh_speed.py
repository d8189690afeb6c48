"""What more processes buy, one core each: time of a step when its points are shared out, queries and samples a second otherwise.

python benchmarks/mesh_speed.py --json benchmarks/results/mesh_speed.json
python benchmarks/mesh_speed.py --eager --layers 2 --width 128 --repeats 3

Four processes, each bound to a core of its own with one thread. They take turns in one run, several times: one process alone (the others
sleep), two that share the two sides of a step, four that share the four points of two queries, and two or four with data or seeds of their
own. Every figure is a ratio to the single process of the same round; medians and quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from measure import environment, write
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

CASES: dict[str, tuple[int, str, int, str]] = {
    "one process": (1, "", 1, ""),
    "one process, two queries": (1, "", 2, ""),
    "perturbation=2": (2, "perturbation=2", 1, "one process"),
    "perturbation=4, two queries": (4, "perturbation=4", 2, "one process, two queries"),
    "data=2": (2, "data=2", 1, "one process"),
    "data=4": (4, "data=4", 1, "one process"),
    "seeds=2": (2, "seeds=2", 1, "one process"),
    "seeds=4": (4, "seeds=4", 1, "one process"),
}
"""(processes, mesh, queries of a process, what it is compared with)."""


def worker(args: argparse.Namespace, folder: Path, rank: int, world: int) -> None:
    """One process, through all rounds; rank 0 saves the seconds a step of each case and round."""
    from zo_lightning.engine import SPSA, Exchange, Processes, ZOOptimizer
    from zo_lightning.engine.parallel import broadcast_parameters

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": args.width, "num_hidden_layers": args.layers, "intermediate_size": 4 * args.width}
    sizes |= {"num_attention_heads": 8, "vocab_size": 8192, "max_position_embeddings": args.length}
    model = BertForSequenceClassification(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))
    draw = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 8192, (args.batch, args.length), generator=draw), torch.randint(0, 2, (args.batch,), generator=draw)

    def loss() -> Tensor:
        found: Tensor = model(input_ids=ids, labels=labels).loss
        return found

    pairs = dist.new_group(list(range(2)), backend="gloo")
    ready: dict[str, Any] = {}
    for name, (count, mesh, queries, _) in CASES.items():
        if count > world or rank >= count:
            continue
        optimizer = ZOOptimizer(model, lr=1e-9, eps=1e-3, estimator=SPSA(queries))
        if count > 1:
            optimizer.exchange = Processes(mesh, group=pairs if count == 2 and world > 2 else None)
        else:
            optimizer.exchange = Exchange()
        ready[name] = optimizer
    seconds: dict[str, list[float]] = {name: [] for name in CASES if CASES[name][0] <= world}
    for turn in range(args.repeats + 1):
        for name in seconds:
            broadcast_parameters(list(model.parameters()))  # those who slept have the weights of before
            dist.barrier()
            if name in ready:
                began = time.perf_counter()
                for _ in range(args.steps if turn else 2):  # the first turn warms up
                    ready[name].step(loss, batch=ids)
                if turn:
                    seconds[name].append((time.perf_counter() - began) / args.steps)
    if rank == 0:
        forward = time.perf_counter()
        with torch.no_grad():
            for _ in range(args.steps):
                loss()
        forward = (time.perf_counter() - forward) / args.steps
        torch.save({"seconds": seconds, "forward": forward, "parameters": sum(p.numel() for p in model.parameters())}, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a case."""
    rows = []
    for name, times in found["seconds"].items():
        count, mesh, _, beside = CASES[name]
        row: dict[str, Any] = {"case": name, "processes": count, "seconds_a_step": round(statistics.median(times), 4)}
        if beside:
            ratios = sorted(mine / alone for mine, alone in zip(times, found["seconds"][beside], strict=True))
            row["time_over_one_process"] = quartiles(ratios)
            if not mesh.startswith("perturbation"):
                row["times_the_queries_a_second" if "seeds" in mesh else "times_the_samples_a_second"] = quartiles(
                    [count / r for r in ratios]
                )
        rows.append(row)
    return rows


def quartiles(values: Sequence[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [round(value, 3) for value in found]


def main(given: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="of a case in a round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--eager", action="store_true", help="without compiled kernels")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(given)
    if args.worker is not None:
        worker(args, Path(args.worker[0]), int(args.worker[1]), int(args.worker[2]))
        return []
    cores = len(os.sched_getaffinity(0))
    world = 4 if cores >= 4 else 2
    if cores < 4:
        print(f"SKIPPED: what needs 4 cores, for there are {cores}.")
    own = sys.argv[1:] if given is None else list(given)
    environ = {**os.environ, **({"ZO_LIGHTNING_COMPILE": "0"} if args.eager else {})}
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, *own, "--worker", name]
        ranks = [subprocess.Popen([*command, str(rank), str(world)], env=environ) for rank in range(world)]
        if max(rank.wait() for rank in ranks):
            raise RuntimeError("A process failed; it said why above.")
        found = torch.load(Path(name) / "found.pt")
    rows = summary(found)
    print(f"{found['parameters'] / 1e6:.1f} M weights, {args.batch} x {args.length} tokens, a forward pass {found['forward'] * 1e3:.0f} ms")
    for row in rows:
        rest = ", ".join(
            f"{key.replace('_', ' ')} {value[1]} ({value[0]} to {value[2]})" for key, value in row.items() if isinstance(value, list)
        )
        print(f"{row['case']:30}{row['seconds_a_step'] * 1e3:9.1f} ms a step   {rest}")
    if args.json:
        options = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}
        extra = {"cores": cores, "forward_seconds": found["forward"], "parameters": found["parameters"]}
        write(Path(args.json), {"environment": environment("cpu"), "options": options, **extra, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
