"""backprop=: the last layers' gradients against autograd, steps against a naive reference, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_models import RESIDENCIES, Closure, LanguageModel, distance, mean_square, mlp, next_token, regression, same, snapshot
from reference.noise import evaluation_seed, query_seed, whole
from reference.spsa import Settings, spsa_step
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from zo_lightning.engine import SPSA, Backprop, Conservative, ForwardGradient, OneSided, RankSGD, ZOOptimizer, ZOWarning
from zo_lightning.engine.masks import Mask, Sensitive
from zo_lightning.engine.objectives import Score
from zo_lightning.engine.residency import Offload
from zo_lightning.engine.trajectory import Trajectory

EPS, LR, STEPS = 1e-2, 1e-3, 5
Make = Callable[[], nn.Module]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return LanguageModel().double()


TASKS: dict[str, tuple[Make, Callable[[nn.Module], Closure], str]] = {
    "head": (lambda: mlp(dropout=0.3), lambda model: mean_square(model, regression()), "3.*"),
    "first layer": (mlp, lambda model: mean_square(model, regression()), "0.*"),
    "last block and norm, before a head that is the embedding": (language_model, next_token, "blocks.1.* norm.*"),
    "a part of each block": (language_model, next_token, "blocks.*.down.*"),
    "the embedding, read by a function behind all blocks": (language_model, next_token, "embed*"),
    "a vector": (language_model, next_token, "gain"),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "betas": (0.8, 0.9)},
    "SGD": {"lr": 0.1, "momentum": 0.5},
}


def fits(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def by_hand(model: nn.Module, loss: Callable[[nn.Module], Closure], patterns: str, settings: Settings, first: Any, steps: int) -> None:
    """Every evaluation on a copy whose weights are overwritten, by autograd; the front by the reference of SPSA."""
    own = [name for name, _ in model.named_parameters() if fits(name, patterns)]
    front = [name for name, _ in model.named_parameters() if name not in own]
    optimizer = first([model.get_parameter(name) for name in own])
    for step in range(steps):
        gradients: list[tuple[Tensor, ...]] = []

        def evaluate(weights: dict[str, Tensor], step: int = step, gradients: Any = gradients) -> float:
            twin = copy.deepcopy(model)
            with torch.no_grad():
                for name in front:
                    twin.get_parameter(name).copy_(weights[name])
            torch.manual_seed(evaluation_seed(settings.seed, step, 0))
            value = loss(twin)()
            gradients.append(torch.autograd.grad(value, [twin.get_parameter(name) for name in own]))
            return float(value.detach())

        theta, _ = spsa_step({name: model.get_parameter(name).detach().clone() for name in front}, evaluate, settings, step)
        with torch.no_grad():
            for name in front:
                model.get_parameter(name).copy_(theta[name])
        for name, each in zip(own, zip(*gradients, strict=True), strict=True):
            model.get_parameter(name).grad = torch.stack(each).mean(0)
        optimizer.step()


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("name", TASKS)
def test_steps_are_those_of_a_naive_reference(name: str, weights: str) -> None:
    make, loss, patterns = TASKS[name]
    for first, options in OPTIMIZERS.items():
        model, expected = make(), make()
        decay = {"weight_decay": 0.1} if first == "AdamW" else {"weight_decay": 0.0}
        hybrid = Backprop(patterns, optimizer=first, **decay, **options)
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=SPSA(2), weight_decay=0.2, backprop=hybrid)
        start = snapshot(model)
        for _ in range(STEPS):
            optimizer.step(loss(model))
        settings = Settings(LR, EPS, weight_decay=0.2, queries=2)
        by_hand(expected, loss, patterns, settings, functools.partial(getattr(torch.optim, first), **decay, **options), STEPS)
        assert distance(snapshot(model), snapshot(expected)) < 1e-9  # Adam divides the rounding of gradients that are 0 by 1e-8
        assert all(not torch.equal(start[key], tensor) for key, tensor in snapshot(model).items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_the_front_moves_as_if_the_rest_were_frozen(weights: str, dtype: torch.dtype) -> None:
    model, frozen, data = mlp(dtype=dtype), mlp(dtype=dtype), regression(dtype)
    frozen[3].requires_grad_(False)
    for one, given in ((model, {"backprop": "3.*"}), (frozen, {})):
        ZOOptimizer(one, lr=LR, eps=EPS, weights=weights, **given).step(mean_square(one, data))
    assert torch.equal(model[0].weight, frozen[0].weight)
    assert not torch.equal(model[0].weight, mlp(dtype=dtype)[0].weight)
    assert not torch.equal(model[3].weight, frozen[3].weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_the_gradient_is_the_mean_of_autograds_at_the_points_bit_for_bit(weights: str, dtype: torch.dtype) -> None:
    model, data = mlp(dtype=dtype), regression(dtype)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, backprop=Backprop("3.*", lr=1.0, optimizer="SGD"))
    z = torch.from_numpy(whole("rademacher", query_seed(0, 0, 0), "0.weight", 160)).view(16, 10).to(dtype)
    found = []
    for sign in (1, -1):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].weight.add_(sign * EPS * z) if sign > 0 or weights != "inplace" else twin[0].weight.add_(EPS * z).sub_(2 * EPS * z)
        found.append(torch.autograd.grad(mean_square(twin, data)(), list(twin[3].parameters())))
    before = [p.detach().clone() for p in model[3].parameters()]
    optimizer.step(mean_square(model, data))
    for p, start, plus, minus in zip(model[3].parameters(), before, *found, strict=True):
        assert torch.equal(p.detach(), start - (plus + minus) / 2)


def test_the_bias_is_that_of_the_square_of_eps() -> None:
    biases = []
    for eps in (0.02, 0.04):
        model, data = mlp(), regression()
        exact = torch.autograd.grad(mean_square(model, data)(), [model[3].weight])[0]
        optimizer = ZOOptimizer(model, lr=0.0, eps=eps, safeguard=None, backprop=Backprop("3.*", lr=1.0, optimizer="SGD"))
        start = model[3].weight.detach().clone()
        optimizer.step(mean_square(model, data))
        biases.append(float((start - model[3].weight.detach() - exact).norm()))
    assert biases[1] / biases[0] == pytest.approx(4.0, rel=0.05)


def test_where_the_weights_are_a_point_the_gradient_is_taken_there_alone() -> None:
    model, data = mlp(), regression()
    exact = torch.autograd.grad(mean_square(model, data)(), list(model[3].parameters()))
    start = [p.detach().clone() for p in model[3].parameters()]
    graphs: list[bool] = []
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=OneSided(3), backprop=Backprop("3.*", lr=1.0, optimizer="SGD"))

    def loss() -> Tensor:
        value = mean_square(model, data)()
        graphs.append(value.requires_grad)
        return value

    optimizer.step(loss)
    assert graphs == [True, False, False, False]
    assert all(torch.equal(p, s - g) for p, s, g in zip(model[3].parameters(), start, exact, strict=True))


@pytest.mark.parametrize(
    "estimator", [SPSA(3), OneSided(2), OneSided(3, normalized=True), Conservative(), RankSGD(4), RankSGD(4, search=2)]
)
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_micro_batches_are_one_batch(weights: str, estimator: Any) -> None:
    ends = []
    for pieces in (1, 4):
        model, (x, y) = mlp(), regression()
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=estimator, backprop=Backprop("3.*", lr=1e-2))
        for _ in range(5):
            for rows in torch.arange(len(x)).chunk(pieces):
                estimate = optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
                assert not estimate.output.requires_grad
            optimizer.apply()
        ends.append(snapshot(model))
    assert distance(*ends) < 1e-11


@pytest.mark.parametrize("update", ["sign", "momentum", "adam"])
@pytest.mark.parametrize("mask", [None, Mask("random", 0.3), Mask("small_weights", 0.3)])
def test_update_rules_and_masks_are_of_the_front(update: str, mask: Mask | None) -> None:
    model, frozen, data = mlp(), mlp(), regression()
    frozen[3].requires_grad_(False)
    for one, given in ((model, {"backprop": "3.*"}), (frozen, {})):
        ZOOptimizer(one, lr=LR, eps=EPS, update=update, mask=mask, **given).step(mean_square(one, data))
    assert torch.equal(model[0].weight, frozen[0].weight)


def test_steps_that_measure_for_a_mask_move_nothing() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, mask=Mask(Sensitive(steps=2), 0.2), backprop="3.*")
    start = snapshot(model)
    for step in range(3):
        optimizer.step(mean_square(model, data))
        assert same(snapshot(model), start) is (step < 2)


# ---- memory, graphs, and what models do


def saved(make: Make, loss: Callable[[nn.Module], Closure], **given: Any) -> int:
    """Bytes that autograd keeps of a step's last evaluation."""
    model, sizes = make(), [0]
    inner = loss(model)

    def counted() -> Tensor:
        sizes[0] = 0
        storages: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                sizes[0] += storage.nbytes()
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return inner()

    ZOOptimizer(model, lr=LR, weights="inplace", **given).step(counted)
    return sizes[0]


