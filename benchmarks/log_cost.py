"""What the step log costs and saves: bytes and time a step, replay against training, and whether replay gives the same bits.

python benchmarks/log_cost.py --json benchmarks/results/log_cost.json
python benchmarks/log_cost.py --steps 50 --dtype bfloat16

The model has some 20 M weights. Many short steps (batch 1 x 16) are trained with a log and replayed from its base; the time of a training
step is measured at --batch x --length.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import environment, write
from torch import Tensor
from workload import Workload, add_options, build, describe

from zo_lightning import ZOOptimizer
from zo_lightning.engine.journal import Journal
from zo_lightning.engine.trajectory import Trajectory, export, load_base, replay

SHAPE = ["hidden_size=384", "ffn_dim=1536", "num_hidden_layers=6", "num_attention_heads=6", "vocab_size=24000", "word_embed_proj_dim=384"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.set_defaults(set=SHAPE)
    parser.add_argument("--weights", choices=("exact", "copy", "inplace"), default="exact")
    parser.add_argument("--steps", type=int, default=2000, help="trained with a log, and replayed")
    parser.add_argument("--timed", type=int, default=20, help="training steps that are timed, with and without a log")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def optimizer_for(workload: Workload, options: argparse.Namespace) -> ZOOptimizer:
    """Two groups, as the hosts make them: with and without weight decay."""
    named = list(workload.model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in named if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [(name, p) for name, p in named if p.dim() < 2]},
    ]
    return ZOOptimizer(groups, lr=1e-6, weights=options.weights, module=workload.model, safeguard=None)


def short(workload: Workload, step: int) -> Workload:
    """One row of 16 tokens that no other step has."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(3, int(workload.model.config.vocab_size), (1, 16), generator=draw)  # type: ignore[union-attr,arg-type]
    return Workload(workload.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def seconds_of(optimizer: ZOOptimizer, workload: Workload, count: int) -> float:
    """Median seconds of a training step without a log."""
    times = []
    for _ in range(count + 2):
        began = time.perf_counter()
        optimizer.step(workload.loss)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


class Timed(Journal):
    """A journal whose own time is taken."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.seconds = journal, 0.0

    def recall(self, step: int, updating: bool) -> Any:
        return self._timed(self.journal.recall, step, updating)

    def mask(self, optimizer: ZOOptimizer) -> None:
        self._timed(self.journal.mask, optimizer)

    def look(self, optimizer: ZOOptimizer, micro_batches: int, updating: bool) -> None:
        self._timed(self.journal.look, optimizer, micro_batches, updating)

    def append(self, record: Any) -> None:
        self._timed(self.journal.append, record)

    def remember(self, optimizer: ZOOptimizer) -> None:
        self._timed(self.journal.remember, optimizer)

    def _timed(self, function: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        self.seconds += time.perf_counter() - began
        return result


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes."""
    return tensor.detach().contiguous().view(torch.uint8)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train with a log, replay it, compare, and write JSON."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    workload = build(options)
    optimizer = optimizer_for(workload, options)
    training_ms = 1e3 * seconds_of(optimizer, workload, options.timed)
    with tempfile.TemporaryDirectory() as folder:
        log = Trajectory(folder)
        log.begin(optimizer)
        timed = Timed(log)
        optimizer.journal = timed
        first = optimizer.steps
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-6 * (1 - step / options.steps)
            optimizer.step(short(workload, step).loss)
        journal_ms = 1e3 * timed.seconds / options.steps
        log.end(optimizer)
        size = log.path.stat().st_size
        exported = Path(folder) / "steps.safetensors"
        if options.weights != "inplace":
            export(log.path, exported)
        base = load_base(next(log.folder.glob("base-*.safetensors")))
        replay(base, log.path, to_step=first + min(64, options.steps))  # compiles
        base = load_base(next(log.folder.glob("base-*.safetensors")))
        began = time.perf_counter()
        replay(base, log.path)
        replay_ms = 1e3 * (time.perf_counter() - began) / options.steps
        named = {p.name: p.tensor for p in optimizer.residency.trained}
        same = all(torch.equal(bits(tensor), bits(named[name])) for name, tensor in base.items())
        log.close(optimizer)
        result = {
            "environment": environment(options.device),
            "workload": describe(workload, options),
            "weights": options.weights,
            "steps": options.steps,
            "log_bytes_per_step": round(size / options.steps, 1),
            "export_bytes_per_step": round(exported.stat().st_size / options.steps, 1) if exported.exists() else None,
            "journal_ms_per_step": round(journal_ms, 3),
            "training_ms_per_step": round(training_ms, 2),
            "journal_share": round(journal_ms / training_ms, 4),
            "replay_ms_per_step": round(replay_ms, 3),
            "training_over_replay": round(training_ms / replay_ms, 1),
            "bit_identical": same,
        }
    print(*(f"{key:32s} {value}" for key, value in result.items() if not isinstance(value, dict)), sep="\n")
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
