"""weights="batched": all points of a step in one forward pass, against those that are evaluated one after another."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hf_tools
import pytest
import torch
import torch.nn.functional as F
from engine_kinds import kinds
from engine_models import distance, mean_square, mlp, regression, same, snapshot
from lightning_models import lit, loader, loss_of, net, state, trainer
from torch import Tensor, nn

from zo_lightning import ZOStrategy
from zo_lightning.engine import SPSA, Conservative, Curvature, LowRank, Momentum, OneSided, ZOOptimizer
from zo_lightning.engine.factored import Factored
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.objectives import Score
from zo_lightning.engine.residency import Batched
from zo_lightning.engine.trajectory import Trajectory, load_base, read_log, replay

EPS = 1e-3
FRESH = LowRank(2, refresh=1)


# ---- what operations see

W, A, B = (
    torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    for i, shape in enumerate(((6, 4), (5, 6, 2), (5, 4, 2)))
)
BIAS, X = (
    torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, shape in enumerate(((5, 6), (3, 7, 4)), 3)
)
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda w, b: F.linear(X, w, b),
    "linear without bias": lambda w, b: F.linear(X, w),
    "linear of a vector": lambda w, b: F.linear(X[0, 0], w, b),
    "matmul": lambda w, b: X @ w.t() + b,
    "T": lambda w, b: torch.matmul(X, w.T),
    "transpose": lambda w, b: X @ w.transpose(-1, -2),
    "permute": lambda w, b: X @ w.permute(1, 0),
    "addmm": lambda w, b: torch.addmm(b, X.view(-1, 4), w.t()),
    "embedding": lambda w, b: F.embedding(torch.tensor([[1, 2], [5, 0]]), w, padding_idx=0),
    "cast": lambda w, b: F.linear(X.float(), w.float(), b.float()).double(),
    "two in a row": lambda w, b: F.linear(F.linear(X, w, b).tanh(), w.t()),
    "from the left": lambda w, b: w @ X.mT,
    "elementwise": lambda w, b: (w * 2).sum() + w[0, 0] + torch.cat([w, w]).norm(),
    "einsum": lambda w, b: torch.einsum("bti,oi->bto", X, w) + b,
    "bias too": lambda w, b: F.linear(X[..., :1].expand(3, 7, 6), w.t(), w.sum(0)),
    "what is told": lambda w, b: b.sum() * (w.shape[0] + w.dim() + len(w) + w.numel() + w.stride(0) + (w.dtype == torch.float64)),
}
FILTERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "conv1d": ((6, 2, 3), lambda w, b: F.conv1d(X[:, :, :2].mT, w, b, 1, 2, 2)),
    "conv2d": ((6, 2, 3, 3), lambda w, b: F.conv2d(X.view(2, 2, 3, 7), w, b, stride=2, padding=1)),
    "grouped": ((6, 2, 3), lambda w, b: F.conv1d(X.mT, w, b, groups=2)),
    "transposed": ((6, 2, 3), lambda w, b: F.conv_transpose1d(X[:, :6], w)),
}


def checked(weight: Tensor, right: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Alone and in a batch, against the sum."""
    used: list[int] = []
    with torch.no_grad():
        want = torch.stack([operation(weight + (a @ b.T).view(weight.shape), c) for a, b, c in zip(A, right, BIAS, strict=True)])
        got = torch.vmap(lambda a, b, c: operation(Factored.of(weight, a, b, lambda: used.append(1)), c))(A, right, BIAS)
        alone = operation(Factored.of(weight, A[0], right[0], lambda: used.append(1)), BIAS[0])
    tolerance = 1e-5 if operation is OPERATIONS["cast"] else 1e-12
    assert type(got) is type(alone) is Tensor
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance
    assert float((alone - want[0]).abs().max()) <= tolerance
    assert bool(used) != (operation is OPERATIONS["what is told"])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_see_the_sum(name: str) -> None:
    checked(W, B, OPERATIONS[name])


