"""torchrun's restarts: a worker, or a whole torchrun with its worker, is killed, and the job goes on from the step log (benchmarks/)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")]


def harness(folder: Path, *arguments: str) -> dict[str, Any]:
    """What it measured."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_workers.py"), "--json", str(folder / "result.json"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((folder / "result.json").read_text())["result"])


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    given = ("--kills", "1", "--workers", "2", "--parallel", "perturbation=2", "--steps", "120", "--longest", "0.5")
    result = harness(tmp_path, *given)
    assert result["kills"] == 1
    assert [ranks for _, ranks in result["ranks_from_step"]] == [2, 2, 2][: len(result["ranks_from_step"])]
    assert result["same_bits"]
    assert result["every_step_once"]


def test_survivors_go_on_without_a_torchrun_that_was_killed(tmp_path: Path) -> None:
    result = harness(tmp_path, "--leave", "--kills", "1", "--workers", "3", "--steps", "400", "--longest", "0.5")
    assert result["kills"] == 1
    assert [ranks for _, ranks in result["ranks_from_step"]][:2] == [3, 2]
    assert result["ranks_from_step"][1][0] >= result["at_steps"][0]
    assert result["same_bits"]
    assert result["every_step_once"]
