"""Masks by steps that measure: the largest mean estimates of a naive reference with whole z, and nothing else of such steps remains."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, mean_square, mlp, regression, snapshot
from engine_models import same as equal
from mask_tools import Weights, masks_of, top_of
from reference.masks import by_size
from reference.noise import query_seed, whole
from torch import nn

from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.masks import Mask, Sensitive
from zo_lightning.engine.masks.report import shares
from zo_lightning.engine.parameters import collect

NOISES = ("rademacher", "gaussian")


def grouped(mask: Mask | None, **options: Any) -> tuple[Any, ZOOptimizer]:
    """Two groups with scales of their own."""
    model = mlp(dropout=0.1, dtype=options.pop("dtype", torch.float32))
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "eps": 1e-2}, {"params": named[1:], "eps": 2e-3}]
    return model, ZOOptimizer(groups, lr=options.pop("lr", 0.05), weight_decay=0.1, seed=3, module=model, mask=mask, **options)


def windows(model: Any, optimizer: ZOOptimizer, steps: int, micro: int = 1) -> list[tuple[float, ...]]:
    """The values of each step, of so many micro-batches."""
    data = regression(next(model.parameters()).dtype)
    values = []
    for _ in range(steps):
        for rows in range(micro):
            optimizer.estimate(mean_square(model, (data[0][rows::micro], data[1][rows::micro])), weight=1 / micro)
        report = optimizer.apply()
        assert report is not None
        values.append(report.values)
    return values


def estimates(optimizer: ZOOptimizer, values: list[tuple[float, ...]], first: int = 0) -> Weights:
    """sum_j g_j z_j, from whole z, of steps that had these values."""
    total = {}
    for p in collect(optimizer.param_groups, optimizer._names):
        total[p.name] = torch.zeros(p.tensor.shape, dtype=torch.float64)
        eps = optimizer.param_groups[p.group]["eps"]
        for step, row in enumerate(values, first):
            for query in range(len(row) // 2 if all(map(math.isfinite, row)) else 0):
                z = torch.from_numpy(whole(optimizer.noise.name, query_seed(optimizer.seed, step, query), p.name, p.tensor.numel()))
                total[p.name] += (row[2 * query] - row[2 * query + 1]) / (2 * eps) * z.view(p.tensor.shape)
    return total


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize(("queries", "micro"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("noise", NOISES)
def test_the_largest_mean_estimates(noise: str, queries: int, micro: int, weights: str) -> None:
    model, optimizer = grouped(
        Mask(Sensitive(steps=8), 0.2, refresh=10), noise=noise, estimator=SPSA(queries), weights=weights, clip=0.1, lr=0.01
    )
    for first in (0, 10):
        values = windows(model, optimizer, 8, micro)
        assert [bool(mask.all()) for mask in masks_of(optimizer).values()] == [True, True, False]  # of one bias a fifth is none
        assert optimizer.report is not None
        assert optimizer.report.lr == 0.0
        assert all(group["lr"] == 0.01 for group in optimizer.param_groups)
        before = snapshot(model)
        windows(model, optimizer, 1, micro)
        assert optimizer.report.lr == 0.01
        found = masks_of(optimizer)
        assert equal(found, top_of(estimates(optimizer, values, first), 0.2))
        moved = torch.cat([(weight != before[name]).view(-1) for name, weight in model.named_parameters()])
        assert torch.equal(moved, torch.cat([mask.view(-1) for mask in found.values()]))
        windows(model, optimizer, 1, micro)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_steps_that_measure_move_nothing(weights: str, dtype: torch.dtype) -> None:
    """In place, what the moves there and back round is left: that of any step with lr=0."""
    model, optimizer = grouped(Mask(Sensitive(steps=3), 0.6, refresh=5), weights=weights, dtype=dtype, estimator=SPSA(2))
    twin, still = grouped(None, weights=weights, dtype=dtype, estimator=SPSA(2), lr=0.0)
    for net in (model, twin):
        with torch.no_grad():
            net[0].weight[0] = -0.0
    before = snapshot(model)
    assert windows(model, optimizer, 3) == windows(twin, still, 3)
    assert equal(snapshot(model), snapshot(twin))
    assert equal(snapshot(model), before) is (weights != "inplace")
    windows(model, optimizer, 1)
    assert not equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("noise", NOISES)
def test_large_and_many_dimensional_weights(noise: str) -> None:
    """Of a size that is done in compiled passes, and of a layout that is not."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"wide": nn.Linear(300, 150, bias=False), "image": nn.Conv2d(16, 256, 3, bias=False)})
    model["image"].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = torch.randn(3, 300), torch.randn(1, 16, 5, 5)
    optimizer = ZOOptimizer(model, lr=1e-3, noise=noise, mask=Mask(Sensitive(steps=4), 0.3))
    values = []
    for _ in range(5):
        optimizer.step(lambda: model["wide"](x).square().mean() + model["image"](y).square().mean())
        assert optimizer.report is not None
        values.append(optimizer.report.values)
    for name, score in estimates(optimizer, values[:4]).items():
        mask, size = masks_of(optimizer)[name], score.abs()
        assert int(mask.sum()) == round(0.3 * mask.numel())
        bound = size[mask].min()
        close = (size - bound).abs() < 1e-5 * bound if noise == "gaussian" else torch.zeros(size.shape, dtype=torch.bool)
        assert torch.equal(mask | close, by_size(score, int(mask.sum()), True)(score) | close)


