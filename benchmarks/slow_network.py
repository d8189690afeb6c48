"""What a slow network costs a step: data, perturbation and seed parallel beside DDP of AdamW, under delays and limited bandwidth.

python benchmarks/slow_network.py --json benchmarks/results/slow_network.json
python benchmarks/slow_network.py --eager --set hidden_size=32 num_hidden_layers=1 --delays 0 5 --mbits 100 --rounds 1
python benchmarks/slow_network.py --ranks 3 --delays 0 10 50 --mbits 1000 --json benchmarks/results/slow_network_3.json

Each rank is a process with one thread in a network namespace of its own; `delay_line.py` joins them, for packets that take `delay` to
arrive and leave a rank at so many Mbit/s. The model and batch are the same for all; cases take turns in one run, several times, on every
network. AdamW is torch's DDP, whose buckets are reduced while the backward pass goes on. "Alone" is a step of each rank without any
exchange; a meeting is the exchange of one of our steps by itself. Times are the least of several, for a machine that is shared with others
runs at half its speed for minutes; what a step loses is its time beyond that of the step alone. Bytes are those on the line: headers and
acknowledgements count. Needs root and Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from delay_line import DEVICE, DelayLine, unavailable
from measure import environment, write
from parallel_steps import Step, adamw_step, add_workload, check_workload, environment_of, zo_step
from workload import build, describe

from zo_lightning.engine import Processes

MODES = ("data", "perturbation", "seeds")
ALONE = {"adamw, ddp": "adamw, alone", "zo, data": "zo, alone", "zo, seeds": "zo, alone"}
"""What else takes as long without a network; nothing does for ranks that share points."""


def cases(args: argparse.Namespace, world: int) -> dict[str, Step]:
    """What a rank does in a step of each case."""
    workload, exchange = build(args), Processes()
    modes = [mode for mode in MODES if mode != "perturbation" or world == 2]
    return {
        "adamw, alone": adamw_step(workload, ddp=False),
        "zo, alone": zo_step(workload, None),
        "adamw, ddp": adamw_step(workload, ddp=True),
        **{f"zo, {mode}": zo_step(workload, f"{mode}={world}") for mode in modes},
        "meeting": lambda: exchange.everywhere(0.0),
    }


def worker(args: argparse.Namespace, folder: str, rank: int, world: int) -> None:
    """One rank: a line of input names a case and a number of steps, a line of output has the seconds of each."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ready = cases(args, world)
    print(json.dumps(list(ready)), flush=True)
    for line in sys.stdin:
        name, steps = json.loads(line)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            ready[name]()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)
    dist.destroy_process_group()


class Ranks:
    """Processes in the namespaces of a line, that all do what they are told."""

    def __init__(self, line: DelayLine, args: argparse.Namespace, own: Sequence[str], folder: str) -> None:
        world, cores = len(line.namespaces), sorted(os.sched_getaffinity(0))
        bound = len(cores) > world
        environ = {**environment_of(args), "GLOO_SOCKET_IFNAME": DEVICE}
        self.processes = []
        for rank in range(world):
            command = [sys.executable, __file__, *own, "--worker", folder, str(rank), str(world)]
            place = ["taskset", "-c", str(cores[rank])] if bound else []
            self.processes.append(
                subprocess.Popen(line.command(rank, [*place, *command]), env=environ, stdin=-1, stdout=-1, text=True, bufsize=1)
            )
        if bound:
            os.sched_setaffinity(0, cores[world:])  # the line has cores of its own
        self.cases = self._answers()[0]

    def run(self, case: str, steps: int) -> list[float]:
        """Seconds of each step: of the rank that took longest."""
        for process in self.processes:
            print(json.dumps([case, steps]), file=process.stdin, flush=True)
        return [max(one) for one in zip(*self._answers(), strict=True)]

    def _answers(self) -> list[Any]:
        lines = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        if not all(lines):
            raise RuntimeError("A rank ended; it said why above.")
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def measure(args: argparse.Namespace, own: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each network and case."""
    networks = [(0.0, math.inf), *((delay, limit) for limit in args.mbits for delay in args.delays)]
    seconds: dict[tuple[float, float, str], list[float]] = {}
    sent: dict[tuple[float, float, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, DelayLine(args.ranks) as line:
        ranks = Ranks(line, args, own, folder)
        try:
            for case in ranks.cases:
                ranks.run(case, 2)  # kernels are compiled
            for turn in range(args.rounds):
                for delay, limit in networks:
                    line.delay, line.bandwidth = delay / 1e3, limit * 1e6 / 8
                    for case in ranks.cases[turn % len(ranks.cases) :] + ranks.cases[: turn % len(ranks.cases)]:
                        ranks.run(case, 1)
                        before = sum(line.bytes)
                        seconds.setdefault((delay, limit, case), []).extend(ranks.run(case, args.steps))
                        sent.setdefault((delay, limit, case), []).append((sum(line.bytes) - before) / args.steps / args.ranks)
                    print(f"round {turn + 1} of {args.rounds}: {delay:g} ms, {limit:g} Mbit/s", file=sys.stderr, flush=True)
        finally:
            ranks.stop()
    least = {place: min(times) for place, times in seconds.items()}
    return [
        {
            "delay_ms": delay,
            "mbits": None if limit == math.inf else limit,
            "case": case,
            "seconds_a_step": round(least[delay, limit, case], 5),
            "median_and_most": [round(statistics.median(times), 5), round(max(times), 5)],
            "lost_seconds": round(least[delay, limit, case] - least[delay, limit, ALONE[case]], 5) if case in ALONE else None,
            "bytes_a_step_and_rank": round(statistics.median(sent[delay, limit, case])),
        }
        for (delay, limit, case), times in seconds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds a step, a line for each network."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    lines = [f"{'delay, bandwidth':26}" + "".join(f"{name:>18}" for name in names)]
    for delay, limit in dict.fromkeys((row["delay_ms"], row["mbits"]) for row in rows):
        times = {row["case"]: row["seconds_a_step"] for row in rows if (row["delay_ms"], row["mbits"]) == (delay, limit)}
        network = f"{delay:g} ms, {'no limit' if limit is None else f'{limit:g} Mbit/s'}"
        lines.append(f"{network:26}" + "".join(f"{1e3 * times[name]:18.1f}" for name in names))
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run on every network, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload(parser)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 10, 20, 50, 100], metavar="MS", help="one way")
    parser.add_argument("--mbits", type=float, nargs="+", default=[1000, 100], help="what a rank can send a second")
    parser.add_argument("--steps", type=int, default=2, help="of a case on a network in a round; one more goes before them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    check_workload(parser, args)
    if args.worker is not None:
        worker(args, args.worker[0], int(args.worker[1]), int(args.worker[2]))
        return []
    if (reason := unavailable()) is not None:
        print(f"SKIPPED: {reason}.")
        return []
    rows = measure(args, sys.argv[1:] if given is None else list(given))
    print(f"Milliseconds a step, {args.ranks} ranks")
    print(table(rows))
    options = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    extra = {"workload": describe(build(args), args), "congestion_control": control}
    write(args.json, {"environment": environment("cpu"), "options": options, **extra, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
