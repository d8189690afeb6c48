"""What zo_lightning.plan predicts beside what a process takes: peak resident memory (VmHWM) of exact weights and of weights from disk.

python benchmarks/plan_accuracy.py --json benchmarks/results/plan_accuracy.json
python benchmarks/plan_accuracy.py --only llama --layers 2 --batch 2         a short one

Each row is a process of its own: it imports what a run imports (that is measured there, and given to the plan), makes or opens the model
and trains some steps. The plan has seen the configuration alone. `--fixed-malloc` adds runs with MALLOC_MMAP_THRESHOLD_=1000000, with which
glibc's malloc gives the memory of every large tensor back: they show what of a difference is malloc's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from measure import environment, write
from safetensors.torch import save_file
from transformers import PretrainedConfig

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.offload import open_weights
from zo_lightning.engine.residency import Exact, Offload, Offloaded
from zo_lightning.planning import Machine, Plan, plan
from zo_lightning.planning.machine import resident_bytes
from zo_lightning.planning.models import DTYPES, build, configuration, quiet

SHAPES = {
    "opt": ("causal-lm", "hidden_size=1024 word_embed_proj_dim=1024 ffn_dim=4096 num_attention_heads=16", "num_hidden_layers"),
    "llama": ("causal-lm", "hidden_size=1024 intermediate_size=2816 num_attention_heads=16 use_cache=False", "num_hidden_layers"),
    "t5": ("seq2seq-lm", "d_model=1024 d_ff=4096 num_heads=16", "num_layers"),
    "bert": ("classification", "hidden_size=1024 intermediate_size=4096 num_attention_heads=16", "num_hidden_layers"),
}
MODES = {"exact": "exact", "offload (disk)": "offload"}


def config_of(kind: str, layers: int) -> PretrainedConfig:
    """A shape with a vocabulary of 8,192, so that blocks are most of it."""
    changes, count = SHAPES[kind][1].split(), SHAPES[kind][2]
    config: PretrainedConfig = configuration(kind, [*changes, f"{count}={layers}", "vocab_size=8192"])
    return config


def peak_resident() -> int:
    """VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def write_shards(kind: str, layers: int, dtype: torch.dtype, folder: Path) -> None:
    """Random weights, 16 tensors a file."""
    model = build(config_of(kind, layers), 1, 8, SHAPES[kind][0], dtype).model
    named = list(model.named_parameters())
    for start in range(0, len(named), 16):
        some = {name: (torch.randn(p.shape) * 0.02).to(dtype) for name, p in named[start : start + 16]}
        save_file(some, folder / f"{start:05d}.safetensors")


def worker(options: argparse.Namespace) -> None:
    """One row: print what the process took."""
    kind, mode, dtype, layers, folder = options.worker
    layers, task, weights_dtype = int(layers), SHAPES[kind][0], DTYPES[dtype]
    planned = build(config_of(kind, layers), options.batch, options.length, task, weights_dtype)
    imported = resident_bytes()
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.randint(3 if given.dim() > 1 else 0, 8192 if given.dim() > 1 else 2, given.shape, generator=generator)
        for name, given in planned.inputs.items()
    }
    config, weights = planned.model.config, "exact" if mode == "exact" else Offload(str(Path(folder) / "slots"))
    kinds = type(planned.model)
    torch.set_default_dtype(weights_dtype)
    if mode == "exact":
        model = kinds(config).train()
    else:
        with init_empty_weights():
            model = kinds(config).train()
        open_weights(model, folder)
    torch.set_default_dtype(torch.float32)
    del planned
    gc.collect()
    made = peak_resident()
    optimizer = ZOOptimizer(model, lr=1e-6, weights=weights)
    for _ in range(options.steps):
        optimizer.step(lambda: model(**inputs).loss)
    residency, moved = optimizer.residency, {}
    if isinstance(residency, Offloaded):
        before = dict(vars(residency.traffic))
        optimizer.step(lambda: model(**inputs).loss)
        moved = {name: value - before[name] for name, value in vars(residency.traffic).items()}
    scratch = residency.scratch_bytes() if isinstance(residency, Exact) else 0
    print(json.dumps({"imported": imported, "made": made, "peak": peak_resident(), "traffic": moved, "scratch": scratch}), flush=True)


