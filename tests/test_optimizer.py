"""ZOOptimizer as torch.optim.Optimizer: schedulers, groups, hooks, halves of a step, accumulation, resume, reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_models import RESIDENCIES, LanguageModel, bits, distance, mean_square, mlp, next_token, regression, same, snapshot
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from zo_lightning.engine import SPSA, Safeguard, StepReport, ZOOptimizer

EXACT = ("exact", "copy")


def last(optimizer: ZOOptimizer) -> StepReport:
    assert optimizer.report is not None
    return optimizer.report


def linear(size: int = 5) -> tuple[nn.Linear, Callable[[], Tensor]]:
    """A model and a loss that is linear in its weights: every step is lr |g| long in each weight."""
    model = nn.Linear(size, 1, bias=False, dtype=torch.float64)
    return model, lambda: model(torch.arange(1, size + 1, dtype=torch.float64)).sum()


# ---- a torch.optim.Optimizer

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "warmup, then linear": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 2), schedulers.LinearLR(o, 1.0, 0.0, 4)], [2]
    ),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_length_of_each_step(name: str) -> None:
    model, loss = linear()
    optimizer, twin = ZOOptimizer(model, lr=0.1), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](twin)
    for _ in range(6):
        before = model.weight.detach().clone()
        optimizer.step(loss)
        twin.step()
        lr = twin.param_groups[0]["lr"]
        assert last(optimizer).lr == lr
        assert (model.weight - before).abs().tolist() == [pytest.approx([lr * abs(last(optimizer).projected_grad)] * 5, rel=1e-12)]
        ours.step()
        theirs.step()


def test_a_plateau_scheduler_takes_the_loss_that_a_step_returns() -> None:
    optimizer = ZOOptimizer(mlp(), lr=0.08)
    scheduler = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    for loss in (2.0, 1.0, 1.0, 1.0):
        scheduler.step(optimizer.step(lambda loss=loss: loss))  # type: ignore[arg-type,misc]
    assert optimizer.param_groups[0]["lr"] == 0.04


def test_lr_changed_between_steps_counts_from_the_next_step_on() -> None:
    model, loss = linear()
    optimizer = ZOOptimizer(model, lr=0.5)
    for lr in (0.5, 0.25, 0.0, torch.tensor(0.125)):
        optimizer.param_groups[0]["lr"], before = lr, model.weight.detach().clone()
        optimizer.step(loss)
        assert float((model.weight.detach() - before).abs().max()) == pytest.approx(float(lr) * abs(last(optimizer).projected_grad))


def test_a_group_added_later_trains_as_if_it_had_been_frozen_before() -> None:
    data, grown, frozen = regression(), mlp(), mlp()
    first = ZOOptimizer(grown[0].parameters(), lr=0.05, module=grown)
    frozen[3].requires_grad_(False)
    second = ZOOptimizer(
        [{"params": frozen[0].parameters()}, {"params": frozen[3].parameters(), "lr": 0.01, "eps": 1e-2}], 0.05, module=frozen
    )
    for step in range(5):
        if step == 2:
            first.add_param_group({"params": list(grown[3].parameters()), "lr": 0.01, "eps": 1e-2})
            frozen[3].requires_grad_(True)
        first.step(mean_square(grown, data))
        second.step(mean_square(frozen, data))
    assert first.param_groups[1]["weight_decay"] == 0.0
    assert same(snapshot(grown), snapshot(frozen))
    assert not torch.equal(grown[3].weight, mlp()[3].weight)


def test_hooks_of_torch_run_around_a_step_and_a_state() -> None:
    model, data = mlp(), regression()
    optimizer, seen = ZOOptimizer(model, lr=0.05), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o.steps)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o.steps)))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append(("state", o.steps)))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", 0)))
    optimizer.zero_grad()
    optimizer.step(mean_square(model, data))
    optimizer.load_state_dict(optimizer.state_dict())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert seen == [("before", 0), ("after", 1), ("state", 1), ("loaded", 0)]


# ---- the halves of a step


def run(weights: str, fused: bool, noise: str = "rademacher") -> tuple[dict[str, Tensor], list[tuple[float, ...]]]:
    torch.manual_seed(0)
    model = LanguageModel().double()
    optimizer, values = ZOOptimizer(model, 0.01, weights=weights, noise=noise, weight_decay=0.1, estimator=SPSA(2)), []
    for _ in range(5):
        if fused:
            returned = optimizer.step(next_token(model))
        else:
            returned = optimizer.estimate(next_token(model)).loss
            assert optimizer.step() is None
        assert returned is not None
        assert returned.dtype == torch.float64
        assert float(returned) == pytest.approx(last(optimizer).loss, rel=1e-15)
        values.append(last(optimizer).values)
    return snapshot(model), values


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("weights", EXACT)
def test_step_is_estimate_and_apply_bit_for_bit(weights: str, noise: str) -> None:
    (fused, values), (halves, others) = run(weights, True, noise), run(weights, False, noise)
    assert values == others
    assert same(fused, halves)


def test_in_place_step_is_estimate_and_apply_to_rounding() -> None:
    """step() restores and updates in one pass, so the last bits may differ; they must not grow."""
    (fused, values), (halves, others) = run("inplace", True), run("inplace", False)
    assert [pytest.approx(v, rel=1e-12) for v in values] == others
    assert distance(fused, halves) < 1e-12
    assert distance(fused, run("copy", True)[0]) < 1e-12


@pytest.mark.parametrize("cuts", [(0, 4, 8, 12, 16), (0, 3, 8, 16)], ids=["4 x 4", "uneven"])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_weighted_micro_batches_are_one_large_batch(weights: str, cuts: tuple[int, ...]) -> None:
    (x, y), small, large = regression(), mlp(), mlp()
    first, second = (ZOOptimizer(m, 0.05, weights=weights, clip=0.5, estimator=SPSA(2)) for m in (small, large))
    for _ in range(10):
        for rows in (slice(*cut) for cut in pairwise(cuts)):
            share = (rows.stop - rows.start) / 16
            estimate = first.estimate(mean_square(small, (x[rows], y[rows])), weight=share)
            assert float(estimate.loss) == pytest.approx(float(estimate.output) * share, rel=5e-2)  # type: ignore[arg-type]
        first.apply()
        second.step(mean_square(large, (x, y)))
    assert last(first).values == pytest.approx(last(second).values, rel=1e-9)
    assert distance(snapshot(small), snapshot(large)) < 1e-9
    assert (first.steps, first.forward_passes, second.forward_passes) == (10, 10 * 4 * (len(cuts) - 1), 10 * 4)


def test_discard_drops_the_window_as_if_it_had_never_been() -> None:
    data, plain, other = regression(), mlp(), mlp()
    first, second = ZOOptimizer(plain, lr=0.05), ZOOptimizer(other, lr=0.05)
    for _ in range(3):
        second.estimate(lambda: 1e3 * mean_square(other, data)())
        second.discard()
        assert second.apply() is None
        for optimizer, model in ((first, plain), (second, other)):
            optimizer.step(mean_square(model, data))
    assert same(snapshot(plain), snapshot(other))
    assert (second.steps, second.forward_passes) == (3, 12)


# ---- saving and resuming


class Stochastic(nn.Module):
    """Dropout and running statistics: what an evaluation could carry from one step to the next."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.3)) for _ in range(2)])
        self.head = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Run:
    """Steps of two micro-batches, with decay, a schedule, clipping and a safeguard of short windows."""

    def __init__(self, seed: int = 3, **options: Any) -> None:
        self.model = Stochastic().double()
        self.optimizer = ZOOptimizer(self.model, 0.05, weight_decay=0.1, clip=2.0, estimator=SPSA(2), seed=seed, **options)
        self.scheduler = schedulers.CosineAnnealingLR(self.optimizer, 6)
        self.x, self.y = regression()
        self.done = 0

    def go(self, until: int) -> Run:
        while self.done < until:
            self.done += 1
            rows = slice(0, 8) if self.done % 2 else slice(8, 16)
            self.optimizer.estimate(mean_square(self.model, (self.x[rows], self.y[rows])), weight=0.5)
            if self.done % 2 == 0:
                self.optimizer.step()
                self.scheduler.step()
        return self

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def saved(self) -> dict[str, Any]:
        return {"done": self.done, **{name: part.state_dict() for name, part in self.parts().items()}}

    def load(self, state: dict[str, Any]) -> Run:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.done = state["done"]
        return self


