"""examples/generated_answers.py learns from exact match alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "generated_answers.py"


def test_answers_become_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--output_dir", str(tmp_path), "--max_steps", "40", "--disable_tqdm", "True"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("exact match"))
    found = {
        name: float(value) for name, value in re.findall(r"(held out before|trained before|held out after|trained after) (\d+) %", line)
    }
    assert found["trained before"] < 40
    assert found["trained after"] >= found["trained before"] + 10
