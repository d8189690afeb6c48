"""Steps of several processes on one workload: ours in every mesh, and DDP of AdamW."""

from __future__ import annotations

import argparse
import copy
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from workload import Workload, add_options

from zo_lightning.engine import Exchange, Processes, ZOOptimizer

Step = Callable[[], object]
LR = 1e-9
SHAPE = "hidden_size=512 num_hidden_layers=4 intermediate_size=2048 num_attention_heads=8 vocab_size=8192".split()


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Options of the workload: a BERT of 17 M weights, one thread."""
    add_options(parser)
    parser.set_defaults(config="bert", set=SHAPE, task="classification", threads=1)
    parser.add_argument("--eager", action="store_true", help="without compiled kernels")


def check_workload(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends where ranks can't have it."""
    if args.device != "cpu" or args.dtype != "float32":
        parser.error(f"--device {args.device} --dtype {args.dtype}: ranks have a core each, and weights in float32.")
    torch.set_num_threads(1)


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """The variables of a rank."""
    said = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **said, **({"ZO_LIGHTNING_COMPILE": "0"} if args.eager else {})}


def zo_step(workload: Workload, mesh: str | None) -> Step:
    """Ours; without a mesh, of a process by itself."""
    optimizer = ZOOptimizer(workload.model, lr=LR)
    optimizer.exchange = Processes(mesh) if mesh else Exchange()
    return lambda: optimizer.step(workload.loss, batch=workload.inputs)


def adamw_step(workload: Workload, ddp: bool) -> Step:
    """Of a copy of the model. DDP is torch's: buckets are reduced while the backward pass goes on. Buffers are not broadcast."""
    replica = copy.deepcopy(workload.model)
    adamw = torch.optim.AdamW(replica.parameters(), lr=LR)
    known = inspect.signature(DistributedDataParallel).parameters
    still: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    trained = DistributedDataParallel(replica, **still) if ddp else replica

    def step() -> None:
        adamw.zero_grad()
        trained(**workload.inputs).loss.backward()
        adamw.step()

    return step