@pytest.mark.parametrize(("weights", "noise"), [*((weights, "rademacher") for weights in RESIDENCIES), ("copy", "gaussian")])
def test_resume_is_bit_equal_at_every_micro_batch(weights: str, noise: str, tmp_path: Path) -> None:
    options = {"weights": weights, "noise": noise, "safeguard": Safeguard(2, 10.0)}
    uninterrupted = Run(**options).go(8)
    for stop in range(8):
        torch.save(Run(**options).go(stop).saved(), tmp_path / "run.pt")
        torch.manual_seed(stop + 100)
        resumed = Run(seed=99, **options).load(torch.load(tmp_path / "run.pt", weights_only=True)).go(8)
        assert same(snapshot(resumed.model), snapshot(uninterrupted.model))
        assert resumed.optimizer.state_dict() == uninterrupted.optimizer.state_dict()
        assert last(resumed.optimizer).values == last(uninterrupted.optimizer).values


def test_the_state_is_plain_and_small() -> None:
    """No tensor, no pickle: lists and numbers that go through JSON and back unchanged, and no state for any weight."""
    begun = Run().go(7)
    state = begun.optimizer.state_dict()
    assert state["state"] == {}
    assert json.loads(json.dumps(state["zo"])) == state["zo"]
    window = {"points": 4, "eps": [1e-3], "micro_batches": 1, "totals": [float(x) for x in state["zo"]["window"]["totals"]]}
    assert state["zo"]["window"] == {**window, "of": [0, "data=1"]}
    assert len(state["zo"]["window"]["totals"]) == 4
    assert {name: state["zo"][name] for name in ("seed", "steps", "forward_passes")} == {"seed": 3, "steps": 3, "forward_passes": 28}


