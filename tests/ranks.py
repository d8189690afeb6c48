"""Processes that tests start: the ranks of a run, which end together, and whose output is shown where one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 900.0
"""Seconds in which everything ends, kernels that are compiled from nothing on two busy cores included."""


def run_ranks(script: str, folder: Path, *arguments: object, world: int, options: Sequence[str] = ()) -> None:
    """`python [options] script folder rank [arguments]`, for each rank."""
    together([([*options, str(HERE / script), str(folder), str(rank), *map(str, arguments)], {}) for rank in range(world)])


def run_launched(script: str, *arguments: object, world: int = 2, options: Sequence[str] = (), **environment: str) -> None:
    """`python [options] script [arguments]` on each rank, in the environment that torchrun would give it."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    command = [*options, str(HERE / script), *map(str, arguments)]
    together([(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}) for rank in range(world)])


def run_starter(script: str, *arguments: object) -> None:
    """`python script [arguments]`, which starts its other ranks itself, as Lightning does."""
    together([([str(HERE / script), *map(str, arguments)], {"PYTHONWARNINGS": "ignore"})])


def together(runs: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
    """Python with these arguments and variables, all at once; AssertionError with what was written where one fails."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    processes = [
        subprocess.Popen([sys.executable, *arguments], env={**common, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for arguments, more in runs
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=TIMEOUT)[0])
    finally:
        for process in processes:  # none is left to be found by a later test, as a warning
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
