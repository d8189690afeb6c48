"""Coordinatewise: finite differences against torch.optim and autograd, masks, residencies, feature reuse, batches, replay and resume."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_tools
import pytest
import torch
import torch.nn.functional as F
from engine_kinds import kinds
from engine_models import RESIDENCIES, mean_square, mlp, regression, same, snapshot
from lightning_models import HOST_WARNINGS, lit, loader, loss_of, net, state, trainer
from torch import Tensor, nn
from trajectory_tools import Recorder

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import SparseMask
from zo_lightning.engine import SPSA, Coordinatewise, Momentum, TorchOptimizer, ZOOptimizer
from zo_lightning.engine.coordinates import MOST, Queries
from zo_lightning.engine.masks import Mask, Masks
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.noise import Basis, Place
from zo_lightning.engine.noise.basis import coordinate_of, seed_of
from zo_lightning.engine.objectives import Score
from zo_lightning.engine.residency import Offload
from zo_lightning.engine.reuse import Reuse
from zo_lightning.engine.trajectory import replay
from zo_lightning.engine.trajectory.records import LARGEST_VALUES

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]
EPS, LR = 1e-5, 0.05


# ---- the estimate


def differences(model: nn.Module, loss: Callable[[], Tensor], eps: float, central: bool) -> None:
    """p.grad of every parameter by finite differences, one element after another."""
    with torch.no_grad():
        here = loss()
        for p in model.parameters():
            gradient = torch.zeros_like(p)
            for index in range(p.numel()):
                flat, own = p.view(-1), p.view(-1)[index].clone()
                flat[index] = own + eps
                plus = loss()
                flat[index] = own - eps
                minus = loss()
                flat[index] = own
                gradient.view(-1)[index] = (plus - minus) / 2 / eps if central else (plus - here) / eps
            p.grad = gradient


@pytest.mark.parametrize("central", [False, True])
def test_100_steps_are_those_of_torch_sgd_on_finite_differences(central: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double(), regression()
    start, data = snapshot(model), (x[:, :4], y)
    other = copy.deepcopy(model)
    optimizer = ZOOptimizer(model, lr=LR, eps=1e-3, estimator=Coordinatewise(central=central), safeguard=None)
    plain = torch.optim.SGD(other.parameters(), lr=LR)
    for _ in range(100):
        optimizer.step(mean_square(model, data))
        differences(other, mean_square(other, data), 1e-3, central)
        plain.step()
    ends = snapshot(model), snapshot(other)
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-12
    assert float((ends[0]["0.weight"] - start["0.weight"]).abs().max()) > 0.1
    assert optimizer.forward_passes == 100 * (2 * 19 if central else 20)


@pytest.mark.parametrize("update", ["sign", "adam", Momentum(0.8, window=100), TorchOptimizer("SGD", momentum=0.8)])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_other_rules_are_those_of_torch(update: Any, weights: str) -> None:
    model, data = mlp(), regression()
    other = copy.deepcopy(model)
    optimizer = ZOOptimizer(model, lr=1e-3, eps=EPS, estimator=Coordinatewise(central=True), update=update, weights=weights)
    makes: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sign": lambda: torch.optim.SGD(other.parameters(), lr=1e-3),
        "adam": lambda: torch.optim.Adam(other.parameters(), lr=1e-3),
    }
    plain = makes.get(str(update), lambda: torch.optim.SGD(other.parameters(), lr=1e-3, momentum=0.8))()
    for _ in range(10):
        optimizer.step(mean_square(model, data))
        differences(other, mean_square(other, data), EPS, central=True)
        if update == "sign":
            for p in other.parameters():
                p.grad = torch.sign(p.grad)
        plain.step()
    ends = snapshot(model), snapshot(other)
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-9


def test_the_estimate_is_the_gradient_and_its_bias_is_that_of_theory() -> None:
    """(L(theta + eps e_i) - L(theta)) / eps = g_i + eps / 2 H_ii + O(eps^2); central differences have no such term."""
    model, data = mlp(), regression()
    loss = mean_square(model, data)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    curvature = []
    for p, g in zip(parameters, gradient, strict=True):
        rows = [torch.autograd.grad(one, p, retain_graph=True, allow_unused=True)[0] for one in g.flatten() if one.requires_grad]
        curvature += [0.0 if row is None else float(row.flatten()[i]) for i, row in enumerate(rows)]
    g = torch.cat([part.detach().flatten() for part in gradient])
    for central in (False, True):
        optimizer = ZOOptimizer(model, lr=0.0, eps=1e-3, estimator=Coordinatewise(central=central))
        optimizer.step(loss)
        values = torch.tensor(optimizer.report.values, dtype=torch.float64)
        found = (values[::2] - values[1::2]) / 2e-3 if central else (values[1:] - values[0]) / 1e-3
        expected = g if central else g + 1e-3 / 2 * torch.tensor(curvature)
        assert float((found - expected).abs().max()) < 2e-6
        assert central or float((found - g).abs().max()) > 1e-5


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("mask", [Mask("random", 0.05, refresh=2), Mask("random", 0.4), Mask("small_weights", 0.3), Mask("half_layers")])
def test_masks_are_the_coordinates(mask: Mask, weights: str) -> None:
    """Of every step exactly the mask's elements move, by their differences; and all residencies make the same bits."""
    if mask.rule.name == "half_layers":
        torch.manual_seed(0)
        model: nn.Module = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]).double()
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        loss = lambda net: net[1](net[0](x)).square().mean()  # noqa: E731
    else:
        model, data = mlp(), regression()
        loss = lambda net: F.mse_loss(net(data[0]), data[1])  # noqa: E731
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=Coordinatewise(), weights=weights, mask=mask)
    for _ in range(4):
        before = snapshot(model)
        other = copy.deepcopy(model)
        optimizer.step(lambda: loss(model))
        differences(other, lambda other=other: loss(other), EPS, central=False)
        moved = sum(int((tensor != before[name]).sum()) for name, tensor in snapshot(model).items())
        count = len(optimizer.report.values) - 1
        assert 0 < moved <= count < sum(p.numel() for p in model.parameters())
        for (name, now), p in zip(model.named_parameters(), other.parameters(), strict=True):
            step = (before[name] - now.detach()) / LR
            assert torch.allclose(step[step != 0], p.grad[step != 0], rtol=1e-4, atol=1e-8)


