"""What examples/generated_answers.py learns from the exact match of generated answers alone, by seed.

python benchmarks/generation_learning.py --json benchmarks/results/generation_learning.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from measure import environment, write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from generated_answers import DEFAULTS, ScriptArguments, run

from zo_lightning.hf_integration import ZOConfig


def main() -> None:
    """One run for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=DEFAULTS["max_steps"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            given = {**DEFAULTS, "max_steps": options.steps, "disable_tqdm": True}
            runs.append({"seed": seed, **run(ScriptArguments(), ZOConfig(folder, seed=seed, **given))})
        print(runs[-1], flush=True)
    settings = {**DEFAULTS, "max_steps": options.steps}
    write(options.json, {"environment": environment("cpu"), "settings": settings, "exact match, %": runs})


if __name__ == "__main__":
    main()
