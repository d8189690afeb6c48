"""Two processes of either host with one step log: cut off, begun again with other weights, and equal to the whole run on both ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_tools import equal
from ranks import run_launched, run_starter

from zo_lightning.engine.trajectory import load_base, read_log, verify

pytestmark = pytest.mark.slow


def lightning(folder: Path, *options: object) -> None:
    """The strategy starts the second rank itself."""
    run_starter("log_worker.py", folder, *options)


def hf(folder: Path, *options: object) -> None:
    """Two processes as torchrun starts them."""
    run_launched("hf_log_worker.py", folder, *options, PYTHONWARNINGS="ignore")


def ends(start: Callable[..., None], folder: Path, weights: str, save: int, cut: int = -1, seed: int = 1) -> list[dict[str, Any]]:
    """What both ranks end with; nothing where they were cut off."""
    folder.mkdir(exist_ok=True)
    start(folder, weights, save, cut, seed)
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


@pytest.mark.parametrize(("weights", "save"), [("exact", 0), ("inplace", 5)])
@pytest.mark.parametrize("start", [lightning, hf])
def test_both_ranks_end_as_in_the_whole_run(start: Callable[..., None], weights: str, save: int, tmp_path: Path) -> None:
    whole = ends(start, tmp_path / "whole", weights, save)
    assert len(whole) == 2
    assert equal(whole[0]["weights"], whole[1]["weights"])
    assert ends(start, tmp_path / "run", weights, save, cut=3) == []
    assert ends(start, tmp_path / "run", weights, save, cut=9, seed=20) == []
    assert read_log(tmp_path / "run" / "trajectory.zolog").end_step == 9
    again = ends(start, tmp_path / "run", weights, save, seed=40)
    assert whole[0]["steps"] == 12
    assert equal(again, whole)
    assert equal(again[0]["weights"], again[1]["weights"])
    log = read_log(tmp_path / "run" / "trajectory.zolog")
    assert verify(load_base(tmp_path / "run" / str(log.segments[0].base)), log).ok
