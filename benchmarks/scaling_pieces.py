"""The pieces that `scaling.py` makes steps of, and whole steps to compare with, measured by one, two and four processes at the same time.

Each process has one thread and, where there are enough, a core of its own. All measure the same piece at the same moment, so that what
they take from each other (memory, caches) is in the pieces as it is in the steps. Times are the least of several rounds, for both: a
machine that is shared with others runs at half its speed for minutes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from measure import Contender, interleaved, stamps
from parallel_steps import LR, Step, adamw_step, environment_of, zo_step
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from workload import Workload, build

from zo_lightning.engine import SPSA, Processes, ZOOptimizer

TERMS = (1, 4, 16)
"""Of the updates whose differences say what one more takes. Few terms may be one pass over the weights."""


class Pieces(NamedTuple):
    """Seconds of the parts of a step."""

    forward: float
    backward: float
    adamw: float
    evaluation: float
    """A forward pass at a perturbed point."""
    rest: float
    """Of an update: what one term takes beyond the time of one more; less than 0 where the first is cheaper."""
    term: float
    """The update by one term more, where there are many."""
    gradient: float
    """Bytes of all gradients."""
    reduced: float
    """Bytes a second of an all_reduce between processes of one machine; 0 for one process."""
    met: float
    """One meeting, as it is between processes of one machine; 0 for one process."""


def halves(workload: Workload, queries: int) -> tuple[Contender, Contender]:
    """The evaluations of a step; and the update of one with as many terms, whose losses are made up."""

    def timed(half: str, loss: Callable[[], Tensor], weights: str) -> Contender:
        optimizer = ZOOptimizer(workload.model, lr=LR, estimator=SPSA(queries), weights=weights)

        def run(count: int) -> list[float]:
            seconds = []
            for _ in range(count):
                began = time.perf_counter()
                optimizer.estimate(loss)
                middle = time.perf_counter()
                optimizer.apply()
                seconds.append(middle - began if half == "evaluations" else time.perf_counter() - middle)
            return seconds

        return run

    numbers = itertools.cycle((0.0, 1.0))
    made_up = timed("update", lambda: torch.tensor(next(numbers)), "inplace")  # which asks for no forward pass
    return timed("evaluations", workload.loss, "auto"), made_up


def without_network(workload: Workload, world: int) -> dict[str, Step]:
    """Parts of an AdamW step, and those of an exchange."""
    replica = copy.deepcopy(workload.model)
    adamw = torch.optim.AdamW(replica.parameters(), lr=LR)

    def forward() -> Tensor:
        loss: Tensor = replica(**workload.inputs).loss
        return loss

    def gradient() -> None:
        replica.zero_grad()
        forward().backward()

    parts: dict[str, Step] = {"forward": forward, "gradient": gradient, "adamw": adamw.step}
    if world > 1:
        numbers = torch.zeros(sum(p.numel() for p in replica.parameters()))
        exchange = Processes()
        parts |= {"all_reduce": lambda: dist.all_reduce(numbers), "meeting": lambda: exchange.everywhere(0.0)}
    return parts


def whole_steps(workload: Workload, world: int) -> dict[str, Step]:
    """Steps of every scheme that has room for so many processes."""
    if world == 1:
        return {"adamw": adamw_step(workload, ddp=False), "data": zo_step(workload, None)}
    shared = "perturbation=2" if world == 2 else f"data={world // 2},perturbation=2"
    meshes = {"data": f"data={world}", "perturbation": shared, "seeds": f"seeds={world}"}
    return {"adamw": adamw_step(workload, ddp=True), **{name: zo_step(workload, mesh) for name, mesh in meshes.items()}}


def worker(args: argparse.Namespace, folder: Path, rank: int, world: int) -> None:
    """One of the processes; rank 0 writes the least times."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    workload = build(args)
    parts, steps = ({name: stamps(step, "cpu") for name, step in made(workload, world).items()} for made in (without_network, whole_steps))
    updates = {f"{terms} terms": halves(workload, terms)[1] for terms in TERMS}
    wholes = {f"step, {name}": step for name, step in steps.items()}
    contenders = {"evaluations": halves(workload, 1)[0], **updates, **parts, **wholes}
    seconds = {name: min(times) for name, times in interleaved(contenders, args.rounds, args.steps).items()}
    terms = [seconds[name] for name in updates]
    term = (terms[2] - terms[1]) / (TERMS[2] - TERMS[1])
    gradient = 4.0 * sum(p.numel() for p in workload.model.parameters())
    pieces = Pieces(
        forward=seconds["forward"],
        backward=seconds["gradient"] - seconds["forward"],
        adamw=seconds["adamw"],
        evaluation=seconds["evaluations"] / 2,
        rest=terms[0] - term,
        term=term,
        gradient=gradient,
        reduced=2 * (world - 1) / world * gradient / seconds["all_reduce"] if world > 1 else 0.0,
        met=seconds.get("meeting", 0.0),
    )
    if rank == 0:
        found = {"pieces": pieces._asdict(), "steps": {name: seconds[f"step, {name}"] for name in steps}}
        (folder / f"{world}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


def measured(args: argparse.Namespace, own: Sequence[str], script: str, world: int) -> tuple[Pieces, dict[str, float]]:
    """Pieces and whole steps of so many processes at once; RuntimeError where one fails."""
    cores = sorted(os.sched_getaffinity(0))
    environ = environment_of(args)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            place = ["taskset", "-c", str(cores[rank])] if len(cores) >= world else []
            command = [*place, sys.executable, script, *own, "--worker", folder, str(rank), str(world)]
            ranks.append(subprocess.Popen(command, env=environ))
        try:
            if max(rank.wait() for rank in ranks):
                raise RuntimeError("A process failed; it said why above.")
        finally:
            for process in ranks:
                process.kill()
        found: dict[str, Any] = json.loads(Path(folder, f"{world}.json").read_text())
    return Pieces(**found["pieces"]), found["steps"]


class _Done:
    """Work that is over."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def row_seconds(ranks: int = 4096, repeats: int = 5) -> float:
    """What one more rank takes of Python in a meeting: the numbers of so many ranks, none of which is sent."""

    def gathered(every: list[Tensor], mine: Tensor, **options: Any) -> _Done:
        for one in every:
            one.copy_(mine)
        return _Done()

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        exchange = Processes(group=dist.group.WORLD)
        exchange.widened(SPSA(1))
        losses, seconds = [torch.tensor(0.5), torch.tensor(0.25)], []
        with mock.patch.object(dist, "all_gather", gathered):
            for _ in range(repeats):
                began = time.perf_counter()
                exchange.values(losses, 2)
                seconds.append(time.perf_counter() - began)
    finally:
        dist.destroy_process_group()
    return statistics.median(seconds) / ranks