def measured(
    kind: str, mode: str, dtype: str, layers: int, options: argparse.Namespace, folder: str, fixed: bool = False
) -> dict[str, Any]:
    """What a process of its own took."""
    given = ["--batch", str(options.batch), "--length", str(options.length), "--steps", str(options.steps)]
    command = [sys.executable, __file__, *given, "--worker", kind, mode, dtype, str(layers), folder]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if fixed else {}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **malloc}, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def predicted(kind: str, dtype: str, layers: int, options: argparse.Namespace, process: int) -> Plan:
    """What the configuration says."""
    made = build(config_of(kind, layers), options.batch, options.length, SHAPES[kind][0], DTYPES[dtype])
    machine = Machine("cpu", None, flops=1e11, process=process, process_source="measured")
    return plan(made.model, made.inputs, made.forward, machine)


def row(kind: str, mode: str, dtype: str, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """One shape in one mode: predicted, measured, and the error."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if mode != "exact":
            write_shards(kind, layers, DTYPES[dtype], Path(folder))
        found = measured(kind, MODES[mode], dtype, layers, options, folder)
    fixed = None
    if options.fixed_malloc:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            if mode != "exact":
                write_shards(kind, layers, DTYPES[dtype], Path(folder))
            fixed = measured(kind, MODES[mode], dtype, layers, options, folder, fixed=True)
    expected = predicted(kind, dtype, layers, options, found["imported"])
    chosen = next(one for one in expected.modes if one.name == mode)
    return {
        "shape": kind,
        "layers": layers,
        "dtype": dtype,
        "mode": mode,
        "model_bytes": expected.weights,
        "predicted_bytes": chosen.peak,
        "measured_bytes": found["peak"],
        "error": chosen.peak / found["peak"] - 1,
        "parts": chosen.memory,
        "before_training_bytes": found["made"],
        "fixed_malloc": None
        if fixed is None
        else {
            "predicted_bytes": (without := chosen.peak - chosen.memory.get("kept by malloc", 0)),
            "measured_bytes": fixed["peak"],
            "error": without / fixed["peak"] - 1,
        },
        "predicted_traffic": {"read": chosen.read, "written": chosen.written},
        "measured_traffic": {name: found["traffic"].get(name, 0) for name in ("read", "written")},
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print a table; `--json` writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--dtypes", choices=DTYPES, nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--modes", choices=MODES, nargs="*", default=list(MODES))
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder together")
    parser.add_argument("--large", type=int, default=62, help="layers of one more row, a Llama in float32 from disk; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None, help="torch's intra-op threads, also of the processes that are measured")
    parser.add_argument("--fixed-malloc", action="store_true", help="also runs in which malloc gives back all large tensors")
    parser.add_argument("--folder", default=None, help="of the files; None is the system's temporary folder")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", nargs=5, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    quiet()
    if options.worker:
        worker(options)
        return []
    asked = [
        (kind, mode, dtype, options.layers // 2 if kind == "t5" else options.layers)
        for kind in options.only
        for dtype in options.dtypes
        for mode in options.modes
    ]
    asked += [("llama", "offload (disk)", "float32", options.large)] if options.large else []
    rows = []
    for kind, mode, dtype, layers in asked:
        one = row(kind, mode, dtype, layers, options)
        rows.append(one)
        said = f"{kind:6} {layers:3} {dtype:9} {mode:15} predicted {one['predicted_bytes'] / 1e9:.3f} GB, measured"
        fixed = one["fixed_malloc"]
        beside = "" if fixed is None else f"; malloc fixed {fixed['measured_bytes'] / 1e9:.3f} GB ({fixed['error']:+.1%})"
        print(f"{said} {one['measured_bytes'] / 1e9:.3f} GB ({one['error']:+.1%}){beside}", flush=True)
        kept = {name: value for name, value in vars(options).items() if name not in ("json", "worker", "folder")}
        write(options.json, {"environment": environment("cpu"), "options": kept, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
