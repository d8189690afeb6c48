"""Blocks streamed from the CPU's memory to a GPU, beside the same model on the GPU: peak memory and step time, for the shapes of OPT.

python benchmarks/offload_gpu.py --json benchmarks/results/offload_gpu.json     OPT-1.3B, 6.7B and 13B in bfloat16, where there is a GPU
python benchmarks/offload_gpu.py --shapes 30b --no-resident                     the peak alone, where the GPU has no room for the model
python benchmarks/offload_gpu.py --device cpu --hidden 64 --layers 3 --batch 2 --length 16 --rounds 1     a short one, without a GPU

Weights are random. The peak is torch's, over the construction, `--steps` steps and nothing else on the GPU; beside it stands what ZO2
(2503.12668) reports for the shape. Then both take turns, and their losses must be equal. With `--device cpu` the same code runs, but
for the peak, and its times say nothing: it copies blocks from memory to memory.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import environment, interleaved, peak_bytes, stamps, write
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.residency import Offload, Offloaded

SHAPES = {"1.3b": (2048, 24, 32), "6.7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56)}
"""Hidden size, layers, heads."""
ZO2_GB = {"1.3b": 3.75, "6.7b": 4.99, "13b": 6.18, "30b": 8.86}
TILE = (1 << 22) - 3


def model_of(shape: tuple[int, int, int], vocabulary: int, dtype: torch.dtype, length: int) -> Any:
    """On the CPU, a tensor at a time: never more than the model."""
    hidden, layers, heads = shape
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        word_embed_proj_dim=hidden,
        max_position_embeddings=max(2048, length),
        use_cache=False,
        dropout=0.0,
    )
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    drawn = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for owner in model.modules():
        for name, weight in list(owner._parameters.items()):
            if weight is None:
                continue
            filled = torch.zeros(weight.shape, dtype=dtype)
            if weight.dim() > 1:
                for piece in filled.view(-1).split(TILE):
                    piece.copy_(drawn[: len(piece)])
            elif isinstance(owner, nn.LayerNorm) and name == "weight":
                filled.fill_(1)
            owner._parameters[name] = nn.Parameter(filled)
    model.tie_weights()
    return model.train()


class Run:
    """A model that makes steps, resident or streamed."""

    def __init__(self, shape: tuple[int, int, int], options: argparse.Namespace, batch: tuple[int, int], weights: Any) -> None:
        device = torch.device(options.device)
        self.model = model_of(shape, options.vocabulary, getattr(torch, options.dtype), batch[1])
        if weights == "exact":
            self.model.to(device)
        self.optimizer = ZOOptimizer(self.model, lr=1e-6, weights=weights)
        self.ids = torch.randint(0, self.model.config.vocab_size, batch, generator=torch.Generator().manual_seed(1)).to(device)
        self.losses: list[float] = []

    def step(self) -> None:
        """One step."""
        loss = self.optimizer.step(lambda: self.model(input_ids=self.ids, labels=self.ids).loss)
        self.losses.append(float(loss))  # type: ignore[arg-type]


def measured(name: str, shape: tuple[int, int, int], batch: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """One shape and one batch."""
    offload = Offload(options.folder, options.tier, options.device)
    runs: dict[str, Run] = {}

    def first() -> None:
        """From the construction on, nothing else being on the GPU."""
        runs["offload"] = Run(shape, options, batch, offload)
        for _ in range(options.steps):
            runs["offload"].step()

    peak: int | None = None
    kept: int | None = None
    if options.device.startswith("cuda"):
        peak, kept = peak_bytes(first, options.device)
    else:
        first()
    streamed = runs["offload"]
    found: dict[str, Any] = {
        "shape": name,
        "batch": list(batch),
        "model_bytes": sum(p.nbytes for p in streamed.model.parameters()),
        "peak_bytes": peak,
        "kept_bytes": kept,
        "zo2_bytes": int(ZO2_GB[name] * 1e9) if name in ZO2_GB else None,
    }
    residency = streamed.optimizer.residency
    if not isinstance(residency, Offloaded):
        raise TypeError(f"The run that streams has its weights in {type(residency).__name__}.")
    if options.resident:
        runs["resident"] = Run(shape, options, batch, "exact")
        for _ in range(options.steps):
            runs["resident"].step()
    moved, made = dict(vars(residency.traffic)), len(streamed.losses)
    seconds = interleaved({kind: stamps(run.step, options.device) for kind, run in runs.items()}, options.rounds, options.steps)
    made = len(streamed.losses) - made
    found["median_seconds"] = {kind: median(values) for kind, values in seconds.items()}
    found["per_step"] = {what: (value - moved[what]) / made for what, value in vars(residency.traffic).items()}
    if options.resident:
        found["over_resident"] = found["median_seconds"]["offload"] / found["median_seconds"]["resident"]
        found["equal_losses"] = streamed.losses == runs["resident"].losses
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Print all of it; `--json` writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the same code")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["1.3b", "6.7b", "13b"])
    parser.add_argument("--hidden", type=int, default=None, help="a shape of your own, with 64 a head, instead of --shapes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=50272)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, nargs="*", default=[512, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tier", choices=("memory", "disk"), default="memory")
    parser.add_argument("--folder", default=None, help="of tier disk; None is a temporary one")
    parser.add_argument("--threads", type=int, default=None, help="of torch on the CPU")
    parser.add_argument("--no-resident", dest="resident", action="store_false")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here. --device cpu --hidden 64 --layers 3 runs the same code.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shapes = {name: SHAPES[name] for name in options.shapes}
    if options.hidden is not None:
        shapes = {f"hidden {options.hidden}": (options.hidden, options.layers, max(1, options.hidden // 64))}
    rows = []
    for name, shape in shapes.items():
        for length in options.length:
            rows.append(measured(name, shape, (options.batch, length), options))
            print(*(f"{what} {value}" for what, value in rows[-1].items()), sep="\n    ")
            gc.collect()
    result = {
        "environment": environment(options.device),
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "folder")},
        "rows": rows,
    }
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