def test_activations_are_kept_from_the_last_layers_on() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return LanguageModel("tied", blocks=8).double()

    none, last, two, first = (
        saved(make, next_token, **given)
        for given in ({}, {"backprop": "blocks.7.*"}, {"backprop": "blocks.6.* blocks.7.*"}, {"backprop": "blocks.0.*"})
    )
    assert none == 0
    assert 1.7 * last < two < 2.1 * last
    assert first > 2.5 * two


def test_a_gradient_of_something_else_is_said_for_its_memory() -> None:
    """transformers' enable_input_require_grads() does this."""

    def make() -> nn.Module:
        model = language_model()
        model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_(True))  # type: ignore[union-attr]
        return model

    few = saved(language_model, next_token, backprop="blocks.1.*")
    with pytest.warns(ZOWarning, match=r"requires a gradient and is no parameter of backprop=.*disable_input_require_grads"):
        many = saved(make, next_token, backprop="blocks.1.*")
    assert many > 1.5 * few


class Checkpointed(nn.Module):
    """The last block's activations are computed again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = LanguageModel(), reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner.embed(tokens) * self.inner.gain
        for block in self.inner.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return F.linear(self.inner.norm(x), self.inner.embed.weight)


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_gradient_checkpointing_changes_nothing(weights: str) -> None:
    ends = []
    for make in (language_model, lambda: Checkpointed(False).double()):
        torch.manual_seed(0)
        model = make()
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, backprop=Backprop("blocks.*", lr=1e-2))
        for _ in range(3):
            optimizer.step(next_token(model))
        ends.append(list(snapshot(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Inplace(nn.Module):
    """A tensor that the gradient needs is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(self.first(x))).mul_(2.0).mean(1, keepdim=True)


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_an_inplace_operation_on_what_the_gradient_needs_is_said(weights: str) -> None:
    model = Inplace().double()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ZOOptimizer(model, lr=LR, weights=weights, backprop="last*").step(mean_square(model, regression()))
    assert same(snapshot(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:weights=.exact. writes:zo_lightning.engine.messages.ZOWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole: bool) -> None:
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = LanguageModel("tied").float()
        if compiled:
            for part in [model] if whole else model.blocks:
                part.compile(backend="aot_eager")
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights="exact", backprop=Backprop("blocks.1.*", lr=1e-2))
        for _ in range(3):
            optimizer.step(next_token(model))
        ends.append(snapshot(model))
    assert distance(*ends) < 1e-4


