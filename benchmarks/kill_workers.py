"""SIGKILL of workers under torchrun, at random instants: the job goes on from the step log, and no step is lost.

python benchmarks/kill_workers.py --kills 20 --json benchmarks/results/kill_workers.json
python benchmarks/kill_workers.py --kills 3 --parallel data=2,perturbation=2
python benchmarks/kill_workers.py --leave --kills 3 --json benchmarks/results/kill_workers_leave.json

Without --leave one torchrun has four workers. It notices the death of one, ends the others and starts all of them anew; each begins
where the log ends. The run must have the bits of one that was left alone, on all ranks, and the log every step once.

With --leave there are four torchruns of one worker each, as on four machines, in a job of 2 to 4 nodes. One of them is killed with its
worker, never the first, which keeps torchrun's own store: the others go on without it, at the next step of the log. Then another one
joins. The number of ranks changes the losses, so that no other run has the same bits: all ranks must have those of the log, replayed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ZO_LIGHTNING_COMPILE", "0")  # a compiler would have to be started again by every process
os.environ["OMP_NUM_THREADS"] = "1"
# workers of a restart would find the addresses of the workers before them in the store that they share with torchrun (PyTorch issue 135712)
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

import torch
import torch.distributed as dist
from measure import environment, write
from torch import Tensor, nn

from zo_lightning.engine import SPSA, Processes, ZOOptimizer
from zo_lightning.engine.parallel import broadcast_parameters
from zo_lightning.engine.trajectory import Trajectory, load_base, read_log, verify
from zo_lightning.engine.trajectory.comparing import NAME

PAUSE = 0.005
"""Seconds that a forward pass takes longer, so that there is time to be killed."""


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def worker(folder: Path, parallel: str, steps: int) -> None:
    """An ordinary loop of one process."""
    dist.init_process_group("gloo")
    exchange = Processes(parallel or None)
    model = model_of(int(time.time()) if (folder / "run").exists() else 0)  # who comes later has other weights: the log's base brings them
    broadcast_parameters(list(model.parameters()))
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-2, estimator=SPSA(2))
    optimizer.exchange = exchange
    log = Trajectory(folder / "run")
    log.begin(optimizer)
    if exchange.rank == 0:
        (folder / "starts" / f"{time.time_ns()}.{optimizer.steps + log.behind}.{exchange.world_size}").touch()
    (folder / "alive" / f"{os.getpid()}.{os.getppid()}").touch()
    while optimizer.steps < steps:
        draw = torch.Generator().manual_seed(1000 * optimizer.steps + exchange.stream)
        x, y = torch.randn(8, 12, generator=draw), torch.randint(0, 3, (8,), generator=draw)

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            time.sleep(PAUSE)
            return nn.functional.cross_entropy(model(x), y)

        optimizer.step(loss, batch=(x, y))
    exchange.leave()
    log.end(optimizer)
    log.close(optimizer)
    torch.save(model.state_dict(), folder / f"end.{exchange.rank}.pt")
    dist.destroy_process_group()


class Job:
    """torchrun, or several of them, with their workers."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        (folder / "alive").mkdir(parents=True)
        (folder / "starts").mkdir()
        self.folder, self._args = folder, args
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        self.agents = [self._agent(host=number == 0) for number in range(args.workers if args.leave else 1)]

    def _agent(self, host: bool = False) -> subprocess.Popen[bytes]:
        args = self._args
        command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", f"--max-restarts={10 * args.kills + 3}"]
        if args.leave:
            command += [f"--nnodes=2:{args.workers}", "--nproc-per-node=1", "--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
            command += [
                f"--rdzv-endpoint={self._endpoint}",
                f"--rdzv-conf=is_host={host},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2",
            ]
        else:
            command += ["--standalone", f"--nproc-per-node={args.workers}"]
        command += [__file__, "--worker", str(self.folder), "" if args.leave else args.parallel, str(args.steps)]
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def over(self) -> bool:
        """Whether the first torchrun ended."""
        return self.agents[0].poll() is not None

    def living(self) -> list[tuple[int, int]]:
        """(worker, its torchrun) of those that train."""
        pairs = [tuple(map(int, name.name.split("."))) for name in (self.folder / "alive").iterdir()]
        return [(pid, agent) for pid, agent in pairs if running(pid)]

    def wait_for(self, workers: int, before: Sequence[tuple[int, int]] = (), seconds: float = 180) -> None:
        """Until so many train that did not `before`, or the job is over. RuntimeError if that never happens."""
        end = time.monotonic() + seconds
        while len(set(self.living()) - set(before)) != workers and not self.over():
            if time.monotonic() > end:
                raise RuntimeError(f"{len(self.living())} workers, not {workers}:\n{self.said()}")
            time.sleep(0.05)

    def kill(self, choose: random.Random) -> None:
        """One worker; with --leave its torchrun as well, and wait until the others go on and another one has joined."""
        living = self.living()
        if not self._args.leave:
            os.kill(choose.choice(living)[0], signal.SIGKILL)
            time.sleep(0.5)
            return
        pid, agent = choose.choice([pair for pair in living if pair[1] != self.agents[0].pid])
        os.kill(agent, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        for dead in [one for one in self.agents if one.pid == agent]:
            dead.wait()
            self.agents.remove(dead)
        self.wait_for(self._args.workers - 1, living)
        time.sleep(choose.uniform(0.5, self._args.longest))
        self.agents.append(self._agent())

    def finish(self) -> None:
        """RuntimeError, with what it said, where the job failed."""
        if self.agents[0].wait(timeout=600):
            raise RuntimeError(self.said())
        for agent in self.agents[1:]:  # the store has gone with the first one, so that their exit status tells nothing
            try:
                agent.wait(timeout=30)
            except subprocess.TimeoutExpired:
                agent.kill()  # it came too late to join

    def said(self) -> str:
        return (self.folder / "output").read_text()[-6000:]

    def stop(self) -> None:
        for agent in self.agents:
            agent.kill()
        for pid, _ in self.living():
            os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    """Whether a process exists and has not been killed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def steps_of(folder: Path) -> int:
    """How many the log has."""
    try:
        return len(read_log(folder / "run" / NAME).steps)
    except (OSError, ValueError):
        return 0


def run(folder: Path, args: argparse.Namespace, kills: int) -> list[int]:
    """A whole job; the steps that the log had at each kill."""
    job, choose, at = Job(folder, args), random.Random(args.seed), list[int]()
    try:
        while len(at) < kills:
            job.wait_for(args.workers)
            time.sleep(choose.uniform(0.0, args.longest))
            if job.over() or len(job.living()) < args.workers:
                break
            at.append(steps_of(folder))
            job.kill(choose)
            print(f"  killed at {at[-1]} steps", flush=True)
        job.finish()
    finally:
        job.stop()
    return at


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Kill, and compare."""
    began = time.time()
    at = run(root / "killed", args, args.kills)
    log = read_log(root / "killed" / "run" / NAME)
    ends = [torch.load(path) for path in sorted((root / "killed").glob("end.*.pt"))]
    if args.leave:
        expected = load_base(root / "killed" / "run" / str(log.segments[0].base))
        checked = verify(expected, log)
        if checked.problem:
            print(checked.problem)
    else:
        run(root / "left alone", args, 0)
        expected = torch.load(root / "left alone" / "end.0.pt")
    starts = [tuple(map(int, path.name.split("."))) for path in sorted((root / "killed" / "starts").iterdir())]
    return {
        "kills": len(at),
        "at_steps": at,
        "ranks_at_the_end": len(ends),
        "ranks_from_step": [(step, ranks) for _, step, ranks in starts],
        "same_bits": all(torch.equal(end[name], expected[name]) for end in ends for name in expected),
        "every_step_once": [record.step for record in log.steps] == list(range(args.steps)),
        "seconds": round(time.time() - began),
    }


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--parallel", default="data=4")
    parser.add_argument("--leave", action="store_true", help="whole torchruns are killed, and others join")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds between a start and the kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default=None)
    args = parser.parse_args(given)
    if args.worker is not None:
        worker(Path(args.worker[0]), args.worker[1], int(args.worker[2]))
        return {}
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), args)
    print(f"{result['kills']} kills, with {result['at_steps']} steps in the log; ranks from step on: {result['ranks_from_step']}")
    print(f"bits {'as they should be on all ranks' if result['same_bits'] else 'DIFFER'}; ", end="")
    print(f"{'every step once in the log' if result['every_step_once'] else 'STEPS ARE MISSING IN THE LOG'}; {result['seconds']} s")
    if args.json:
        options = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}
        write(Path(args.json), {"environment": environment("cpu"), "options": options, "result": result})
    return result


if __name__ == "__main__":
    main()
