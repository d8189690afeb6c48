"""Every pair of estimator, noise, update rule, mask, weights, objective and dtype: it trains and is replayed, or says why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import all_pairs, pairs_of, rows
from engine_models import mlp, regression, same, snapshot
from torch import nn

from zo_lightning.engine import (
    SPSA,
    SVRG,
    Conservative,
    Coordinatewise,
    Curvature,
    ForwardGradient,
    HiZOO,
    LowRank,
    Momentum,
    OneSided,
    RankSGD,
    TorchOptimizer,
    ZOOptimizer,
)
from zo_lightning.engine.estimators import ESTIMATORS
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.noise import NOISES
from zo_lightning.engine.objectives import Score
from zo_lightning.engine.residency import Batched, Offload
from zo_lightning.engine.trajectory import Trajectory, load_base, read_log, replay
from zo_lightning.engine.updates import RULES

STEPS = 4
CHOICES: dict[str, dict[str, Any]] = {
    "estimator": {
        "spsa": SPSA(),
        "ranks": SPSA(2, fitness="ranks"),
        "curvature": Curvature(2),
        "one-sided": OneSided(2),
        "normalized": OneSided(3, normalized=True),
        "forward": ForwardGradient(2),
        "conservative": Conservative(),
        "svrg": SVRG(refresh=3, anchor=1),
        "rank-sgd": RankSGD(4),
        "rank-sgd, search": RankSGD(4, search=2),
        "coordinates": Coordinatewise(),
        "coordinates, central": Coordinatewise(central=True, batch=8),
    },
    "noise": {
        "rademacher": "rademacher",
        "gaussian": "gaussian",
        "sphere": "sphere",
        "low-rank": LowRank(2, refresh=3),
        "fresh": LowRank(1, refresh=1),
        "orthogonal": LowRank(2, refresh=3, orthogonal=True),
    },
    "update": {
        "sgd": "sgd",
        "sign": "sign",
        "momentum": Momentum(0.8, window=3),
        "adam": "adam",
        "torch": TorchOptimizer("RMSprop", alpha=0.9),
        "hizoo": HiZOO(alpha=1e-3),
    },
    "mask": {
        "none": None,
        "listed": Mask("random", 0.05, refresh=2),
        "drawn": Mask("random", 0.4),
        "small weights": Mask("small_weights", 0.3),
        "half of the layers": Mask("half_layers"),
    },
    "weights": {"exact": "exact", "copy": "copy", "inplace": "inplace", "offload": Offload(), "batched": Batched()},
    "objective": {"loss": None, "score": Score(lambda preds, target: -(preds - target).square().mean().item(), maximize=True)},
    "dtype": {"float32": torch.float32, "bfloat16": torch.bfloat16},
    "decay": {"no decay": 0.0, "decay": 0.1},
    "clip": {"no clip": None, "clip": 0.5},
}
USUAL = {name: next(iter(choices)) for name, choices in CHOICES.items()}
COORDINATES = ("coordinates", "coordinates, central")
TRIES_STEPS = ("conservative", "rank-sgd, search")
FACTORED = ("low-rank", "fresh", "orthogonal")
DENSE = ("sign", "adam", "torch", "hizoo")


def refusal(row: Mapping[str, str]) -> str | None:
    """What is said of a row, or of a part of one, that makes no sense; None where it does."""
    estimator, update, weights = (row.get(name, USUAL[name]) for name in ("estimator", "update", "weights"))
    if weights == "batched" and (estimator in COORDINATES or estimator == "forward"):
        return "Invalid estimator: .* with weights=.batched."
    if weights == "batched" and (update == "hizoo" or row.get("noise", "low-rank") not in FACTORED):
        return "Invalid noise: .* with weights=.batched."
    if weights == "batched" and row.get("mask") in ("listed", "drawn", "small weights"):
        return "Invalid mask: it trains some elements"
    if update == "hizoo" and estimator not in ("spsa", "curvature"):
        return "Invalid estimator: .* needs the curvature along each direction"
    if update == "hizoo" and row.get("noise") == "rademacher":
        return "Invalid noise: 'rademacher' with update="
    if estimator in TRIES_STEPS and update != "sgd":
        return "Invalid update: .* tries steps along the estimate"
    if estimator == "svrg" and update in DENSE:
        return "Invalid update: .* sums of perturbations"
    if estimator == "svrg" and row.get("decay") == "decay":
        return "Invalid weight_decay: 0.1 with estimator=SVRG"
    if update in DENSE and weights == "offload":
        return r"Invalid update: .* with weights=Offload"
    if estimator == "forward" and row.get("objective") == "score":
        return "it differentiates the loss"
    if estimator == "forward" and weights == "offload":
        return "tangents of all trained weights"
    if estimator in COORDINATES and row.get("noise", "rademacher") != "rademacher":
        return "Invalid noise: .* does nothing with estimator=Coordinatewise"
    if estimator in COORDINATES and weights == "offload":
        return "which writes single weights in memory"
    if estimator == "coordinates, central" and row.get("objective") == "score":
        return "Invalid batch: 8 with objective"
    if row.get("clip") == "clip" and estimator in ("normalized", "svrg", "rank-sgd", "rank-sgd, search"):
        return "Invalid clip: 0.5 with"
    if update in DENSE and weights == "inplace" and row.get("dtype") == "bfloat16":
        return 'Invalid update: .* with weights="inplace" and 16-bit weights'
    return None


FACTORS = {name: list(choices) for name, choices in CHOICES.items()}
ROWS = rows(FACTORS, lambda part: refusal(part) is not None)
REFUSED = [dict(pair) for pair in all_pairs(FACTORS) if refusal(dict(pair))]


def options(row: Mapping[str, str]) -> dict[str, Any]:
    usual = {**USUAL, "noise": "gaussian"} if row.get("update") == "hizoo" else USUAL
    usual = {**usual, "noise": "low-rank"} if row.get("weights") == "batched" else usual
    chosen = {name: CHOICES[name][row.get(name, usual[name])] for name in CHOICES}
    del chosen["dtype"]
    return {"weight_decay": chosen.pop("decay"), **chosen, "lr": 1e-3, "eps": 1e-2, "safeguard": None}


def model_of(row: Mapping[str, str]) -> nn.Module:
    return mlp(dtype=CHOICES["dtype"][row.get("dtype", "float32")])


def test_all_that_the_tables_have_is_there() -> None:
    made = {name: [ZOOptimizer(mlp(), **options({name: choice})) for choice in FACTORS[name]] for name in ("estimator", "noise", "update")}
    assert {optimizer.estimator.name for optimizer in made["estimator"]} == set(ESTIMATORS)
    assert {optimizer.noise.name for optimizer in made["noise"]} == set(NOISES)
    assert {optimizer.rule.name for optimizer in made["update"]} == set(RULES)


def test_every_pair_is_in_a_row_or_is_refused() -> None:
    covered = set().union(*map(pairs_of, ROWS)) | {pair for row in REFUSED for pair in pairs_of(row)}
    assert covered == set(all_pairs(FACTORS))
    assert len(ROWS) < 100


@pytest.mark.filterwarnings("ignore:The loss differences:zo_lightning.engine.messages.ZOWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(row.values()))
def test_a_row_trains_and_is_replayed_bit_for_bit(row: dict[str, str], tmp_path: Path) -> None:
    """What is not trained stays, losses are finite, and the log leads from the base to the end."""
    model = model_of(row)
    x, y = regression(next(model.parameters()).dtype)
    before = snapshot(model)
    optimizer = ZOOptimizer(model, **options(row))
    log = Trajectory(tmp_path)
    log.begin(optimizer)

    def closure() -> Any:
        out = model(x)
        return {"loss": (out - y).float().square().mean(), "preds": out.float(), "target": y.float()}

    for _ in range(STEPS):
        objective = optimizer.objective
        loss_of = (lambda output: output["loss"]) if objective is None else objective.loss_of
        optimizer.estimate(closure, loss_of=loss_of)
        report = optimizer.apply()
        assert report is not None
        assert not report.skipped
    log.end(optimizer)
    log.close(optimizer)
    with optimizer.settled():
        after = snapshot(model)
    assert not same(after, before)
    if row["mask"] in ("small weights", "half of the layers"):
        assert any(bool((after[name] == before[name]).any()) for name in before)
    found = read_log(log.path)
    again = load_base(tmp_path / str(found.segments[0].base))
    assert replay(again, found) == STEPS
    assert same(again, after)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: ", ".join(row.values()))
def test_what_makes_no_sense_says_so(row: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=str(refusal(row))):
        ZOOptimizer(model_of(row), **options(row)).step(lambda: 0.0)  # masks are made in a step
