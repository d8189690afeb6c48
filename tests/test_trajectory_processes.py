"""Two processes of either host with one step log: cut off, begun again with other weights, and equal to the whole run on both ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_tools import equal

from zo_lightning.engine.trajectory import load_base, read_log, verify

pytestmark = pytest.mark.slow


def run(worker: str, folder: Path, arguments: tuple[Any, ...], ranks: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What both ranks end with; nothing where they were cut off. `ranks`: the environment of each process that is started here."""
    folder.mkdir(exist_ok=True)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, str(here / worker), str(folder), *map(str, arguments)]
    processes = []
    for rank in ranks:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", **rank}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(ranks), "\n".join(outputs)
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


def lightning(folder: Path, weights: str, save: int, cut: int = -1, seed: int = 1) -> list[dict[str, Any]]:
    """The strategy starts the second rank itself."""
    return run("log_worker.py", folder, (weights, save, cut, seed), [{}])


def hf(folder: Path, weights: str, save: int, cut: int = -1, seed: int = 1) -> list[dict[str, Any]]:
    """Two processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return run("hf_log_worker.py", folder, (weights, save, cut, seed), ranks)


@pytest.mark.parametrize(("weights", "save"), [("exact", 0), ("inplace", 5)])
@pytest.mark.parametrize("start", [lightning, hf])
def test_both_ranks_end_as_in_the_whole_run(start: Callable[..., list[dict[str, Any]]], weights: str, save: int, tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", weights, save)
    assert len(whole) == 2
    assert equal(whole[0]["weights"], whole[1]["weights"])
    assert start(tmp_path / "run", weights, save, cut=3) == []
    assert start(tmp_path / "run", weights, save, cut=9, seed=20) == []
    assert read_log(tmp_path / "run" / "trajectory.zolog").end_step == 9
    again = start(tmp_path / "run", weights, save, seed=40)
    assert whole[0]["steps"] == 12
    assert equal(again, whole)
    assert equal(again[0]["weights"], again[1]["weights"])
    log = read_log(tmp_path / "run" / "trajectory.zolog")
    assert verify(load_base(tmp_path / "run" / str(log.segments[0].base)), log).ok