def test_all_residencies_have_the_same_bits_and_put_the_weights_back() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        ends = []
        for weights in RESIDENCIES:
            model, (x, y) = mlp(dtype=dtype), regression(dtype)
            before = snapshot(model)
            optimizer = ZOOptimizer(
                model, lr=0.0 if dtype == torch.bfloat16 else 1e-3, eps=0.05, estimator=Coordinatewise(), weights=weights, safeguard=None
            )
            for _ in range(3):
                optimizer.estimate(lambda model=model, x=x, y=y: (model(x) - y).float().square().mean())
                assert same(snapshot(model), before)
                optimizer.apply()
                before = snapshot(model)
            ends.append((optimizer.report.values, before))
        assert all(values == ends[0][0] and same(weights, ends[0][1]) for values, weights in ends)


def test_16_bit_weights_are_displaced_by_eps_in_the_mean() -> None:
    """Spacing 2**-8 at 0.75, eps a tenth of it: stochastic rounding, anew in every step."""
    model = nn.Linear(500, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 0.75)
    eps, seen = 2**-8 / 10, []
    optimizer = ZOOptimizer(model, lr=0.0, eps=eps, estimator=Coordinatewise(), safeguard=None)
    for _ in range(10):
        optimizer.step(lambda: model.weight.float().sum())
        seen += [value - optimizer.report.values[0] for value in optimizer.report.values[1:]]
    assert set(seen) == {0.0, 2**-8}
    share = sum(value > 0 for value in seen) / len(seen)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(seen)) ** 0.5


