"""examples/prompted_classification.py learns its task by forward passes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "prompted_classification.py"


def test_the_prompted_model_learns(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--output_dir", str(tmp_path), "--steps", "100"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"accuracy before ([\d.]+)% after ([\d.]+)%", done.stdout)
    assert found is not None
    before, after = map(float, found.groups())
    assert before < 60
    assert after > 85
