"""What adapters learn with forward passes beside all weights: LoRA, prefixes, prompts, each with its best learning rate of one stated grid.

python benchmarks/adapter_learning.py --seeds 0 1 2 --jobs 4 --json benchmarks/results/adapter_learning.json   everything
python benchmarks/adapter_learning.py --only LoRA --lr-grid 0.1 10 --json FILE.json                            a wider grid of one kind
python benchmarks/adapter_learning.py --only full LoRA --lr-grid 1 --steps 3 --every 3                         seconds

MiniLM on docstring topics, batch 64, without dropout, lr decaying linearly to 0. The first seed tries lr = the kind's own times each
factor of --lr-grid; the other seeds take the factor that was best there. Held-out accuracy is looked at every --every steps; a run that
falls below half of what it began with is given up. Runs that the JSON file has are kept and not made again, so that grids and seeds can be
widened.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from grid import Grid, follow
from learning import Docstrings
from measure import environment
from minilm import SCALE
from torch import Tensor, nn

from zo_lightning import ZOOptimizer
from zo_lightning.callbacks import PrefixInit
from zo_lightning.engine.kinds import LORA, PREFIX

BATCH, VIRTUAL_TOKENS, GIVEN_UP, FULL = 64, 5, 0.5, "full"


class Classifier(nn.Module):
    """The demo's classifier in the shape that peft's SEQ_CLS knows: a transformer `bert` and a head `classifier`.

    Logits are a linear layer of the unit vector that the last hidden states' mean is. The layer begins with the topics' names, so that the
    untrained model says what the demo's says; afterwards it is trained like any weight.
    """

    def __init__(self, topics: Any) -> None:
        super().__init__()
        self.bert, self.config, self.device = topics.bert, topics.bert.config, topics.bert.device
        self.bert.pooler = None  # would be trained, and has no part in the logits
        with torch.no_grad():
            names = topics.eval().embed(topics.name_ids, topics.name_mask)
        self.classifier = nn.Linear(names.shape[1], names.shape[0])
        self.classifier.weight.data.copy_(SCALE * names)
        self.classifier.bias.data.zero_()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def get_input_embeddings(self) -> nn.Module:
        """What peft and PrefixInit ask for."""
        found: nn.Module = self.bert.get_input_embeddings()
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,  # by name: peft looks for it before it hands over a prefix
        **others: Any,
    ) -> dict[str, Tensor]:
        """Of a prefix the mask has more tokens than come out, and virtual tokens of a prompt come out and are part of the mean."""
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **others)
        hidden = out.last_hidden_state
        mask = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask[:, -hidden.shape[1] :]
        logits = self.classifier(F.normalize((hidden * mask.unsqueeze(-1)).sum(1), dim=-1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Run(NamedTuple):
    """What a kind gets: the model without an adapter, and the scales of this run."""

    model: Classifier
    tokenizer: Any
    seed: int
    lr: float
    eps: float | None


class Setup(NamedTuple):
    """What a kind makes of it: the model, and parameter groups, which get the run's lr and eps where they have none of their own.

    `after(steps made)` is for what changes later. What is frozen first and thawed there has to be in a group from the beginning.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    after: Callable[[int], None] = lambda step: None


class Kind(NamedTuple):
    """A row of the table. `lr` is what the grid's factors multiply; eps is None for AdamW by backpropagation."""

    build: Callable[[Run], Setup]
    lr: float
    eps: float | None


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What is not frozen, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def full(run: Run) -> Setup:
    """All weights."""
    return Setup(run.model, [{"params": trained(run.model)}])