@pytest.mark.parametrize("weights", ["exact", "copy"])
def test_16_bit_parameters_have_float32_values(weights: str) -> None:
    """Steps far below a unit in the last place add up; the model has their sum rounded to nearest."""
    model, data = mlp(dtype=torch.bfloat16), regression(torch.bfloat16)
    start = model[3].weight.detach().clone()
    optimizer = ZOOptimizer(model, lr=0.0, weights=weights, backprop=Backprop("3.*", lr=2e-5, weight_decay=0.0))
    for _ in range(100):
        optimizer.step(lambda: (model(data[0]) - data[1]).float().square().mean())
    masters = optimizer.state_dict()["zo"]["backprop"]["masters"]
    weight = next(master for master in masters.values() if master.shape == start.shape)
    assert weight.dtype == torch.float32
    assert float((weight - start.float()).abs().max()) == pytest.approx(100 * 2e-5, rel=0.2)
    assert torch.equal(model[3].weight, weight.to(torch.bfloat16))


def test_autocast() -> None:
    model, data = mlp(dtype=torch.float32), regression(torch.float32)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(model(data[0]).float(), data[1])

    expected = torch.autograd.grad(loss(), list(model[3].parameters()))
    start = [p.detach().clone() for p in model[3].parameters()]
    optimizer = ZOOptimizer(model, lr=LR, estimator=OneSided(), backprop=Backprop("3.*", lr=1.0, optimizer="SGD"))
    optimizer.step(loss)
    assert all(torch.equal(p, s - g) for p, s, g in zip(model[3].parameters(), start, expected, strict=True))