def test_the_settings_of_a_step_are_known_before_it() -> None:
    """A run that goes on compares them with the recorded ones before it makes any step."""
    model, optimizer = grouped(Mask(Sensitive(steps=2), 0.3, refresh=4, until=7))
    rates = []
    for _ in range(12):
        expected = [group.lr for group in optimizer.settings()]
        windows(model, optimizer, 1)
        assert optimizer.report is not None
        assert expected == [optimizer.report.lr] * 2
        rates.append(optimizer.report.lr)
    assert rates == [0.0, 0.0, 0.05, 0.05] * 2 + [0.05] * 4


def test_layers_that_the_rule_is_not_for() -> None:
    """Those in full are measured around, frozen ones rest; so do layers that no weight of is asked for."""
    model, optimizer = grouped(Mask(Sensitive(steps=2), {"0.*": 0.25, "*": 0.001}, include=("0.*", "3.bias"), frozen=()))
    whole_too = {"0.weight": 160, "3.weight": 16, "3.bias": 0}
    windows(model, optimizer, 2)
    assert {name: int(mask.sum()) for name, mask in masks_of(optimizer).items()} == whole_too
    windows(model, optimizer, 1)
    assert {name: int(mask.sum()) for name, mask in masks_of(optimizer).items()} == {**whole_too, "0.weight": 40}


def test_a_step_that_is_not_finite_measures_nothing() -> None:
    model, optimizer = grouped(Mask(Sensitive(steps=4), 0.2))
    values = windows(model, optimizer, 1)
    optimizer.step(lambda: torch.tensor(math.nan))
    values += [(math.nan, math.nan), *windows(model, optimizer, 2)]
    windows(model, optimizer, 1)
    assert equal(masks_of(optimizer), top_of(estimates(optimizer, values), 0.2))


def test_steps_that_are_all_not_finite_are_an_error() -> None:
    """Not a mask of the first weights, whose scores are as good as the others'."""
    model, optimizer = grouped(Mask(Sensitive(steps=4), 0.2))
    for _ in range(4):
        optimizer.step(lambda: torch.tensor(math.inf))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"No step has measured a gradient of '0\.weight': all losses since the mask was due"):
        windows(model, optimizer, 1)
    assert equal(before, snapshot(model))


def test_eps_may_change_while_steps_measure() -> None:
    """A difference of losses is worth what it was measured over."""
    model, optimizer = grouped(Mask(Sensitive(steps=4), 0.4), noise="gaussian")
    values = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["eps"] *= 3
        values += [tuple(value * 3.0 ** (3 - step) for value in row) for row in windows(model, optimizer, 1)]
    windows(model, optimizer, 1)
    assert equal(masks_of(optimizer), top_of(estimates(optimizer, values), 0.4))