@pytest.mark.parametrize("name", FILTERS)
def test_convolutions_see_the_sum(name: str) -> None:
    shape, operation = FILTERS[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    checked(weight, torch.randn(5, math.prod(shape[1:]), 2, generator=generator, dtype=torch.float64), operation)


# ---- steps


def trained(
    name: str, weights: Any, noise: Any, estimator: Any, steps: int = 2, **options: Any
) -> tuple[list[tuple[float, ...]], dict[str, Tensor], int, int]:
    """(values of each step, weights and buffers at the end, calls of the closure, evaluations)."""
    model, loss = kinds(torch.float64)[name]
    optimizer = ZOOptimizer(model, 1e-3, eps=EPS, noise=noise, estimator=estimator, weights=weights, safeguard=None, **options)
    calls, values = [], []
    for _ in range(steps):
        optimizer.step(lambda: calls.append(1) or loss(model))
        assert optimizer.report is not None
        values.append(optimizer.report.values)
    return values, snapshot(model), len(calls), optimizer.forward_passes


def close(ours: Any, theirs: Any) -> None:
    assert len(ours[0]) == len(theirs[0])
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert torch.tensor(mine, dtype=torch.float64).allclose(torch.tensor(other, dtype=torch.float64), rtol=1e-6)
    assert distance(ours[1], theirs[1]) < 1e-5
    assert ours[3] == theirs[3]


@pytest.mark.parametrize("name", list(kinds()))
def test_values_and_steps_are_those_of_points_one_after_another(name: str) -> None:
    """Models of all kinds, dropout and batch normalization on."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = trained(name, "batched", FRESH, SPSA(3))
    close(ours, trained(name, "copy", FRESH, SPSA(3)))
    alone = [str(one.message) for one in said if "Points are evaluated one at a time" in str(one.message)]
    assert bool(alone) == (name in ("lstm",))
    assert ours[2] == (1 + 4 if not alone else 1 + 13)


@pytest.mark.parametrize("estimator", [SPSA(1), SPSA(4, fitness="ranks"), OneSided(3), Curvature(2), Conservative(), SPSA(2)], ids=str)
@pytest.mark.parametrize("noise", [FRESH, LowRank(1, refresh=3), LowRank(2, refresh=3, orthogonal=True)], ids=str)
def test_estimators_and_noises(noise: LowRank, estimator: Any) -> None:
    close(trained("mlp", "batched", noise, estimator, steps=4), trained("mlp", "copy", noise, estimator, steps=4))


@pytest.mark.parametrize("members", [1, 2, 5, None])
def test_members_bound_what_is_evaluated_together(members: int | None) -> None:
    ours = trained("gpt2", Batched(members), FRESH, SPSA(4), steps=1)
    close(ours, trained("gpt2", "copy", FRESH, SPSA(4), steps=1))
    assert ours[2] == 1 + {1: 8, 2: 5, 5: 3, None: 2}[members]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_differences_are_nearer_to_those_of_float32_than_perturbed_weights_are(dtype: torch.dtype) -> None:
    """Weights would be rounded, by more than they are displaced."""
    found = {}
    for weights, kind in (("copy", torch.float64), ("copy", dtype), ("batched", dtype)):
        model, (x, y) = mlp(dtype=kind, seed=3), regression(kind, rows=512)
        slopes = []
        for seed in range(20):
            optimizer = ZOOptimizer(model, 0.0, eps=1e-2, noise=FRESH, estimator=SPSA(4), weights=weights, seed=seed, safeguard=None)
            optimizer.step(lambda model=model, x=x, y=y: (model(x) - y).float().square().mean())
            assert optimizer.report is not None
            values = optimizer.report.values
            slopes += [a - b for a, b in zip(values[::2], values[1::2], strict=True)]
        found[weights, kind] = torch.tensor(slopes)
    off = {weights: float((found[weights, dtype] - found["copy", torch.float64]).norm()) for weights in ("copy", "batched")}
    assert off["batched"] < 2 * off["copy"]
    assert off["batched"] < 0.5 * float(found["copy", torch.float64].norm())


def test_accumulated_micro_batches_are_the_batch() -> None:
    found = []
    for pieces in (1, 4):
        model, (x, y) = mlp(), regression()
        optimizer = ZOOptimizer(model, 1e-2, eps=EPS, noise=FRESH, estimator=SPSA(3), weights="batched")
        for _ in range(3):
            for part in range(pieces):
                rows = slice(part * len(x) // pieces, (part + 1) * len(x) // pieces)
                optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
            optimizer.apply()
        found.append(snapshot(model))
    assert distance(*found) < 1e-8


def test_metrics_are_observed_at_every_point() -> None:
    """Behind the one evaluation: a metric needs numbers, which there are none of within it."""
    found = []
    for weights in ("batched", "copy"):
        model, (x, y) = mlp(), regression()
        asked: list[int] = []

        def error(preds: Tensor, target: Tensor, asked: list[int] = asked) -> float:
            asked.append(1)
            return -float((preds - target).abs().mean().item())

        optimizer = ZOOptimizer(
            model, 1e-2, eps=EPS, noise=FRESH, estimator=SPSA(3), weights=weights, objective=Score(error, maximize=True), safeguard=None
        )
        calls: list[int] = []
        for _ in range(3):
            optimizer.estimate(
                lambda model=model, x=x, y=y, calls=calls: calls.append(1) or {"preds": model(x), "target": y, "text": "as it is"},
                loss_of=optimizer.objective.loss_of,
            )
            optimizer.apply()
        found.append((snapshot(model), len(calls), len(asked)))
    assert distance(found[0][0], found[1][0]) < 1e-8
    assert (found[0][1], found[1][1]) == (1 + 6, 18)
    assert found[0][2] == found[1][2] == 18


def test_what_asks_the_module_is_asked_at_every_point() -> None:
    found = []
    for weights in ("batched", "copy"):
        model, (x, y) = mlp(), regression()
        objective = Score(source=lambda module, batch, x=x, y=y: -float((module(x) - y).abs().mean()), maximize=True)
        optimizer = ZOOptimizer(model, 1e-2, eps=EPS, noise=FRESH, estimator=SPSA(2), weights=weights, objective=objective, safeguard=None)
        for _ in range(3):
            optimizer.step(dict, batch=0)
        found.append(snapshot(model))
    assert distance(*found) < 1e-8


# ---- what can't be


def test_what_has_no_batch_is_evaluated_one_at_a_time_and_says_so() -> None:
    found = []
    for weights in ("batched", "copy"):
        model, (x, y) = mlp(), regression()
        optimizer = ZOOptimizer(model, 1e-2, eps=EPS, noise=FRESH, estimator=SPSA(2), weights=weights)
        says = (
            pytest.warns(ZOWarning, match=r'weights="batched" does nothing here: .*\.item\(\)') if weights == "batched" else nullcontext()
        )
        with says:
            optimizer.step(lambda model=model, x=x, y=y: F.mse_loss(model(x), y).item())
        optimizer.step(lambda model=model, x=x, y=y: F.mse_loss(model(x), y).item())
        found.append((snapshot(model), optimizer.forward_passes))
    assert distance(found[0][0], found[1][0]) < 1e-8
    assert found[0][1] == found[1][1] == 8


@pytest.mark.filterwarnings("ignore:weights=.batched. does nothing:zo_lightning.engine.messages.ZOWarning")
def test_a_weight_that_is_read_by_another_name_is_an_error() -> None:
    model, (x, y) = mlp(), regression()
    weight = model[0].weight
    optimizer = ZOOptimizer(model, 1e-2, noise=FRESH, weights="batched")
    with pytest.raises(RuntimeError, match=r"'0\.weight' is read by another name .*its perturbation would be missing.*weights=\"exact\""):
        optimizer.step(lambda: F.mse_loss(model[3](torch.tanh(F.linear(x, weight))), y))
    assert type(model[0].weight) is nn.Parameter


def test_a_copy_of_the_model_is_an_error() -> None:
    model, data = mlp(), regression()
    other = copy.deepcopy(model)
    optimizer = ZOOptimizer(model, 1e-2, noise=FRESH, weights="batched")
    with pytest.raises(RuntimeError, match="The perturbation did not reach the model"):
        optimizer.step(mean_square(other, data))


@pytest.mark.filterwarnings("ignore:weights=.batched. does nothing:zo_lightning.engine.messages.ZOWarning")
def test_an_exception_leaves_everything_as_it_was() -> None:
    model, data = mlp(), regression()
    before, optimizer = snapshot(model), ZOOptimizer(model, 1e-2, noise=FRESH, estimator=SPSA(3), weights="batched")
    for raised in (KeyboardInterrupt, ValueError):

        def closure(raised: type[BaseException] = raised) -> Tensor:
            mean_square(model, data)()
            raise raised("in the middle")

        with pytest.raises(raised):
            optimizer.step(closure)
        assert same(snapshot(model), before)
        assert all(type(p) is nn.Parameter for p in model.parameters())
        optimizer.discard()


def test_masks_of_whole_parameters_are_taken_and_others_refused() -> None:
    found = []
    for weights in ("batched", "copy"):
        model, data = mlp(), regression()
        before = snapshot(model)
        mask = Mask("random", 1.0, frozen="3.*")
        optimizer = ZOOptimizer(model, 1e-2, eps=EPS, noise=FRESH, estimator=SPSA(2), weights=weights, mask=mask)
        for _ in range(3):
            optimizer.step(mean_square(model, data))
        after = snapshot(model)
        assert torch.equal(after["3.weight"], before["3.weight"])
        assert not torch.equal(after["0.weight"], before["0.weight"])
        found.append(after)
    assert distance(*found) < 1e-8
    optimizer = ZOOptimizer(mlp(), 1e-2, noise=FRESH, weights="batched", mask=Mask("random", 0.5))
    with pytest.raises(ValueError, match=r"Invalid mask: it trains some elements of '0\.weight', and with weights=\"batched\""):
        optimizer.step(mean_square(optimizer.module, regression()))


def test_masks_of_vectors_are_taken() -> None:
    found = []
    for weights in ("batched", "copy"):
        model, data = mlp(), regression()
        for layer in (model[0], model[3]):
            layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64))
        mask = Mask("random", 0.5, include="*bias")
        optimizer = ZOOptimizer(model, 1e-2, eps=EPS, noise=FRESH, estimator=SPSA(2), weights=weights, mask=mask)
        for _ in range(3):
            optimizer.step(mean_square(model, data))
        assert bool((model[0].bias == 0).any())
        found.append(snapshot(model))
    assert distance(*found) < 1e-8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": "rademacher"}, "Invalid noise: 'rademacher', update='sgd' with weights=\"batched\""),
        ({"noise": "gaussian"}, "Invalid noise: 'gaussian'.*low_rank"),
        ({"noise": FRESH, "update": "hizoo"}, "Invalid noise: .*update='hizoo' with weights=\"batched\""),
        ({"noise": FRESH, "estimator": "forward_gradient"}, 'Invalid estimator: ForwardGradient.*with weights="batched"'),
        ({"estimator": "coordinatewise"}, 'Invalid estimator: Coordinatewise.*with weights="batched"'),
        ({"noise": FRESH, "backprop": "3.*"}, r"Invalid backprop: .*with weights=\"batched\".*keeps no graph"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    for weights in ("batched", Batched(4)):
        with pytest.raises(ValueError, match=said):
            ZOOptimizer(mlp(), 1e-3, weights=weights, **options)


def test_options() -> None:
    with pytest.raises(ValueError, match=r"members.*0"):
        Batched(0)
    with pytest.raises(ValueError, match=r"weights='batches'.*'batched'.*or an Offload or Batched"):
        ZOOptimizer(mlp(), 1e-3, weights="batches")
    parameters = list(mlp().parameters())
    optimizer = ZOOptimizer(parameters, 1e-3, noise=FRESH, weights="batched")
    with pytest.raises(ValueError, match=r"must be known, and .* is in none.*or use weights=\"exact\" or \"copy\""):
        optimizer.step(lambda: parameters[0].sum())


# ---- logs, states, hosts


@pytest.mark.parametrize("update", ["sgd", Momentum(0.8, window=3), "adam"], ids=str)
def test_logs_and_states_go_on_bit_for_bit(update: Any, tmp_path: Path) -> None:
    model, data = mlp(), regression()
    options: dict[str, Any] = {"eps": EPS, "noise": FRESH, "estimator": SPSA(3), "weights": "batched", "update": update}
    optimizer = ZOOptimizer(model, 1e-2, **options)
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    saved = None
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.step(mean_square(model, data))
    log.end(optimizer)
    log.close(optimizer)
    found = read_log(log.path)
    again = load_base(tmp_path / str(found.segments[0].base))
    assert replay(again, found) == 6
    assert same(again, snapshot(model))
    assert saved is not None
    other = mlp(seed=1)
    resumed = ZOOptimizer(other, 1e-2, **options)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(3):
        resumed.step(mean_square(other, data))
    assert same(snapshot(other), snapshot(model))


def test_lightning(tmp_path: Path) -> None:
    """The steps of the engine; what is logged is logged as with others."""
    options: dict[str, Any] = {"eps": EPS, "noise": FRESH, "estimator": SPSA(3)}
    model, data = net(), list(loader())
    optimizer = ZOOptimizer(model, 1e-3, weights="batched", **options)
    for step in range(3):
        optimizer.step(lambda step=step: loss_of(model, data[step % len(data)]))
    found = []
    for weights in ("batched", "exact"):
        module = lit()()
        host = trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, weights=weights, **options), max_steps=3)
        host.fit(module, loader())
        found.append((state(module.net), {name: float(value) for name, value in host.callback_metrics.items()}))
    assert same(found[0][0], state(model))
    assert distance(found[0][0], found[1][0]) < 1e-5
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_hugging_face(tmp_path: Path) -> None:
    found = []
    for weights in ("batched", "exact"):
        host = hf_tools.trainer(tmp_path, zo_estimator=SPSA(3), zo_noise=FRESH, zo_weights=weights, zo_lr=1e-3, max_steps=3)
        host.train()
        found.append((hf_tools.weights(host.model), host.zo_optimizer.report))
    assert found[0][1].values == pytest.approx(found[1][1].values, rel=1e-5)
    assert distance(found[0][0], found[1][0]) < 1e-4