def lora(run: Run) -> Setup:
    """Rank 8 and alpha 16 on queries and values (MeZO's), and the head."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(run.model, config)
    return Setup(model, [{"params": trained(model)}])


def lora_with_frozen_a(until: int | None) -> Callable[[Run], Setup]:
    """The same, with A as it was drawn, up to a step or for good: where B = 0 the loss does not depend on A."""

    def build(run: Run) -> Setup:
        model, groups, _ = lora(run)
        factors = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
        for parameter in factors:
            parameter.requires_grad_(False)

        def thaw(step: int) -> None:
            if step == until:
                for parameter in factors:
                    parameter.requires_grad_(True)

        return Setup(model, groups, thaw)

    return build


def lora_with_small_a(run: Run) -> Setup:
    """The same, with noise of a tenth of the size in A: eps a tenth, and lr a hundredth, for lr g z is in eps**2."""
    model, groups, _ = lora(run)
    factors = [pair for pair in groups[0]["params"] if "lora_A" in pair[0]]
    others = [pair for pair in groups[0]["params"] if "lora_A" not in pair[0]]
    return Setup(model, [{"params": others}, {"params": factors, "lr": run.lr / 100, "eps": (run.eps or 0.0) / 10}])


def virtual(config: type[peft.PromptLearningConfig], real: bool) -> Callable[[Run], Setup]:
    """Five virtual tokens (MeZO's), and the head; they begin as noise or as real tokens drawn by chance."""

    def build(run: Run) -> Setup:
        model = peft.get_peft_model(run.model, config(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL_TOKENS))
        if real:
            PrefixInit(tokenizer=run.tokenizer).initialize(model, run.seed)
        return Setup(model, [{"params": trained(model)}])

    return build


KINDS: dict[str, Kind] = {
    FULL: Kind(full, 2e-4, 1e-2),
    "LoRA": Kind(lora, 1e-2, LORA.eps),
    "LoRA, a tenth of the noise in A": Kind(lora_with_small_a, 1e-2, LORA.eps),
    "LoRA, A frozen for 30 steps": Kind(lora_with_frozen_a(30), 1e-2, LORA.eps),
    "LoRA, A frozen": Kind(lora_with_frozen_a(None), 1e-2, LORA.eps),
    "prefix": Kind(virtual(peft.PrefixTuningConfig, real=False), 1e-1, PREFIX.eps),
    "prefix, PrefixInit": Kind(virtual(peft.PrefixTuningConfig, real=True), 1e-1, PREFIX.eps),
    "prompt": Kind(virtual(peft.PromptTuningConfig, real=False), 3e-2, PREFIX.eps),
    "prompt, PrefixInit": Kind(virtual(peft.PromptTuningConfig, real=True), 3e-2, PREFIX.eps),
    "LoRA, AdamW": Kind(lora, 1e-3, None),
}


class Job(NamedTuple):
    """One run."""

    kind: str
    factor: float
    seed: int
    steps: int
    every: int
    eps: float | None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=list(KINDS), metavar="NAME", help=", ".join(map(repr, KINDS)))
    parser.add_argument("--lr-grid", type=float, nargs="+", default=[0.3, 1.0, 3.0], metavar="FACTOR", help="of each kind's own lr")
    parser.add_argument("--eps", type=float, default=None, help="instead of each kind's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one chooses the learning rates")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


class Backpropagation(torch.optim.AdamW):
    """AdamW whose step is called like that of a `ZOOptimizer`: with a closure that only computes the loss."""

    def step(self, closure: Any = None) -> Any:
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        loss.backward()
        super().step()
        return loss.detach()


def learn(job: Job) -> dict[str, Any]:
    """One run: the accuracies on its way."""
    torch.manual_seed(job.seed)
    task, kind = Docstrings(job.seed, BATCH), KINDS[job.kind]
    lr = kind.lr * job.factor
    setup = kind.build(Run(Classifier(task.model), task.collate.tokenizer, job.seed, lr, job.eps))
    task.model = setup.model.train()
    optimizer: Any
    if job.eps is None:
        optimizer = Backpropagation(setup.groups, lr=lr, weight_decay=0.0)
    else:
        optimizer = ZOOptimizer(setup.groups, lr=lr, eps=job.eps, module=setup.model, seed=job.seed, dropout=False, safeguard=None)
    weights = sum(tensor.numel() for group in optimizer.param_groups for tensor in group["params"])
    run = follow(
        task,
        optimizer,
        job.steps,
        job.every,
        measure=lambda: round(task.accuracy(), 4),
        lost=lambda start, now: now < GIVEN_UP * start,
        after=setup.after,
    )
    result = {**job._asdict(), "lr": lr, "weights": weights, "start": run.start, "curve": run.curve}
    return {**result, "seconds_per_step": run.seconds_per_step, "accuracy": run.curve[-1] if run.ended else None}


def best_factor(runs: Iterable[dict[str, Any]], seed: int) -> float | None:
    """The factor with which this seed ended best; None without such a run."""
    ended = [run for run in runs if run["seed"] == seed and run["accuracy"] is not None]
    return max(ended, key=lambda run: float(run["accuracy"]))["factor"] if ended else None