def test_a_group_that_comes_while_steps_measure() -> None:
    model, optimizer = grouped(Mask(Sensitive(steps=4), 0.5, refresh=6))
    extra = nn.Parameter(torch.ones(20))
    values = windows(model, optimizer, 2)
    optimizer.add_param_group({"params": [("extra", extra)], "eps": 1e-2})
    values += windows(model, optimizer, 2)
    windows(model, optimizer, 1)
    found, expected = masks_of(optimizer), top_of(estimates(optimizer, values), 0.5)
    assert all(torch.equal(found[name], expected[name]) for name in ("0.weight", "3.weight"))
    assert int(found["extra"].sum()) == 10


@pytest.mark.parametrize("saved", [False, True], ids=["", "saved"])
@pytest.mark.parametrize("late", [0, 2, 4])
def test_a_layer_that_is_unfrozen_after_steps_measured(late: int, saved: bool) -> None:
    """Its estimate is of the steps that perturbed it; where none did, it is an error and no mask by chance."""
    model, optimizer = grouped(Mask(Sensitive(steps=4), 0.5), weights="copy", noise="gaussian")
    model[3].weight.requires_grad_(late == 0)
    values = windows(model, optimizer, late)
    model[3].weight.requires_grad_(True)
    if saved:
        state = optimizer.state_dict()
        model, optimizer = grouped(Mask(Sensitive(steps=4), 0.5), weights="copy", noise="gaussian")
        optimizer.load_state_dict(state)
    values += windows(model, optimizer, 4 - late)
    if late == 4:
        with pytest.raises(ValueError, match=r"No step has measured a gradient of '3\.weight': it is trained only since then. Unfreeze"):
            windows(model, optimizer, 1)
        return
    windows(model, optimizer, 1)
    expected = top_of(estimates(optimizer, values), 0.5)
    expected["3.weight"] = top_of(estimates(optimizer, values[late:], first=late), 0.5)["3.weight"]
    assert equal(masks_of(optimizer), expected)


def test_a_step_that_could_not_be_written_down_is_measured_once() -> None:
    model, optimizer = grouped(Mask(Sensitive(steps=4), 0.4), noise="gaussian")
    append = optimizer.journal.append

    def full(record: Any) -> None:
        raise OSError("no space left")

    values = windows(model, optimizer, 2)
    optimizer.journal.append = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space"):
        windows(model, optimizer, 1)
    optimizer.journal.append = append  # type: ignore[method-assign]
    values += windows(model, optimizer, 2)
    windows(model, optimizer, 1)
    assert equal(masks_of(optimizer), top_of(estimates(optimizer, values), 0.4))


def watched(optimizer: ZOOptimizer) -> list[list[float | None]]:
    """The overlaps that each new mask is reported with, as they come."""
    found: list[list[float | None]] = []
    optimizer.masks.listeners.append(lambda masks, trained: found.append([share.overlap for share in shares(masks, trained)]))
    return found


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7, 8, 9])
def test_a_run_resumed_from_its_state_is_the_whole_run(stop: int, weights: str) -> None:
    mask = Mask(Sensitive(steps=3), 0.3, refresh=5)
    model, optimizer = grouped(mask, weights=weights, estimator=SPSA(2))
    windows(model, optimizer, stop)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    theta, state = torch.load(file, weights_only=True)
    other, again = grouped(mask, weights=weights, estimator=SPSA(2))
    other.load_state_dict(theta)
    again.load_state_dict(state)
    told, told_again = watched(optimizer), watched(again)
    assert windows(model, optimizer, 11 - stop) == windows(other, again, 11 - stop)
    assert equal(snapshot(model), snapshot(other))
    assert equal(masks_of(optimizer), masks_of(again))
    assert told == told_again


def test_the_overlap_is_that_with_the_mask_before_measuring() -> None:
    model, optimizer = grouped(Mask(Sensitive(steps=3), 0.3, refresh=5))
    told = watched(optimizer)
    windows(model, optimizer, 4)
    before = masks_of(optimizer)
    assert told == [[None] * 3] * 2
    windows(model, optimizer, 5)
    after = masks_of(optimizer)
    assert not equal(before, after)
    both = {name: int((after[name] & before[name]).sum()) for name in after}
    assert told[3] == [both[name] / int(after[name].sum()) if after[name].any() else None for name in after]