@pytest.mark.parametrize("pairs", [[(5.0, 2.0)], [(5.0, 2.0), (1.0, 4.0)], [(5.0, 2.0), (1.0, 1.5)]], ids=str)
def test_the_report_is_what_a_hand_computes(pairs: list[tuple[float, float]]) -> None:
    queries = len(pairs)
    given = [value for pair in pairs for value in pair]
    losses = iter([*given, *given])
    optimizer = ZOOptimizer(mlp(), lr=1e-3, eps=0.25, estimator=SPSA(queries), clip=None)
    for step in range(2):
        loss = optimizer.step(lambda: next(losses))  # type: ignore[arg-type,return-value]
        report = last(optimizer)
        assert report.values == tuple(given)
        assert report.loss == float(loss) == sum(given) / len(given)  # type: ignore[arg-type]
        assert (report.loss_plus, report.loss_minus) == (sum(given[::2]) / queries, sum(given[1::2]) / queries)
        assert report.projected_grad == pytest.approx(sum((a - b) / 0.5 for a, b in pairs) / queries, rel=1e-15)
        assert (report.step, report.eps, report.lr, report.forward_passes) == (step, 0.25, 1e-3, len(given) * (step + 1))
        assert (report.skipped, report.zero_difference) == (False, False)
        assert report.resolution == 3.0 / 2.0 ** (-21 if queries == 1 else -22)  # float32s are 2**-21 apart in [4, 8)
        assert 0 < report.seconds < 60


