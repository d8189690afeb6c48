"""Masks by gradients from backpropagation, and by low-rank approximations, against whole gradients and decompositions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import Closure, Images, LanguageModel, Unusual, mean_square, mlp, next_token, pictures, regression, snapshot
from engine_models import same as equal
from mask_tools import Weights, generators, masks_of, top_of
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.masks import Mask, PrincipalWeights, Sensitive
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.parameters import collect

# ---- Sensitive, by backpropagation


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Closure]:
    """A model, the same each time, and its loss."""
    torch.manual_seed(0)
    if name == "BatchNorm":
        images = Images().to(dtype)
        return images, pictures(images, dtype)
    if name == "dropout and ties":
        net, (x, y) = mlp(dropout=0.3, dtype=dtype), regression(dtype)
        return net, mean_square(net, (x * (torch.arange(10) > 7), y))  # most weights of the first layer have no gradient
    if name == "views":
        views = Unusual().to(dtype=dtype)
        return views, mean_square(views, regression(dtype))
    model = LanguageModel(width=64).to(dtype)
    model.idle = nn.Parameter(torch.ones(400, dtype=dtype))
    return model, next_token(model)


MODELS = ("BatchNorm", "dropout and ties", "views", "an unused parameter")


def noisy(loss: Closure) -> Callable[[], Iterator[Tensor]]:
    """Two losses that depend on all global generators."""
    return lambda: (loss() * (0.5 + random.random() + np.random.rand() + float(torch.rand(()))) for _ in range(2))


def squares(model: nn.Module, losses: Callable[[], Any]) -> Weights:
    """sum_b grad^2, by backward()."""
    total = {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}
    for loss in losses():
        model.zero_grad()
        loss.backward()
        for name, weight in model.named_parameters():
            total[name] += 0 if weight.grad is None else weight.grad.float() ** 2
    return total


@pytest.mark.parametrize("density", [0.25, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_largest_sums_of_squared_gradients(name: str, dtype: torch.dtype, density: float) -> None:
    net, own = made(name, dtype)
    generators(1)
    scores = squares(net, noisy(own))
    assert generators() != generators(1)
    expected = top_of(scores, density)
    model, loss = made(name, dtype)
    optimizer = ZOOptimizer(model, lr=1e-3, mask=Mask(Sensitive(noisy(loss)), density))
    before = generators(1)
    with torch.inference_mode():
        optimizer.step(loss)
    assert generators() == before
    assert all(weight.grad is None for weight in model.parameters())
    found = masks_of(optimizer)
    assert equal(found, expected)
    assert [int(mask.sum()) for mask in found.values()] == [round(density * mask.numel()) for mask in found.values()]
    assert (Listed in map(type, optimizer.masks.chosen.values())) is (density < 0.02)  # type: ignore[union-attr]


def test_a_thousandth_of_the_weights() -> None:
    model, loss = made("an unused parameter")
    optimizer = ZOOptimizer(model, lr=1e-2, mask=Mask(Sensitive(lambda: [loss()]), 0.001))
    expected = top_of(squares(model, lambda: [loss()]), 0.001)
    model.zero_grad()
    before = snapshot(model)
    optimizer.step(loss)
    assert equal(masks_of(optimizer), expected)
    assert {type(mask) for mask in optimizer.masks.chosen.values()} == {Listed}  # type: ignore[union-attr]
    assert all(torch.equal(weight != before[name], expected[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("density", [1.0, 1e-6])
def test_densities_that_ask_no_gradient(density: float) -> None:
    model, loss = made("BatchNorm")
    optimizer = ZOOptimizer(model, lr=1e-2, mask=Mask(Sensitive(lambda: [loss()]), density))
    if density == 1:
        optimizer.step(loss)
        assert all(mask.all() for mask in masks_of(optimizer).values())
        return
    with pytest.raises(ValueError, match="leaves nothing to train"):
        optimizer.step(loss)


def test_a_refresh_asks_for_gradients_at_the_weights_of_then() -> None:
    model, loss = made("dropout and ties")
    model.eval()
    seen: list[Weights] = []

    def losses() -> list[Tensor]:
        seen.append(snapshot(model))
        return [loss()]

    optimizer = ZOOptimizer(model, lr=0.3, mask=Mask(Sensitive(losses), 0.1, refresh=3, until=8))
    for step in range(10):
        before = snapshot(model)
        optimizer.step(loss)
        assert len(seen) == min(step, 7) // 3 + 1
        if step in (0, 3, 6):
            assert equal(seen[-1], before)
            twin, own = made("dropout and ties")
            twin.eval()
            twin.load_state_dict(before)
            assert equal(masks_of(optimizer), top_of(squares(twin, lambda: [own()]), 0.1))  # noqa: B023


def spoilt(loss: Closure, model: nn.Module) -> Tensor:
    """A finite loss, the root of 0, whose gradient is not."""
    return loss() + (next(model.parameters()) * 0).sum().sqrt()


BAD: dict[str, tuple[Callable[[Closure, nn.Module], Any], str]] = {
    "none": (lambda loss, model: [], r"losses\(\) gave no loss. Give one or more"),
    "two numbers": (lambda loss, model: [loss(), loss() * torch.ones(2)], r"losses\(\) gave a tensor of shape \(2,\); it must give scalar"),
    "detached": (lambda loss, model: [loss().detach()], r"a tensor of shape \(\) without a gradient \(no_grad, or detached\)"),
    "a float": (lambda loss, model: [0.5], r"losses\(\) gave 0\.5; it must give scalar tensors"),
    "infinite": (lambda loss, model: [loss() * math.inf], r"The scores of '0\.weight'.* are not all finite"),
    "not finite": (lambda loss, model: [spoilt(loss, model)], r"The scores of '0\.weight'.* are not all finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_losses_that_give_no_gradient_are_errors_before_the_first_step(case: str) -> None:
    bad, message = BAD[case]
    model, loss = made("dropout and ties")
    before, calls, state = snapshot(model), [], generators(1)
    optimizer = ZOOptimizer(model, lr=1e-2, mask=Mask(Sensitive(lambda: bad(loss, model)), 0.25))
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: calls.append(1))
    assert not calls
    assert optimizer.steps == 0
    assert equal(before, snapshot(model))
    assert generators() == state


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "losses": (lambda: Sensitive([torch.ones(())]), "Invalid losses: .*Must be a function"),  # type: ignore[arg-type]
    "no steps": (lambda: Sensitive(steps=0), "Invalid steps: 0"),
    "half a step": (lambda: Sensitive(steps=1.5), "Invalid steps: 1.5"),  # type: ignore[arg-type]
    "no density": (lambda: Mask("sensitive"), "needs density="),
    "refresh while measuring": (lambda: Mask(Sensitive(steps=5), 0.5, refresh=5), "Invalid refresh: 5. Must be more than the 5 steps"),
    "until before the mask": (lambda: Mask(Sensitive(steps=5), 0.5, refresh=8, until=5), "Invalid until: 5. .*mask would never be made"),
    "until while measuring": (lambda: Mask(Sensitive(steps=5), 0.5, refresh=8, until=13), "Invalid until: 13. .*still measures then"),
    "rank": (lambda: PrincipalWeights(0), "Invalid rank: 0"),
    "vectors": (lambda: PrincipalWeights(vectors="all"), "Invalid vectors: 'all'. Must be 'refuse' or 'rest'"),
    "global": (lambda: Mask(PrincipalWeights(), 0.5, budget="global"), "budget='global' compares weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_out_of_range_are_refused_at_once(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_until_may_be_where_a_mask_has_been_made() -> None:
    mask = Mask(Sensitive(steps=5), 0.5, refresh=8, until=14)
    assert [mask.number(step) for step in (0, 4, 5, 7, 8, 12, 13, 16, 99)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert Mask(Sensitive(lambda: []), 0.5, refresh=1).number(3) == 3


# ---- PrincipalWeights


def matrix(shape: tuple[int, ...], rank: int = 6, noise: float = 0.15) -> nn.Parameter:
    """Of a rank, and noise that is as large as its entries but small beside its singular values."""
    draw = torch.Generator().manual_seed(3)
    rows, columns = shape[0], math.prod(shape[1:])
    low = torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw) / 10
    return nn.Parameter((low + noise * torch.randn(rows, columns, generator=draw)).view(shape))


def principal(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, from the whole decomposition."""
    u, s, v = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
    return best.view(weight.shape)