def test_the_norm_is_bounded() -> None:
    model, data = mlp(), regression()
    start = [p.detach().clone() for p in model[3].parameters()]
    ZOOptimizer(model, lr=LR, backprop=Backprop("3.*", lr=1.0, optimizer="SGD", max_norm=1e-3)).step(mean_square(model, data))
    moved = torch.cat([(p - s).flatten() for p, s in zip(model[3].parameters(), start, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-6)


def test_schedulers_scale_the_learning_rate_and_groups_have_their_decay() -> None:
    ends = []
    for hybrid in (True, False):
        model, (x, y) = mlp(), regression()
        groups = [{"params": [("0.weight", model[0].weight), ("3.weight", model[3].weight)], "weight_decay": 0.3}]
        groups.append({"params": [("3.bias", model[3].bias)], "weight_decay": 0.0})
        optimizer: Any
        if hybrid:
            optimizer = ZOOptimizer(groups, lr=0.02, module=model, backprop=Backprop("3.*", lr=0.01), estimator=OneSided(), safeguard=None)
        else:
            own = [{"params": [model[3].weight], "weight_decay": 0.3}, {"params": [model[3].bias], "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(own, lr=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        first = mlp()[0].weight
        for _ in range(4):
            with torch.no_grad():
                model[0].weight.copy_(first)  # the front stays
            if hybrid:
                optimizer.step(mean_square(model, (x, y)))
            else:
                optimizer.zero_grad()
                mean_square(model, (x, y))().backward()
                optimizer.step()
            scheduler.step()
        ends.append([p.detach().clone() for p in model[3].parameters()])
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(*ends, strict=True))


def test_an_objective_is_of_the_front_and_the_loss_of_the_rest() -> None:
    ends = []
    for objective in (None, Score(lambda preds, target: float((preds - target).abs().mean()), maximize=False)):
        model, (x, y) = mlp(), regression()
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, objective=objective, backprop=Backprop("3.*", lr=1e-2))

        def closure(model: Any = model, x: Tensor = x, y: Tensor = y) -> dict[str, Tensor]:
            out = model(x)
            return {"loss": F.mse_loss(out, y), "preds": out, "target": y}

        estimate = optimizer.estimate(closure, loss_of=lambda output: output["loss"])
        assert not any(tensor.requires_grad for tensor in estimate.output.values())
        optimizer.apply()
        ends.append(snapshot(model))
    assert not torch.equal(ends[0]["0.weight"], ends[1]["0.weight"])
    assert torch.equal(ends[0]["3.weight"], ends[1]["3.weight"])


# ---- states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("within", [False, True])
def test_a_run_goes_on_from_a_state_bit_for_bit(within: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model, (x, y) = mlp(dtype=dtype, dropout=0.3), regression(dtype)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, backprop=Backprop("3.*", lr=1e-2))

    def half(one: nn.Module, of: ZOOptimizer, rows: slice) -> None:
        of.estimate(lambda: (one(x[rows]) - y[rows]).float().square().mean(), weight=0.5)

    for step in range(6):
        half(model, optimizer, slice(0, 8))
        if step == 3 and within:
            torch.save((optimizer.state_dict(), snapshot(model)), tmp_path / "state.pt")
        half(model, optimizer, slice(8, 16))
        optimizer.apply()
        if step == 2 and not within:
            torch.save((optimizer.state_dict(), snapshot(model)), tmp_path / "state.pt")
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    again = mlp(dtype=dtype, dropout=0.3)
    again.load_state_dict(weights)
    resumed = ZOOptimizer(again, lr=LR, eps=EPS, backprop=Backprop("3.*", lr=1e-2))
    resumed.load_state_dict(state)
    for step in range(3, 6):
        if not (step == 3 and within):
            half(again, resumed, slice(0, 8))
        half(again, resumed, slice(8, 16))
        resumed.apply()
    assert same(snapshot(again), snapshot(model))


def test_a_copy_goes_on_by_itself() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, backprop=Backprop("3.*", lr=1e-2))
    optimizer.step(mean_square(model, data))
    twin = copy.deepcopy(optimizer)
    assert isinstance(twin.module, nn.Sequential)
    for one in (optimizer, twin):
        for _ in range(3):
            one.step(mean_square(one.module, data))
    assert same(snapshot(twin.module), snapshot(model))
    assert not {p.data_ptr() for p in twin.module.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_a_step_without_an_update_leaves_all_as_it_is() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, backprop="3.*")
    before = snapshot(model)
    optimizer.step(lambda: mean_square(model, data)() * float("nan"))
    optimizer.step(lambda: mean_square(model, data)() + (model[3].weight.sum() * 0.0).sqrt())  # a finite loss, an infinite gradient
    assert optimizer.skipped_steps == 2
    assert same(snapshot(model), before)
    optimizer.step(mean_square(model, data))
    assert not same(snapshot(model), before)


def test_an_error_leaves_the_weights_where_they_were() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, weights="exact", backprop="3.*")
    before = snapshot(model)

    def wrong() -> Tensor:
        model(data[0])
        raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError, match="in the middle"):
        optimizer.step(wrong)
    assert same(snapshot(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_state_can_be_saved_in_the_middle_of_an_evaluation(weights: str) -> None:
    """A training step may save a checkpoint; all but the last layers are constants at that moment."""
    ends = []
    for saving in (False, True):
        model, data = mlp(dtype=torch.bfloat16 if weights != "inplace" else torch.float32), regression(torch.float32)
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, backprop="3.*")
        states: list[Any] = []

        def loss(model: Any = model, data: Any = data, optimizer: Any = optimizer, states: Any = states, saving: bool = saving) -> Tensor:
            value = (model(data[0].to(model[0].weight.dtype)) - data[1]).float().square().mean()
            if saving:
                states.append((optimizer.state_dict(), optimizer.residency, optimizer.usual_lr()))
            return value

        for _ in range(3):
            optimizer.step(loss)
        assert all(residency is optimizer.residency for _, residency, _ in states)
        ends.append(snapshot(model))
    assert same(*ends)


# ---- what is refused


def tied() -> nn.Module:
    torch.manual_seed(0)
    return LanguageModel("tied").double()


def frozen_head() -> nn.Module:
    model = mlp()
    model[3].requires_grad_(False)
    return model


def step(model: Any, closure: Callable[[], Any] | None = None, **given: Any) -> None:
    data = regression()
    ZOOptimizer(model, lr=LR, **{"backprop": "3.*", **given}).step(closure or mean_square(model, data))


def detached() -> None:
    model = mlp()
    step(model, lambda: mean_square(model, regression())().detach())


def with_backward() -> None:
    model = mlp()

    def closure() -> Tensor:
        loss = mean_square(model, regression())()
        loss.backward(retain_graph=True)
        return loss

    step(model, closure)


def elsewhere() -> None:
    model = nn.ModuleDict({"used": mlp(), "unused": nn.Linear(2, 2)})
    step(model, lambda: mean_square(model["used"], regression())() + torch.ones((), requires_grad=True), backprop="unused*")


@pytest.mark.parametrize(
    ("error", "make", "said"),
    [
        (ValueError, lambda: step(mlp(), backprop="head*"), r"'head\*' fits no parameter.*'0.weight', '3.weight', '3.bias'"),
        (ValueError, lambda: step(mlp(), backprop="3.* nothing"), r"'nothing' fits no parameter"),
        (ValueError, lambda: step(mlp(), backprop="*"), r"'\*' fits all that is trained.*first-order"),
        (ValueError, lambda: step(frozen_head()), r"'3.\*' fits parameters that are all frozen"),
        (ValueError, lambda: step(tied(), backprop="head*"), r"'head.weight' is tied to 'embed.weight'.*untie them"),
        (ValueError, lambda: step(tied(), backprop="embed*"), r"'embed.weight' is tied to 'head.weight'"),
        (ValueError, lambda: step([nn.Parameter(torch.ones(3))]), r"'3.\*' fits no parameter.*'unnamed.0'"),
        (ValueError, lambda: step(mlp(), backprop=""), r"Invalid backprop: ''"),
        (ValueError, lambda: step(mlp(), backprop=3), r"Invalid backprop: 3"),
        (ValueError, lambda: step(mlp(), estimator=ForwardGradient()), r"backprop: .* whose evaluations are in forward mode"),
        (ValueError, lambda: step(mlp(), weights=Offload()), r"backprop: .* a graph would keep weights"),
        (
            ValueError,
            lambda: step(mlp(), objective=Score(lambda p, t: 0.0, source=lambda m, b: (m(b), b))),
            r"backprop: .* which evaluates no loss",
        ),
        (ValueError, lambda: Backprop("3.*", lr=-1.0), r"Invalid lr of Backprop: -1.0"),
        (ValueError, lambda: Backprop("3.*", max_norm=0.0), r"Invalid max_norm of Backprop: 0.0"),
        (ValueError, lambda: Backprop("3.*", weight_decay=-0.1), r"Invalid weight_decay of Backprop: -0.1"),
        (ValueError, lambda: Backprop("3.*", optimizer="Adamm"), r"Invalid optimizer: 'Adamm'"),
        (ValueError, lambda: Backprop("3.*", optimizer="LBFGS"), r"LBFGS can't be used"),
        (ValueError, lambda: Backprop("3.*", speed=3), r"torch.optim.AdamW can't be used with \{'speed': 3\}"),
        (RuntimeError, detached, r"no gradient with respect to the parameters of backprop=: it was detached"),
        (RuntimeError, lambda: step(mlp(), lambda: 1.0), r"backprop=: it is a float"),
        (RuntimeError, elsewhere, r"backprop=: it does not depend on them"),
        (RuntimeError, with_backward, r"The closure calls backward"),
        (ValueError, lambda: step(mlp(), lambda: torch.ones(2)), r"a loss of shape \(2,\)"),
    ],
)
def test_what_makes_no_sense_says_so(error: type[Exception], make: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_a_tied_weight_is_trained_where_patterns_fit_all_its_names() -> None:
    model, expected = tied(), tied()
    ZOOptimizer(model, lr=LR, eps=EPS, estimator=OneSided(), backprop=Backprop("head* embed*", lr=1.0, optimizer="SGD")).step(
        next_token(model)
    )
    gradient = torch.autograd.grad(next_token(expected)(), [expected.get_parameter("embed.weight")])[0]
    moved = expected.get_parameter("embed.weight").detach() - gradient
    assert distance({"": model.get_parameter("embed.weight").detach()}, {"": moved}) < 1e-15


def test_a_step_log_says_why_not(tmp_path: Path) -> None:
    optimizer = ZOOptimizer(mlp(), lr=LR, backprop="3.*")
    with pytest.raises(ValueError, match=r"those of backprop= are gradients.*keep the host's checkpoints"):
        Trajectory(tmp_path).begin(optimizer)


@pytest.mark.parametrize(("there", "here"), [("3.*", None), (None, "3.*"), ("3.*", "3.weight")])
def test_a_state_of_others_is_refused(there: str | None, here: str | None) -> None:
    saved_state = ZOOptimizer(mlp(), lr=LR, backprop=there).state_dict()
    with pytest.raises(ValueError, match=r"The state was saved with backprop="):
        ZOOptimizer(mlp(), lr=LR, backprop=here).load_state_dict(saved_state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_no_gradient_reaches_are_named(reentrant: bool) -> None:
    """Reentrant checkpoints have none, for nothing before them requires one."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(lambda y: torch.tanh(self.hidden(y)), self.a(x), use_reentrant=reentrant))

    torch.manual_seed(0)
    model, before = Checkpointed(), []
    optimizer = ZOOptimizer(model, lr=1e-6, backprop=Backprop("hidden.* head.*", lr=1e-2), safeguard=None)
    before.append(model.hidden.weight.detach().clone())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step(lambda: model(torch.ones(3, 8)).square().mean())
    named = [str(one.message) for one in said if "'hidden.weight', 'hidden.bias' of backprop= had no gradient" in str(one.message)]
    assert bool(named) == reentrant
    assert torch.equal(model.hidden.weight, before[0]) == reentrant