def test_counters_of_skipped_and_empty_steps() -> None:
    model = mlp()
    optimizer, before = ZOOptimizer(model, lr=1e-3, eps=0.25), snapshot(model)
    for pair in ((1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (2.0, 2.0)):
        losses = iter(pair)
        optimizer.step(lambda losses=losses: next(losses))  # type: ignore[misc]
        report = last(optimizer)
        assert (report.zero_difference, report.skipped) == (pair[0] == pair[1], not math.isfinite(sum(pair)))
        assert math.isnan(report.projected_grad) == math.isnan(report.loss) == report.skipped
    assert (optimizer.steps, optimizer.forward_passes, optimizer.skipped_steps, optimizer.zero_difference_steps) == (4, 8, 2, 2)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_group_with_lr_zero_is_perturbed_and_stays(weights: str) -> None:
    model, whole_model = mlp(), mlp()
    for one, lr in ((model, 0.0), (whole_model, 0.05)):
        groups = [{"params": one[0].parameters()}, {"params": one[3].parameters(), "lr": lr, "eps": 1e-2, "weight_decay": 0.5}]
        ZOOptimizer(groups, lr=0.05, weights=weights, module=one).step(mean_square(one, regression()))
    start, after, other = snapshot(mlp()), snapshot(model), snapshot(whole_model)
    assert distance({"w": start["3.weight"]}, {"w": after["3.weight"]}) <= (1e-15 if weights == "inplace" else 0.0)
    assert distance({"w": other["0.weight"]}, {"w": after["0.weight"]}) < 1e-15
    assert not torch.equal(start["0.weight"], after["0.weight"])


@pytest.mark.parametrize("weights", EXACT)
def test_weight_decay_is_decoupled(weights: str) -> None:
    """With a flat loss a step is theta * (1 - lr wd), exactly, and nothing where wd is 0."""
    model = mlp()
    start, named = snapshot(model), dict(model.named_parameters())
    groups = [{"params": [named["0.weight"]]}, {"params": [named["3.weight"]], "weight_decay": 0.0}]
    optimizer = ZOOptimizer(groups, lr=0.25, weight_decay=0.125, weights=weights, module=model)
    for _ in range(3):
        optimizer.step(lambda: 0.0 * model(torch.ones(1, 10, dtype=torch.float64)).sum())
    decayed = start["0.weight"]
    for _ in range(3):
        decayed = decayed * (1 - 0.25 * 0.125)
    assert torch.equal(bits(named["0.weight"]), bits(decayed))
    assert all(torch.equal(bits(named[name]), bits(start[name])) for name in ("3.weight", "3.bias"))


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_the_same_seed_is_the_same_run_and_another_seed_another(weights: str) -> None:
    runs = [Run(seed=seed, weights=weights).go(8) for seed in (3, 3, 4)]
    assert same(snapshot(runs[0].model), snapshot(runs[1].model))
    assert distance(snapshot(runs[0].model), snapshot(runs[2].model)) > 1e-4


@pytest.mark.parametrize(
    ("dtype", "eps", "noise"),
    [(torch.float32, 1e-3, "rademacher"), (torch.float32, 1e-3, "gaussian"), (torch.bfloat16, 3e-2, "rademacher")],
    ids=str,
)
def test_it_trains(dtype: torch.dtype, eps: float, noise: str) -> None:
    x, model = regression(dtype, rows=64)[0], mlp(dtype=dtype)
    y = x[:, :3].sum(1, keepdim=True)
    optimizer = ZOOptimizer(model, lr=0.01, eps=eps, noise=noise)
    losses = [optimizer.step(lambda: F.mse_loss(model(x).float(), y.float())) for _ in range(150)]
    first, final = (float(torch.stack(part).mean()) for part in (losses[:10], losses[-10:]))  # type: ignore[arg-type]
    assert final < 0.35 * first