def test_micro_batches_are_the_batch() -> None:
    ends = []
    for pieces in (1, 4):
        model, (x, y) = mlp(), regression()
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=Coordinatewise(central=True))
        for _ in range(3):
            for rows in torch.arange(len(x)).chunk(pieces):
                optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
            optimizer.apply()
        ends.append(snapshot(model))
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-9


# ---- the basis as a noise


def test_the_basis_has_one_1() -> None:
    key = 0xFEDCBA9876543210
    place = Place(key, torch.Size((3, 4)), torch.device("cpu"))
    for element in range(12):
        seed = seed_of(key, element)
        assert 0 <= seed < 1 << 63
        assert coordinate_of(seed) == (key & 0xFFFFFFFF, element)
        expected = torch.zeros(12)
        expected[element] = 1.0
        assert torch.equal(Basis().values(seed, place, range(12)), expected)
        assert torch.equal(Basis().values(seed, place, range(5, 12)), expected[5:])
        index = torch.tensor([[3, 0], [element, 11]])
        assert torch.equal(Basis().values(seed, place, index), expected[index])
        assert not Basis().values(seed, place._replace(key=7), range(12)).any()


def test_sums_are_in_the_order_of_the_terms() -> None:
    """Momentum has an element several times; float32 addition does not commute over three terms."""
    place = Place(5, torch.Size((4,)), torch.device("cpu"))
    seeds = [seed_of(5, i) for i in (1, 3, 1, 1)]
    coefficients = [1.0, 2.0, 2.0**-24, 2.0**-24]
    total = Basis().total(seeds, coefficients, place, range(4), torch.float32)
    assert total.tolist() == [0.0, 1.0, 0.0, 2.0]
    turned = Basis().total(seeds[::-1], coefficients[::-1], place, range(4), torch.float32)
    assert turned.tolist() == [0.0, 1.0 + 2.0**-23, 0.0, 2.0]


# ---- feature reuse


KINDS = list(kinds())


class Counted:
    """How many calls were left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.skipped = self.run = 0
        plain = Reuse._replayed

        def counted(reuse: Reuse, module: nn.Module, forward: Any, *rest: Any) -> Any:
            ran = []
            result = plain(reuse, module, lambda *args, **kwargs: ran.append(1) or forward(*args, **kwargs), *rest)
            self.run, self.skipped = self.run + len(ran), self.skipped + (not ran)
            return result

        monkeypatch.setattr(Reuse, "_replayed", counted)


def density(model: nn.Module) -> Mask:
    return Mask("random", min(1.0, 120 / sum(p.numel() for p in model.parameters())))


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_reused_features_change_no_bit(name: str, central: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, weights, buffers; no message, but where a reuse could be proved wrong."""
    counted, found = Counted(monkeypatch), []
    for reuse in (True, False):
        model, loss = kinds()[name]
        optimizer = ZOOptimizer(
            model, lr=1e-3, eps=1e-2, estimator=Coordinatewise(central=central, reuse=reuse), safeguard=None, mask=density(model)
        )
        values = []
        for _ in range(2):
            optimizer.step(lambda model=model, loss=loss: loss(model))
            values.append(optimizer.report.values)
        found.append((values, snapshot(model), optimizer.forward_passes, torch.rand(1)))
        assert not any("forward" in vars(module) for module in model.modules())
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    if not name.startswith("left in"):
        assert counted.skipped > 20
        assert counted.run > 0


def test_what_runs_is_what_comes_behind_the_first_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 layers, a point of layer k runs layers k to 4."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    ran: list[int] = []
    for index, layer in enumerate(model):
        plain = layer.forward
        layer.forward = lambda x, plain=plain, index=index: ran.append(index) or plain(x)
    optimizer = ZOOptimizer(model, lr=0.0, estimator=Coordinatewise(), safeguard=None)
    x = torch.randn(2, 3)
    optimizer.step(lambda: model(x).square().mean())
    ran.clear()
    optimizer.step(lambda: model(x).square().mean())
    points = [3 * 3 + 3] * 4
    proofs = [2, 2, 2, 3]  # the first point and the recording; what is left out by most points is left out once before
    assert [ran.count(index) for index in range(4)] == [proof + sum(points[: index + 1]) for index, proof in enumerate(proofs)]