SHAPES = {"matrix": (120, 90), "wide": (40, 300), "convolution": (64, 16, 3, 3)}


def own(weight: nn.Parameter, rule: str | PrincipalWeights, density: float, seed: int = 0) -> ZOOptimizer:
    """An optimizer that has made its first mask, of one tensor that did not move."""
    optimizer = ZOOptimizer([("w", weight)], lr=0.0, seed=seed, mask=Mask(rule, density))
    optimizer.step(lambda: weight.square().sum())
    return optimizer


@pytest.mark.parametrize("density", [0.3, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_weights_of_the_best_approximation(shape: str, density: float) -> None:
    weight = matrix(SHAPES[shape])
    if weight.dim() == 4:
        weight = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
    expected = top_of({"w": principal(weight, 6)}, density)["w"]
    by_value = top_of({"w": weight.detach()}, density)["w"]
    optimizer = own(weight, PrincipalWeights(6), density)
    found = masks_of(optimizer)["w"]
    count = round(density * weight.numel())
    assert int(found.sum()) == count
    assert int((found != expected).sum()) <= max(2, 0.01 * count)
    assert int((found != by_value).sum()) > 0.1 * count
    assert isinstance(optimizer.masks.of(collect(optimizer.param_groups, {id(weight): "w"})[0].key), Listed) is (density < 0.02)


@pytest.mark.parametrize("rank", [90, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_approximation_of_full_rank_is_the_weights(dtype: torch.dtype, rank: int) -> None:
    weight = nn.Parameter(matrix((120, 90)).detach().to(dtype))
    expected = masks_of(own(nn.Parameter(weight.detach().clone()), "large_weights", 0.1))
    assert equal(masks_of(own(weight, PrincipalWeights(rank), 0.1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_seed_of_the_run_decides_and_nothing_else(dtype: torch.dtype) -> None:
    """Without a gap behind the rank the approximation depends on the draw."""
    made = {}
    for case, (run, host) in {"first": (1, 5), "again": (1, 6), "other": (2, 5)}.items():
        weight = nn.Parameter(matrix((200, 150), noise=3.0).detach().to(dtype))
        before = generators(host)
        made[case] = masks_of(own(weight, PrincipalWeights(10), 0.2, seed=run))
        assert generators() == before
    assert equal(made["first"], made["again"])
    assert not equal(made["first"], made["other"])


def test_the_hosts_autocast_does_not_reach_the_decomposition() -> None:
    made = []
    for enabled in (False, True):
        weight = matrix((120, 90))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            made.append(masks_of(own(weight, PrincipalWeights(6), 0.2)))
    assert equal(*made)


def test_a_refresh_decomposes_the_weights_of_then() -> None:
    weight = matrix((60, 50))
    optimizer = ZOOptimizer([("w", weight)], lr=1e-2, mask=Mask(PrincipalWeights(6), 0.2, refresh=2))
    for step in range(3):
        before = weight.detach().clone()
        optimizer.step(lambda: (weight @ torch.ones(50)).square().mean())
        if step != 1:
            expected = top_of({"w": principal(before, 6)}, 0.2)["w"]
            assert int((masks_of(optimizer)["w"] != expected).sum()) <= 6
    assert (weight != before).any()


def test_vectors_rest_or_are_refused() -> None:
    model, loss = made("an unused parameter")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"PrincipalWeights: '.*' is a vector.*Use PrincipalWeights\(vectors='rest'\)"):
        ZOOptimizer(model, mask=Mask(PrincipalWeights(4), 0.05)).step(loss)
    assert equal(before, snapshot(model))
    rest = PrincipalWeights(4, vectors="rest")
    optimizer = ZOOptimizer(model, lr=1e-2, weight_decay=0.1, mask=Mask(rest, {"*up.weight": 1.0, "*": 0.05}))
    optimizer.step(loss)
    found = masks_of(optimizer)
    for name, weight in model.named_parameters():
        share = 0 if weight.dim() < 2 else 1 if name.endswith("up.weight") else 0.05
        assert int(found[name].sum()) == round(share * weight.numel())
        assert torch.equal((weight != before[name]) & ~found[name], torch.zeros(weight.shape, dtype=torch.bool))
    named = ZOOptimizer(model, mask=Mask(PrincipalWeights(4), 0.05, exclude=("*bias", "gain"), frozen=("*norm.weight", "idle")))
    named.step(loss)
    assert masks_of(named)["gain"]