def reached(run: dict[str, Any], accuracy: float | None) -> int | None:
    """Steps until this accuracy was seen; None if never."""
    if accuracy is None:
        return None
    looks = [min((i + 1) * run["every"], run["steps"]) for i in range(len(run["curve"]))]
    return next((step for step, value in zip(looks, run["curve"], strict=True) if value >= accuracy), None)


def summary(runs: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """For each kind, eps and number of steps the factor that was best with `seed`; its accuracies, and steps to those of all weights."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        settings.setdefault((run["kind"], run["eps"], run["steps"], run["every"]), []).append(run)
    rows = []
    for (kind, eps, steps, every), own in settings.items():
        factor = best_factor(own, seed)
        best = [run for run in own if run["factor"] == factor]
        ended = sorted((run for run in best if run["accuracy"] is not None), key=lambda run: int(run["seed"]))
        row = {"kind": kind, "eps": eps, "steps": steps, "every": every, "factor": factor, "tried": sorted({run["factor"] for run in own})}
        if ended:
            row |= {"lr": ended[0]["lr"], "weights": ended[0]["weights"], "lost": len(best) - len(ended)}
            row |= {"seeds": [run["seed"] for run in ended], "of_seeds": [run["accuracy"] for run in ended]}
            row |= {"accuracy": statistics.fmean(row["of_seeds"]), "start": statistics.fmean(run["start"] for run in ended)}
            row |= {
                "seconds_per_step": statistics.median(run["seconds_per_step"] for run in ended),
                "curves": [run["curve"] for run in ended],
            }
        rows.append(row)
    full_rows = {row["steps"]: row for row in sorted(rows, key=lambda row: float(row.get("accuracy", 0.0))) if row["kind"] == FULL}
    for row in rows:
        of_full = full_rows.get(row["steps"], {})
        targets = dict(zip(of_full.get("seeds", ()), of_full.get("of_seeds", ()), strict=True))
        seen = {"every": row["every"], "steps": row["steps"]}
        curves = zip(row.get("seeds", ()), row.pop("curves", ()), strict=True)
        row["steps_to_full"] = [reached({**seen, "curve": curve}, targets.get(of_seed)) for of_seed, curve in curves]
    return sorted(rows, key=lambda row: -float(row.get("accuracy", 0.0)))


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    eps = "    -  " if row["eps"] is None else f"{row['eps']:.1e}"
    head = f"{row['kind']:20} {row['steps']:4} steps  eps {eps}"
    if "accuracy" not in row:
        return f"{head}  given up with every lr"
    edge = "  best at the grid's edge" if len(row["tried"]) > 1 and row["factor"] in (row["tried"][0], row["tried"][-1]) else ""
    to = " ".join("-" if step is None else str(step) for step in row["steps_to_full"])
    of = f"({len(row['seeds'])} seeds, {row['lost']} given up)"
    body = f"lr {row['lr']:.1e}  {row['weights']:10,} weights  {row['start']:6.1%} -> {row['accuracy']:6.1%} {of}"
    return f"{head}  {body}  {row['seconds_per_step']:.2f} s a step  steps to full's accuracy: {to}{edge}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, and write JSON."""
    options = parse(arguments)
    chosen = {key: value for key, value in vars(options).items() if key != "json"}
    result = {"environment": {**environment("cpu"), "peft": version("peft")}, "options": chosen}
    first = options.seeds[0]

    def job(name: str, factor: float, seed: int) -> Job:
        own = KINDS[name].eps
        return Job(name, factor, seed, options.steps, options.every, own if own is None or options.eps is None else options.eps)

    def of(name: str) -> list[dict[str, Any]]:
        return [run for run in grid.runs if all(run[key] == getattr(job(name, 1, 0), key) for key in ("kind", "steps", "every", "eps"))]

    with Grid(learn, lambda runs: summary(runs, first), options.json, result, options.jobs, options.threads) as grid:
        grid.make([job(name, factor, first) for name in options.only for factor in options.lr_grid])
        best = {name: best_factor(of(name), first) for name in options.only}
        grid.make([job(name, factor, seed) for seed in options.seeds[1:] for name, factor in best.items() if factor is not None])
    for row in grid.result["summary"]:
        print(line(row))
    return grid.result


if __name__ == "__main__":
    main()