def test_hooks_of_users_run_at_every_point() -> None:
    model, data = mlp(), regression()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *args: calls.append(0))
    optimizer = ZOOptimizer(model, lr=0.0, eps=EPS, estimator=Coordinatewise())
    optimizer.step(mean_square(model, data))
    assert len(calls) >= 178


class Hidden(nn.Module):
    """Keeps a random state and a sum where nothing sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)

        class Aside:
            total: Any = 0.0

        self.aside = Aside()
        self.inner = Inner(self.aside)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.inner(self.first(x))) + self.aside.total


class Inner(nn.Module):
    def __init__(self, aside: Any) -> None:
        super().__init__()
        self.linear, self.aside = nn.Linear(10, 10), aside

    def forward(self, x: Tensor) -> Tensor:
        self.aside.total = self.linear(x).mean()
        return torch.tanh(x)


def test_a_model_that_hides_what_it_keeps_is_found_out() -> None:
    torch.manual_seed(0)
    model, x = Hidden(), torch.randn(4, 10)
    plain = copy.deepcopy(model)
    optimizer = ZOOptimizer(model, lr=0.0, eps=0.1, estimator=Coordinatewise(), safeguard=None)
    with pytest.warns(ZOWarning, match=r"Features are not reused from now on: before 'second\.weight'"):
        optimizer.step(lambda: model(x).square().mean())
    other = ZOOptimizer(plain, lr=0.0, eps=0.1, estimator=Coordinatewise(reuse=False), safeguard=None)
    other.step(lambda: plain(x).square().mean())
    assert optimizer.report.values == other.report.values


@pytest.mark.parametrize("reuse", [True, False])
def test_a_copy_of_the_model_is_another_model(reuse: bool) -> None:
    model, data = mlp(), regression()
    kept: list[nn.Module] = []

    def closure() -> Tensor:
        kept.append(copy.deepcopy(model))
        with torch.no_grad():
            for p in kept[-1].parameters():
                p.copy_((p * 4).round() / 4)
        return mean_square(kept[-1], data)()

    optimizer = ZOOptimizer(model, lr=0.0, eps=EPS, estimator=Coordinatewise(reuse=reuse), safeguard=None)
    expected = closure().item()
    optimizer.step(closure)
    assert optimizer.report is not None
    assert optimizer.report.values[0] == expected
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(mean_square(one, data)().item() != mean_square(model, data)().item() for one in kept[:3])


def test_what_goes_past_outputs_is_found_out_in_the_step_where_it_counts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, context: SimpleNamespace) -> Tensor:
            hidden = torch.tanh(self.linear(x))
            context.aside = context.aside + context.weight * hidden.square().mean()
            return hidden

    found = []
    for reuse in (True, False):
        torch.manual_seed(0)
        blocks, x = nn.ModuleList(Block() for _ in range(3)), torch.randn(5, 4)

        def loss(weight: float, blocks: Any = blocks, x: Tensor = x) -> Tensor:
            context = SimpleNamespace(aside=torch.zeros(()), weight=weight)
            for block in blocks:
                x = block(x, context)
            return x.square().mean() + context.aside

        optimizer = ZOOptimizer(blocks, lr=1e-3, eps=1e-3, estimator=Coordinatewise(reuse=reuse), safeguard=None)
        for step in range(3):
            with pytest.warns(ZOWarning, match="Features are not reused from now on") if reuse and step == 1 else nullcontext():
                optimizer.step(lambda step=step, loss=loss: loss(0.5 * step))
        found.append(optimizer.report.values)
    assert found[0] == found[1]


def test_tables_that_shorten_their_rows_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 1))
    optimizer = ZOOptimizer(model, lr=0.0, estimator=Coordinatewise(), safeguard=None)
    with pytest.raises(ValueError, match=r"'0.weight' is a table with max_norm=1.0.*elements are put back by themselves"):
        optimizer.step(lambda: model(torch.tensor([0, 1])).square().mean())


def test_compiled_modules_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp(), regression()
    model[0].compile(backend="eager")
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=Coordinatewise())
    with pytest.warns(ZOWarning, match="Features are not reused: '0' is compiled"):
        optimizer.step(mean_square(model, data))
    plain, data = mlp(), regression()
    other = ZOOptimizer(plain, lr=LR, eps=EPS, estimator=Coordinatewise())
    other.step(mean_square(plain, data))
    assert optimizer.report.values == other.report.values


def test_an_exception_leaves_everything_as_it_was() -> None:
    model, (x, y) = mlp(), regression()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=Coordinatewise())
    for fail_at in (1, 2, 5, 100):
        calls = iter(range(1, 1000))

        def loss(calls: Iterator[int] = calls, fail_at: int = fail_at) -> Tensor:
            if next(calls) == fail_at:
                raise OSError("no data")
            return F.mse_loss(model(x), y)

        with pytest.raises(OSError, match="no data"):
            optimizer.step(loss)
        assert same(snapshot(model), before)
        assert not any("forward" in vars(module) for module in model.modules())
        optimizer.discard()


# ---- batches


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("name", ["mlp", "shared", "tied head", "functional head", "gpt2", "bert", "transformer"])
def test_batches_are_single_points_up_to_rounding(name: str, central: bool) -> None:
    found = []
    for batch in (1, 7):
        model, loss = kinds(torch.float64)[name]
        optimizer = ZOOptimizer(
            model, lr=0.0, eps=1e-3, estimator=Coordinatewise(central=central, batch=batch), safeguard=None, mask=density(model)
        )
        calls = []
        optimizer.step(lambda model=model, loss=loss, calls=calls: calls.append(1) or loss(model))
        found.append((torch.tensor(optimizer.report.values, dtype=torch.float64), len(calls), optimizer.forward_passes))
    assert float((found[0][0] - found[1][0]).abs().max()) < 1e-6 * float(found[0][0].abs().max())
    assert found[1][1] < found[0][1] / 2
    assert found[1][2] == found[0][2]


def test_what_has_no_batch_is_evaluated_one_at_a_time_and_says_so() -> None:
    found = []
    for batch in (1, 8):
        model, (x, y) = mlp(), regression()
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=Coordinatewise(batch=batch))
        loss = lambda model=model, x=x, y=y: F.mse_loss(model(x), y).item()  # noqa: E731
        said = pytest.warns(ZOWarning, match=r"batch= of Coordinatewise does nothing here: '0\.weight'") if batch > 1 else nullcontext()
        with said:
            optimizer.step(loss)
        optimizer.step(loss)
        found.append((optimizer.report.values, snapshot(model), optimizer.forward_passes))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_a_weight_that_is_read_by_another_name_is_no_batch() -> None:
    model, (x, y) = mlp(), regression()
    weight = model[0].weight
    optimizer = ZOOptimizer(model, lr=0.0, eps=EPS, estimator=Coordinatewise(batch=8))
    with pytest.warns(ZOWarning, match=r"'0\.weight' is read by another name than its module's attribute"):
        optimizer.step(lambda: F.mse_loss(model[3](torch.tanh(F.linear(x, weight))), y))
    other = ZOOptimizer(mlp(), lr=0.0, eps=EPS, estimator=Coordinatewise())
    other.step(mean_square(other.module, (x, y)))
    assert torch.tensor(optimizer.report.values).allclose(torch.tensor(other.report.values), rtol=1e-12)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": lambda w: w,
    "transposed": lambda w: w.T,
    "data": lambda w: w.data,
    "detached": lambda w: w.detach(),
    "rows": lambda w: w.detach()[:4],
}


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("view", VIEWS)
def test_what_has_the_memory_of_a_weight_counts_with_batches_too(view: str, when: str) -> None:
    found = []
    for batch in (1, 4):
        model = nn.Linear(6, 5, bias=False)
        nn.init.ones_(model.weight)
        weight = model.weight
        kept = VIEWS[view](weight)
        optimizer = ZOOptimizer(model, lr=0.1, eps=EPS, estimator=Coordinatewise(batch=batch, reuse=False), safeguard=None)
        with pytest.warns(ZOWarning, match=r"'weight' is read by another name") if batch > 1 else nullcontext():
            optimizer.step(lambda kept=kept, weight=weight: (kept if when == "before" else VIEWS[view](weight)).square().sum())
        found.append(model.weight.detach())
    assert bool((found[0] < 1).any())
    assert torch.equal(found[0], found[1])


def test_batches_are_evaluated_by_the_function_that_single_points_are() -> None:
    """torch's fast path of transformer layers puts zeros at padded positions."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.layers(x, src_key_padding_mask=mask).mean(1))

    torch.manual_seed(0)
    model = Encoder().eval()
    x, mask = torch.randn(2, 6, 8), torch.tensor([[0] * 6, [0] * 4 + [1] * 2]).bool()
    optimizer = ZOOptimizer(model, lr=0.0, eps=1e-3, estimator=Coordinatewise(batch=4, reuse=False), safeguard=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of nested tensors, and ours where it has no batches
        optimizer.step(lambda: model(x, mask).square().mean())
    values = torch.tensor(optimizer.report.values)
    assert float((values[1:] - values[0]).abs().max()) < 1e-3


def test_a_batch_leaves_nothing_behind_that_can_not_be_read() -> None:
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.log = nn.Linear(4, 4), nn.Linear(4, 2), []

        def forward(self, x: Tensor) -> Tensor:
            self.last = torch.tanh(self.a(x))
            self.log.append(self.last.mean())
            return self.b(self.last)

    model = Leaving()
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-3, estimator=Coordinatewise(batch=4, reuse=False), safeguard=None)
    optimizer.step(lambda: model(torch.ones(5, 4)).square().mean())
    assert float(model.last.sum()) == float(model.last.sum())
    assert all(math.isfinite(value) for value in model.log)


