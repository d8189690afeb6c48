"""examples/rankings.py with its scripted judge and with a person who types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *arguments: str, typed: str = "") -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ZO_LIGHTNING_COMPILE": "0"}
    command = [sys.executable, str(ROOT / "examples" / "rankings.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, input=typed, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_judges_colours_are_found(tmp_path: Path) -> None:
    said = run(tmp_path)
    before, after = (float(found) for found in re.findall(r", (0\.\d{3})\b", said))
    assert after < before / 3


def test_a_person_is_asked_again_until_the_answer_is_an_order(tmp_path: Path) -> None:
    said = run(tmp_path, "--ask", "terminal", "--steps", "2", typed="3 1 0 2\n1 1 2 3\n0 1 2 3\n")
    assert re.search(r"\[3\] sky #[0-9a-f]{6}, grass", said)
    assert said.count("must be an order of the 4 outputs") == 1
    assert "After 2 orders of 4" in said
