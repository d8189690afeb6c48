"""Two processes with one step log: cut off, begun again with other weights, and equal to the whole run on both ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_tools import equal

from zo_lightning.engine.trajectory import load_base, read_log, verify

pytestmark = pytest.mark.slow


def start(folder: Path, weights: str, save: int, cut: int = -1, seed: int = 1) -> list[dict[str, Any]]:
    """What both ranks end with; nothing where they were cut off."""
    folder.mkdir(exist_ok=True)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(here / "log_worker.py"), str(folder), weights, str(save), str(cut), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


@pytest.mark.parametrize(("weights", "save"), [("exact", 0), ("inplace", 5)])
def test_both_ranks_end_as_in_the_whole_run(weights: str, save: int, tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", weights, save)
    assert len(whole) == 2
    assert start(tmp_path / "run", weights, save, cut=3) == []
    assert start(tmp_path / "run", weights, save, cut=9, seed=20) == []
    assert read_log(tmp_path / "run" / "trajectory.zolog").end_step == 9
    again = start(tmp_path / "run", weights, save, seed=40)
    assert whole[0]["steps"] == 12
    assert equal(again, whole)
    assert equal(again[0]["weights"], again[1]["weights"]) or save == 0 or weights == "inplace"
    log = read_log(tmp_path / "run" / "trajectory.zolog")
    assert verify(load_base(tmp_path / "run" / str(log.segments[0].base)), log).ok