# ---- replay, resume, hosts


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_log_is_replayed_bit_for_bit(dtype: torch.dtype, weights: str, tmp_path: Path) -> None:
    model, (x, y) = mlp(dtype=dtype), regression(dtype)
    options = {"estimator": Coordinatewise(), "weights": weights, "weight_decay": 0.1, "safeguard": None}
    optimizer = ZOOptimizer(model, lr=1e-2, eps=0.05, **options)
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for _ in range(6):
        optimizer.step(lambda: (model(x) - y).float().square().mean())
    recorder.writer.close()
    again = mlp(dtype=dtype)
    assert replay(again, tmp_path / "run.zolog") == 6
    assert same(snapshot(again), snapshot(model))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("mask", [None, Mask("random", 0.2, refresh=2), Mask("small_weights", 0.3, refresh=2)])
def test_a_resumed_run_goes_on_bit_for_bit(mask: Mask | None, inside: bool) -> None:
    """Also from the middle of an accumulation window."""

    def fresh() -> tuple[nn.Module, ZOOptimizer]:
        model = mlp()
        return model, ZOOptimizer(model, lr=LR, eps=EPS, estimator=Coordinatewise(), update="adam", mask=mask)

    x, y = regression()

    def half(model: nn.Module, optimizer: ZOOptimizer, part: int) -> None:
        optimizer.estimate(mean_square(model, (x[part::2], y[part::2])), weight=0.5)

    model, optimizer = fresh()
    for _ in range(3):
        half(model, optimizer, 0)
        half(model, optimizer, 1)
        optimizer.apply()
    if inside:
        half(model, optimizer, 0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed = fresh()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for each, run in ((model, optimizer), (other, resumed)):
        if not inside:
            half(each, run, 0)
        half(each, run, 1)
        run.apply()
        run.step(mean_square(each, (x, y)))
    assert same(snapshot(other), snapshot(model))
    assert resumed.forward_passes == optimizer.forward_passes


def test_lightning_and_hugging_face(tmp_path: Path) -> None:
    """The engine's steps in Lightning; in the Trainer the same values with and without reuse, and in batches."""
    model, data = net(), list(loader())
    mask = density(model)
    optimizer = ZOOptimizer(model, lr=1e-3, estimator=Coordinatewise(), mask=mask)
    for step in range(3):
        optimizer.step(lambda step=step: loss_of(model, data[step % len(data)]))
    module = lit()()
    trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, estimator=Coordinatewise(), mask=mask), max_steps=3).fit(module, loader())
    assert same(state(module.net), state(model))
    found = []
    for estimator in ("coordinatewise", Coordinatewise(reuse=False), Coordinatewise(batch=16)):
        charts = [SparseMask("random", 0.01, summary=False)]
        host = hf_tools.trainer(tmp_path, zo_estimator=estimator, zo_lr=1e-3, callbacks=charts, max_steps=2)
        host.train()
        found.append((host.zo_optimizer.report, hf_tools.weights(host.model)))
    assert found[0][0].values == found[1][0].values
    assert hf_tools.same(found[0][1], found[1][1])
    assert found[2][0].loss == pytest.approx(found[0][0].loss, rel=1e-5)


