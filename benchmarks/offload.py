"""A model larger than the memory it is trained in: weights streamed from disk beside the same model in memory, in one run.

python benchmarks/offload.py --json benchmarks/results/offload_disk.json
python benchmarks/offload.py --layers 4 --rounds 1            a short one

A Llama-shaped model in float32 is written as safetensors shards, a layer at a time. One process opens them with `open_weights` and trains
with `weights=Offload()`, another one loads them and trains with `weights="exact"`; they take turns, each has a process of its own, so that
its peak resident memory (VmHWM) is its own. Losses must be equal, and so must the sum of every weight tensor in the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import environment, write
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.offload import open_weights
from zo_lightning.engine.residency import Offload, Offloaded


def config_of(options: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=11 * options.hidden // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        tie_word_embeddings=False,
        use_cache=False,
    )


def on_meta(config: LlamaConfig) -> LlamaForCausalLM:
    """The model without weights, with its buffers."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def write_shards(config: LlamaConfig, folder: Path) -> None:
    """Random weights, a file for each layer and one for the rest; never more than one of them in memory."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in on_meta(config).state_dict().items():
        parts = name.split(".")
        files.setdefault(f"layer-{int(parts[2]):03d}" if parts[1] == "layers" else "rest", {})[name] = weight
    for file, weights in files.items():
        drawn = {name: torch.randn(w.shape) * 0.02 if w.dim() > 1 else torch.ones(w.shape) for name, w in weights.items()}
        save_file(drawn, folder / f"{file}.safetensors")


def peak_resident() -> int:
    """VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def worker(options: argparse.Namespace) -> None:
    """Answers "n" with n steps, and "end" with what it used."""
    imported = peak_resident()
    config, folder = config_of(options), Path(options.worker[1])
    model = on_meta(config)
    weights: Any = "exact"
    if options.worker[0] == "offload":
        open_weights(model, folder)
        weights = Offload(options.folder)
    else:
        state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        del state
    model.train()
    optimizer = ZOOptimizer(model, lr=1e-6, weights=weights)
    ids = torch.randint(0, 8192, (options.batch, options.length), generator=torch.Generator().manual_seed(1))
    losses: list[float] = []
    for line in sys.stdin:
        seconds = []
        if line.strip() == "end":
            break
        for _ in range(int(line)):
            began = time.perf_counter()
            loss = optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
            seconds.append(time.perf_counter() - began)
            losses.append(float(loss))  # type: ignore[arg-type]
        print(json.dumps(seconds), flush=True)
    residency, used = optimizer.residency, peak_resident()
    moved = vars(residency.traffic) if isinstance(residency, Offloaded) else {}
    last = [float(weight.double().sum()) for weight in model.state_dict().values()]
    print(json.dumps({"imported": imported, "peak": used, "traffic": moved, "losses": losses, "sums": last}), flush=True)


class Worker:
    """A process that makes steps when told to."""

    def __init__(self, kind: str, folder: Path, options: list[str]) -> None:
        command = [sys.executable, __file__, *options, "--worker", kind, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Any:
        """What it answers."""
        print(what, file=self.process.stdin, flush=True)
        return json.loads(next(iter(self.process.stdout or ()), "null"))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Print what both take; `--json` writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", default=None, help="of the streamed weights; None is a temporary one")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options)
        return {}
    given = [text for name in ("hidden", "layers", "batch", "length") for text in (f"--{name}", str(getattr(options, name)))]
    given += [] if options.folder is None else ["--folder", options.folder]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options)
        write_shards(config, Path(folder))
        sizes = {name: weight.nbytes for name, weight in on_meta(config).state_dict().items()}
        workers = {kind: Worker(kind, Path(folder), given) for kind in ("memory", "offload")}
        seconds: dict[str, list[float]] = {kind: [] for kind in workers}
        for turn in range(options.rounds + 1):
            for kind, process in workers.items():
                found = process.ask(str(options.steps if turn else 1))
                seconds[kind] += found if turn else []  # the first step compiles, and watches a pass
        ends = {kind: process.ask("end") for kind, process in workers.items()}
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    steps = len(ends["offload"]["losses"])
    result = {
        "environment": environment("cpu"),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "worker", "folder")},
        "model_bytes": sum(sizes.values()),
        "largest_block_bytes": block,
        "median_seconds": {kind: median(values) for kind, values in seconds.items()},
        "step_rate_over_memory": median(seconds["memory"]) / median(seconds["offload"]),
        "peak_resident_bytes": {kind: end["peak"] for kind, end in ends.items()},
        "resident_after_import_bytes": ends["offload"]["imported"],
        "allowed_bytes": 900_000_000 + 3 * block,
        "bytes_per_step": {kind: ends["offload"]["traffic"][kind] / steps for kind in ("read", "written")},
        "waited_seconds_per_step": ends["offload"]["traffic"]["waited"] / steps,
        "equal_losses": ends["memory"]["losses"] == ends["offload"]["losses"],
        "equal_weights": ends["memory"]["sums"] == ends["offload"]["sums"],
    }
    for name, value in result.items():
        if name not in ("environment", "options"):
            print(f"{name:30} {value}")
    if options.json is not None:
        write(options.json, result)
    return result


if __name__ == "__main__":
    main()
