"""Every rule: as many weights as asked for, which ones, errors before the first step."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, LanguageModel, next_token, snapshot
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.masks import (
    Blockwise,
    HalfLayers,
    LargeWeights,
    LayerSampling,
    Mask,
    MaskRule,
    NofM,
    Random,
    SmallWeights,
    Structured,
    Where,
)
from zo_lightning.engine.masks.report import shares
from zo_lightning.engine.masks.rules import Draw, Layer
from zo_lightning.engine.masks.select import band, counts_of_all, kth_smallest, lot
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.parameters import collect, names_of
from zo_lightning.engine.seeds import parameter_key

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return LanguageModel(blocks=4, width=64).to(dtype)


def kept(mask: Any, theta: Tensor) -> Tensor:
    """The mask as a whole."""
    if mask is None:
        return torch.ones(theta.shape, dtype=torch.bool)
    flat, step = theta.reshape(-1), 1 << 19
    return torch.cat([mask.keep(flat[at : at + step], at) for at in range(0, len(flat), step)]).view(theta.shape)


# ---- selection


@pytest.mark.parametrize("bits", [15, 26, 31, 63])
def test_kth_smallest_is_that_of_sorting(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    keys = torch.randint(0, 2**bits - 1, (3000,), generator=draw) & ~3
    keys[::5] = keys[7]
    order = keys.sort().values
    for k in (1, 2, 600, 1500, 2999, 3000):
        found, ties = kth_smallest(lambda: iter(keys.split(700)), bits, k)
        assert found == order[k - 1]
        assert ties == k - int((keys < found).sum())


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_band_is_the_first_of_a_stable_sort(dtype: torch.dtype, largest: bool) -> None:
    theta = tensor(1500, 901, dtype=dtype)
    theta[3] = theta[700] = 0.5  # ties beyond those of the dtype
    size = theta.abs().double().reshape(-1)
    order = (-size if largest else size).argsort(stable=True)
    for count in (1, 777, theta.numel() // 4, theta.numel() - 1, theta.numel()):
        expected = torch.zeros(theta.numel(), dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(kept(band(theta, count, largest), theta).reshape(-1), expected)


def test_a_band_of_equal_weights_is_the_first_of_them() -> None:
    theta = torch.ones(100)
    assert torch.equal(kept(band(theta, 25), theta), torch.arange(100) < 25)


@pytest.mark.parametrize("count", [1, 50, 400_000, 1_000_000])
def test_lots_are_as_many_as_asked_for_and_by_chance(count: int) -> None:
    theta = tensor(1000, 1000)
    mask = lot(3, 5, theta, count)
    whole = kept(mask, theta)
    assert abs(int(whole.sum()) - count) <= 1 + count * 1e-6
    index = torch.randint(0, theta.numel(), (999,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(mask.at(index, theta.reshape(-1)[index]), whole.reshape(-1)[index])
    if count == 400_000:
        rows = whole.double().mean(1)
        spread = (0.4 * 0.6 / 1000) ** 0.5
        assert abs(rows - 0.4).max() < 5 * spread
        other = kept(lot(4, 5, theta, count), theta)
        assert abs(float((whole & other).double().mean()) - 0.16) < 5 * (0.16 * 0.84 / 1e6) ** 0.5


def test_a_global_budget_is_one_sort_of_all_layers() -> None:
    tensors = [tensor(300, 20, seed=1), 3 * tensor(50, 50, seed=2), torch.zeros(40)]
    size = torch.cat([t.abs().reshape(-1) for t in tensors])
    for largest in (False, True):
        order = (-size if largest else size).argsort(stable=True)[:2000]
        owner = torch.cat([torch.full((t.numel(),), i) for i, t in enumerate(tensors)])[order]
        assert counts_of_all(tensors, 2000, largest) == torch.bincount(owner, minlength=3).tolist()


# ---- rules on a model


def shares_of(mask: Mask, net: nn.Module, steps: int = 1) -> tuple[ZOOptimizer, list[Any]]:
    optimizer = ZOOptimizer(net, lr=1e-3, mask=mask)
    found: list[Any] = []
    optimizer.masks.listeners.append(lambda masks, trained: found.append(shares(masks, trained)))
    for _ in range(steps):
        optimizer.step(next_token(net))
    return optimizer, found


@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [SmallWeights(), LargeWeights(), Random()], ids=lambda rule: rule.name)
def test_the_density_is_the_one_asked_for(rule: MaskRule, dtype: torch.dtype, density: float) -> None:
    _, (found,) = shares_of(Mask(rule, density), model(dtype))
    for share in found:
        assert abs(share.trained - density * share.numel) <= 0.5
    total = sum(share.numel for share in found)
    assert abs(sum(share.trained for share in found) / total - density) < 1e-3


def test_n_of_m() -> None:
    net = model()
    _, (found,) = shares_of(Mask(NofM(1, 4), exclude="gain"), net)
    assert all(share.density == 0.25 for share in found if share.name != "gain")
    theta = tensor(6, 8)
    theta[0] = 1.0
    chosen = NofM(2, 4).choose([Layer("w", 1, theta)], {1: 0}, Draw(0, 0))
    groups, inside = theta.reshape(-1, 4).abs(), kept(chosen[1], theta).reshape(-1, 4)
    assert (inside.sum(1) == 2).all()
    assert inside[0].tolist() == [True, True, False, False]
    assert all(group[own].min() >= group[~own].max() for group, own in zip(groups, inside, strict=True))


def blocks(found: list[Any]) -> set[str]:
    """The blocks that train anything."""
    return {match[1] for share in found if share.trained and (match := re.search(r"blocks\.(\d+)\.", share.name))}


def test_half_of_each_blocks_modules_drawn_anew() -> None:
    _, found = shares_of(Mask(HalfLayers(), refresh=1), model(), steps=8)
    trained = [{share.name for share in now if share.trained} for now in found]
    assert len({frozenset(names) for names in trained}) > 4
    for names in trained:
        assert "embed.weight" in names
        for block in range(4):
            matrices = {n.rpartition(".")[0] for n in names if f"blocks.{block}." in n and ("attention" in n or "up" in n or "down" in n)}
            assert len(matrices) == 2
    assert set.union(*trained) == {share.name for share in found[0]}


def test_layers_are_sampled_by_weight_without_replacement() -> None:
    _, found = shares_of(Mask(LayerSampling(2), refresh=1), model(), steps=20)
    assert all(len(blocks(now)) == 2 for now in found)
    assert set.union(*map(blocks, found)) == {"0", "1", "2", "3"}
    _, found = shares_of(Mask(LayerSampling(1, weights=(0, 1, 3, 0)), refresh=1), model(), steps=60)
    drawn = [next(iter(blocks(now))) for now in found]
    assert set(drawn) == {"1", "2"}
    assert 35 <= drawn.count("2") <= 55
    net = model()
    with torch.no_grad():
        net.get_parameter("blocks.3.up.weight").view(-1)[::50] *= 30
    _, found = shares_of(Mask(LayerSampling(1, by="outliers"), refresh=1), net, steps=4)
    assert [blocks(now) for now in found] == [{"3"}] * 4


def test_blocks_take_turns() -> None:
    _, found = shares_of(Mask(Blockwise(), refresh=2), model(), steps=12)
    assert [blocks(now) for now in found] == [{"0"}, {"1"}, {"2"}, {"3"}, set(), {"0"}]
    assert {share.name for share in found[4] if share.trained} == {s.name for s in found[4] if not s.name.startswith("blocks")}


@pytest.mark.parametrize("by", ["random", "large", "small"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_structured_masks_are_whole_groups_of_lines(axis: str, by: str) -> None:
    weight, bias = tensor(32, 64), tensor(32)
    layers = [Layer("q.weight", 1, weight), Layer("q.bias", 2, bias), Layer("norm.weight", 3, tensor(32))]
    chosen = Structured(axis, 8, by).choose(layers, {1: 512, 2: 8, 3: 8}, Draw(0, 0))
    inside = kept(chosen[1], weight)
    lines = inside.all(1) if axis == "rows" else inside.all(0)
    assert int(inside.sum()) == 512
    assert torch.equal(inside, (lines[:, None] if axis == "rows" else lines[None, :]).expand(32, 64))
    groups = lines.view(-1, 8)
    assert (groups.all(1) == groups.any(1)).all()
    assert 3 not in chosen
    assert (2 in chosen) is (axis == "rows")
    if axis == "rows":
        assert torch.equal(kept(chosen[2], bias), lines)
    if by != "random":
        norms = (weight if axis == "rows" else weight.t()).reshape(len(groups), -1).square().sum(1)
        own = groups.all(1)
        assert (norms[own].min() > norms[~own].max()) if by == "large" else (norms[own].max() < norms[~own].min())


def test_the_users_own() -> None:
    _, (found,) = shares_of(Mask(Where(lambda name, w: w.abs() > w.abs().median() if w.dim() > 1 else False)), model())
    counts = {share.name: share.density for share in found}
    assert counts["blocks.0.up.weight"] == pytest.approx(0.5, abs=1e-3)
    assert counts["blocks.0.up.bias"] == 0


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize(
    "mask", [Mask("blockwise", refresh=1), Mask("random", 0.005, refresh=2), Mask("n_of_m", frozen="embed*", exclude=("*bias", "gain"))]
)
def test_nothing_else_moves(mask: Mask, weights: str) -> None:
    net = model()
    optimizer = ZOOptimizer(net, lr=1e-2, weight_decay=0.1, weights=weights, mask=mask)
    names = names_of(net)
    for _ in range(3):
        before = snapshot(net)
        optimizer.step(next_token(net))
        moved = 0
        for p in collect(optimizer.param_groups, names):
            inside = (
                kept(optimizer.masks.of(p.key), before[p.name]) if optimizer.masks.trains(p.key) else torch.zeros(p.tensor.shape).bool()
            )
            now, then = p.tensor.detach(), before[p.name]
            assert torch.equal(now[~inside], then[~inside]), p.name
            moved += int((now != then).sum())
            assert (now[inside] != then[inside]).double().mean() > 0.9 if inside.any() else True
        assert moved


def test_few_weights_are_a_list_and_cost_no_copy() -> None:
    net = model()
    optimizer, _ = shares_of(Mask("small_weights", 0.01), net)
    assert all(isinstance(optimizer.masks.of(parameter_key(name)), Listed) for name in ("embed.weight", "blocks.0.up.weight"))
    assert optimizer.residency.scratch_bytes() == 0


# ---- what is refused

BAD: dict[str, tuple[Any, str]] = {
    "rule": (lambda: Mask("smal_weights", 0.5), "'smal_weights' is not known. Use one of 'small_weights'"),
    "no density": (lambda: Mask("random"), "needs density="),
    "zero": (lambda: Mask("random", 0.0), r"Invalid density: 0.0. Must be a finite number > 0 and <= 1"),
    "above one": (lambda: Mask("random", 1.5), "Invalid density: 1.5"),
    "text": (lambda: Mask("random", "a half"), "Invalid density: 'a half'"),
    "a mapping": (lambda: Mask("random", {"*": -1}), r"Invalid density of '\*': -1"),
    "an empty mapping": (lambda: Mask("random", {}), "an empty mapping"),
    "a schedule without refresh": (lambda: Mask("random", lambda step: 0.5), "give refresh="),
    "density of its own": (lambda: Mask("half_layers", 0.5), "does nothing with HalfLayers"),
    "refresh": (lambda: Mask("random", 0.5, refresh=0), "Invalid refresh: 0"),
    "until": (lambda: Mask("random", 0.5, until=5), "until=5 does nothing without refresh="),
    "budget": (lambda: Mask("random", 0.5, budget="block"), "budget='block' is not known"),
    "global": (lambda: Mask("random", 0.5, budget="global"), "budget='global' compares weights"),
    "n above m": (lambda: NofM(5, 4), "at most m=4"),
    "layers": (lambda: LayerSampling(0), "Invalid layers: 0"),
    "weights": (lambda: LayerSampling(1, weights=(0.0, 0.0)), "Invalid weights"),
    "axis": (lambda: Structured("heads"), "Invalid axis: 'heads'"),
    "include": (lambda: Mask("random", 0.5, include=[3]), "Invalid include"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_out_of_range_are_refused_at_once(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


LATE: dict[str, tuple[Mask, str]] = {
    "no such layer": (Mask("random", 0.5, exclude="*upp.weight"), r"'\*upp.weight' fits no trained layer.*blocks.\d.up.weight"),
    "a density that another hides": (
        Mask("random", {"*": 0.5, "*weight": 0.1}),
        r"density: '\*' stands before '\*weight' and fits its layers, such as '[a-z.0-9]*weight'; .* Put '\*weight' first",
    ),
    "a layer without density": (Mask("random", {"*weight": 0.5}), r"no pattern fits the layer 'gain'"),
    "nothing left": (Mask(Where(lambda name, w: False)), "leaves nothing to train"),
    "too few": (Mask("random", 1e-6), "leaves nothing to train"),
    "rows": (Mask(NofM(2, 5)), "which 5 does not divide"),
    "groups": (Mask(Structured(group=7), 0.5), "which 7 does not divide"),
    "a schedule out of range": (Mask("random", lambda step: 2.0, refresh=1), "Invalid density at step 0: 2.0"),
    "shape": (Mask(Where(lambda name, w: torch.ones(3))), "a torch.float32 tensor of shape"),
    "blocks": (Mask(LayerSampling(9)), "Invalid layers: 9. There are 4 blocks"),
}


@pytest.mark.parametrize("case", LATE)
def test_masks_that_do_not_fit_are_refused_before_the_first_step(case: str) -> None:
    mask, message = LATE[case]
    net = model()
    before, calls = snapshot(net), []
    with pytest.raises(ValueError, match=message):
        ZOOptimizer(net, lr=1e-3, mask=mask).step(lambda: calls.append(1))  # type: ignore[arg-type, return-value]
    assert not calls
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_rules_of_blocks_need_blocks() -> None:
    net = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="No repeated blocks"):
        ZOOptimizer(net, mask=Mask("blockwise")).step(lambda: net(torch.ones(1, 4)).sum())