# ---- errors


def build(**options: Any) -> ZOOptimizer:
    return ZOOptimizer(mlp(), lr=LR, **{"estimator": Coordinatewise(), **options})


class Sized(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size) for size in sizes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coordinatewise(central=1), r"Invalid central: 1\. Must be True or False"),
        (lambda: Coordinatewise(reuse="yes"), r"Invalid reuse: 'yes'\. Must be True or False"),
        (lambda: Coordinatewise(batch=0), r"Invalid batch: 0\. Must be an integer >= 1"),
        (lambda: build(noise="gaussian"), r"Invalid noise: 'gaussian' does nothing with estimator=Coordinatewise.*Leave noise out"),
        (lambda: build(noise=Basis(), estimator=SPSA()), r"Invalid noise: .* with estimator=SPSA.*It is for Coordinatewise"),
        (lambda: build(weights=Offload()), r'writes single weights in memory\. Use weights="auto"'),
        (
            lambda: build(estimator=Coordinatewise(batch=2), objective=Score(lambda: 0.0, maximize=True)),
            r"Invalid batch: 2 with objective=.*Use batch=1",
        ),
        (lambda: Coordinatewise().times(2), r'the same points on all processes.*Use parallel="data='),
        (
            lambda: ZOOptimizer(Sized(60000, 6000), estimator=Coordinatewise()).step(lambda: 0.0),
            r"at most 65534 a step, and 66000 .*'1'.*mask",
        ),
        (lambda: ZOOptimizer(Sized(32768), estimator=Coordinatewise(central=True)).step(float), r"at most 32767 a step, and 32768"),
    ],
)
def test_errors_say_what_to_do(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


def test_the_largest_number_of_points_fits_a_step_log() -> None:
    assert MOST + 1 <= LARGEST_VALUES
    optimizer = ZOOptimizer(Sized(65534), lr=0.0, estimator=Coordinatewise(reuse=False))
    assert len(optimizer._new_window().points) == LARGEST_VALUES


def test_keys_that_agree_in_their_low_bits_are_refused() -> None:
    trained = list(build().residency.trained)
    object.__setattr__(trained[1], "key", trained[0].key ^ (1 << 40))
    with pytest.raises(ValueError, match=r"can't tell the weights of '3\.weight' and '0\.weight' apart"):
        Queries(Basis(), 0, 0, trained, Masks()).coordinates(1)
