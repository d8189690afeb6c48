"""examples/hf_text_classification.py in its offline form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "hf_text_classification.py"


@pytest.mark.parametrize(("optim", "steps", "least"), [("zo", 250, 0.8), ("adamw_torch", 40, 0.7)])
def test_the_tiny_form_learns(optim: str, steps: int, least: float, tmp_path: Path) -> None:
    options = f"--tiny --optim {optim} --learning_rate 1e-2 --zo_eps 1e-2 --max_steps {steps}".split()
    options += "--per_device_train_batch_size 32 --use_cpu --report_to none --disable_tqdm True --seed 3".split()
    command = [sys.executable, str(EXAMPLE), *options, "--output_dir", str(tmp_path), "--save_strategy", "no"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("accuracy before"))
    before, after = (float(part.split("%")[0]) / 100 for part in line.replace("accuracy before ", "").split("after "))
    assert before < 0.65
    assert after > least
