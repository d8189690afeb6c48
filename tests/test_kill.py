"""SIGKILL in the middle of everything: the short form of benchmarks/kill_resume.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL"), pytest.mark.xdist_group("kill")]
ROOT = Path(__file__).parent.parent

WITHOUT_RECALL = """
import sys
sys.path.insert(0, "benchmarks")
from zo_lightning.callbacks import TrajectoryLog
from zo_lightning.engine.trajectory import Trajectory
begin = Trajectory.begin
Trajectory.begin = lambda self, optimizer, resume="auto": begin(self, optimizer, False)
TrajectoryLog.checkpoints = lambda self, root, max_steps: []
import kill_resume
result = kill_resume.main(sys.argv[1:])
sys.exit(any(row["different"] for row in result["hosts"].values()))
"""

TWICE = """
import sys
sys.path.insert(0, "benchmarks")
from zo_lightning.engine.offload.ahead import Ahead
Ahead.has = lambda self, parcel, due: False
import kill_resume
result = kill_resume.main(sys.argv[1:])
sys.exit(any(row["different"] for row in result["hosts"].values()))
"""


def harness(tmp_path: Path, *arguments: str, code: str | None = None) -> tuple[int, dict[str, Any]]:
    """Its exit status and what it measured."""
    result = tmp_path / "result.json"
    start = [str(ROOT / "benchmarks" / "kill_resume.py")] if code is None else ["-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ZO_LIGHTNING_COMPILE": "0"}
    command = [sys.executable, *start, *arguments, "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.exists(), done.stdout + done.stderr
    measured: dict[str, Any] = json.loads(result.read_text())
    return done.returncode, measured


@pytest.mark.parametrize(
    "arguments",
    [
        ("--kills", "3"),
        ("--kills", "2", "--logs", "--seed", "1"),
        ("--kills", "2", "--weights", "inplace", "--dtype", "bfloat16", "--seed", "2", "--places", "update", "record", "forward"),
    ],
    ids=["plain", "logged values", "bfloat16 in place"],
)
def test_killed_runs_end_as_the_whole_one(arguments: tuple[str, ...], tmp_path: Path) -> None:
    status, measured = harness(tmp_path, *arguments)
    assert (status, set(measured["hosts"])) == (0, {"lightning", "hf"})
    for row in measured["hosts"].values():
        assert sum(row["kills"].values()) >= int(arguments[1])
        assert row["different"] == []
        assert "--places" not in arguments or "any time" not in row["kills"]


@pytest.mark.parametrize("variant", ["masked", "stamps alone"])
def test_killed_runs_with_weights_in_files_end_as_the_exact_one(variant: str, tmp_path: Path) -> None:
    status, measured = harness(tmp_path, "--weights", "offload", "--kills", "4", "--seed", "3", "--variants", variant)
    assert (status, set(measured["hosts"])) == (0, {f"lightning, {variant}", f"hf, {variant}"})
    for row in measured["hosts"].values():
        assert row["different"] == []
        assert row["starts"]["from stamps"] > 0
        assert variant == "masked" or row["starts"]["from stamps alone"] == row["starts"]["from stamps"]


def test_the_harness_sees_changes_that_are_made_twice(tmp_path: Path) -> None:
    places = ("--places", "flush", "stamp")
    variant = ("--weights", "offload", "--variants", "stamps alone")
    status, measured = harness(tmp_path, "--hosts", "hf", "--kills", "3", *variant, *places, code=TWICE)
    assert status == 1
    assert measured["hosts"]["hf, stamps alone"]["different"]


def test_the_harness_sees_runs_that_forget_their_steps(tmp_path: Path) -> None:
    status, measured = harness(tmp_path, "--hosts", "lightning", "--kills", "1", "--places", "update", code=WITHOUT_RECALL)
    assert status == 1
    assert measured["hosts"]["lightning"]["different"]
