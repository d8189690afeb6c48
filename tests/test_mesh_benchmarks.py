"""The benchmarks of several processes, at their smallest: what they say of equality, bytes and ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def measured(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that a benchmark writes."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--json", str(folder / "result.json"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ZO_LIGHTNING_COMPILE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((folder / "result.json").read_text()))


def test_modes_are_compared(tmp_path: Path) -> None:
    rows = measured("mesh_equal.py", tmp_path, "--hosts", "engine", "--worlds", "2", "--steps", "4")["rows"]
    data, sides, seeds = rows
    assert [row["mode"] for row in rows] == ["data=2", "perturbation=2", "seeds=2"]
    assert all(row["ranks_equal"] and row["largest_change"] > 0 for row in rows)
    assert sides["bits_of_one_process"]
    assert data["largest_difference"] < 1e-6
    assert "bits_of_one_process" not in seeds
    assert all(0 < row["bytes_a_step_and_rank"] == row["bytes_of_a_wide_model"] <= 64 * row["queries"] for row in rows)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="binds two processes to cores")
def test_ratios_of_one_run(tmp_path: Path) -> None:
    small = (
        "--eager",
        "--layers",
        "1",
        "--width",
        "32",
        "--batch",
        "2",
        "--length",
        "8",
        "--steps",
        "1",
        "--repeats",
        "5",
    )  # of five, quartiles are values
    rows = {row["case"]: row for row in measured("mesh_speed.py", tmp_path, *small)["rows"]}
    low, middle, high = rows["perturbation=2"]["time_over_one_process"]
    assert 0 < low <= middle <= high
    queries, times = rows["seeds=2"]["times_the_queries_a_second"], rows["seeds=2"]["time_over_one_process"]
    assert queries == pytest.approx([2 / time for time in reversed(times)], rel=0.02)
