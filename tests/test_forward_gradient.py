"""ForwardGradient: derivatives against autograd, steps against SPSA's limit and a naive reference, and what has no derivative."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hf_tools
import pytest
import torch
import torch.nn.functional as F
from engine_models import RESIDENCIES, LanguageModel, mean_square, mlp, regression, same, snapshot
from lightning_models import HOST_WARNINGS, lit, loader, loss_of, net, state, trainer
from reference.noise import whole
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trajectory_tools import Recorder

from zo_lightning import ZOStrategy
from zo_lightning.engine import SPSA, ForwardGradient, OneSided, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.objectives import Score
from zo_lightning.engine.residency import Offload
from zo_lightning.engine.seeds import query_seed
from zo_lightning.engine.tangents import showing, slope_of
from zo_lightning.engine.trajectory import replay

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]
EPS, LR = 1e-3, 1e-3


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.out = kind(6, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.view(4, 2, 6))[0][:, -1])


def models() -> dict[str, Any]:
    """(module, loss) by kind."""
    x, ids = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24).view(4, 6) % 10 + 1
    # not 0, for autograd leaves the row of padding out
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    text = {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}
    plain: dict[str, nn.Module] = {
        "mlp": nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1)),
        "batch norm": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1)),
        "lstm": Recurrent(nn.LSTM),
        "gru": Recurrent(nn.GRU),
    }
    found: dict[str, Any] = {name: (model, lambda model=model: model(x).square().mean()) for name, model in plain.items()}
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    found["convolution"] = conv, lambda: F.cross_entropy(conv(images), torch.tensor([0, 1, 0, 1]))
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).eval()
    found["transformer layer"] = layer, lambda: layer(x[None]).square().mean()
    tied = LanguageModel()
    found["tied embedding"] = tied, lambda: tied(ids).float().square().mean()
    for name, make in (("bert", hf_tools.bert), ("llama", hf_tools.llama)):
        model = make().eval()
        batch = text if name == "bert" else {"input_ids": ids, "labels": ids}
        found[name] = model, lambda model=model, batch=batch: model(**batch).loss
    return found


MODELS = list(models())


@pytest.mark.parametrize("name", MODELS)
def test_the_value_is_the_derivative_that_autograd_gives(name: str) -> None:
    torch.manual_seed(0)
    model, loss = models()[name]
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss(), list(model.parameters()), allow_unused=True), strict=True)
    )
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.0, eps=EPS, estimator=ForwardGradient(2), safeguard=None)
    names = {id(p): key for key, p in model.named_parameters()}
    with torch.no_grad():
        expected_loss = float(loss())
    optimizer.step(loss)
    report = optimizer.report
    assert report is not None
    assert report.loss == pytest.approx(expected_loss, rel=1e-5)
    for point, value in zip(optimizer.estimator.points(lambda i: query_seed(0, 0, i))[:2], report.values, strict=False):
        expected = 0.0
        for p in optimizer.residency.trained:
            gradient = gradients[names[id(p.aliases[0])]]
            if gradient is not None:
                z = torch.from_numpy(whole("rademacher", point[0][0], p.name, p.numel)).view(p.shape)
                expected += float((gradient.double() * z).sum())
        assert value / EPS == pytest.approx(expected, rel=2e-4, abs=2e-5)
    for key, tensor in model.named_parameters():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_it_is_spsa_for_small_eps(weights: str, noise: str) -> None:
    ends = []
    for estimator in (ForwardGradient(3), SPSA(3)):
        model, data = mlp(), regression()
        optimizer = ZOOptimizer(model, lr=LR, eps=1e-5, noise=noise, weights=weights, estimator=estimator)
        for _ in range(10):
            optimizer.step(mean_square(model, data))
        ends.append(snapshot(model))
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-8


def test_eps_is_of_no_matter() -> None:
    ends = []
    for eps in (1e-6, 1.0):
        model, data = mlp(), regression()
        optimizer = ZOOptimizer(model, lr=LR, eps=eps, estimator=ForwardGradient())
        for _ in range(5):
            optimizer.step(mean_square(model, data))
        ends.append(snapshot(model))
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-13


def test_the_mean_of_estimates_is_the_gradient_and_their_variance_that_of_theory() -> None:
    """E g = grad; with Rademacher noise and one query E |g - grad|^2 = (d - 1) |grad|^2, within 4 standard errors."""
    model, data = mlp(), regression()
    loss = mean_square(model, data)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(model.parameters()))])
    optimizer = ZOOptimizer(model, lr=0.0, eps=EPS, estimator=ForwardGradient(100), safeguard=None)
    total, squares, count = torch.zeros_like(gradient), [], 0
    for _ in range(30):
        seeds = [p[0][0] for p in optimizer.estimator.points(lambda i: query_seed(0, optimizer.steps, i))[:-1]]
        optimizer.step(loss)
        assert optimizer.report is not None
        for seed, value in zip(seeds, optimizer.report.values, strict=False):
            z = torch.cat([torch.from_numpy(whole("rademacher", seed, p.name, p.numel)) for p in optimizer.residency.trained])
            g = value / EPS * z
            total += g
            squares.append(float((g - gradient).square().sum()))
            count += 1
    d, length = len(gradient), float(gradient.square().sum())
    sample = torch.tensor(squares)
    assert abs(float(sample.mean()) - (d - 1) * length) < 4 * float(sample.std()) / count**0.5
    assert float((total / count - gradient).square().sum()) < (d - 1) * length / count * (1 + 4 * (2 / d) ** 0.5)


def test_along_basis_vectors_it_is_autograd() -> None:
    """Every coordinate by itself: masks of one element, whose noise is +1 or -1."""
    model, data = mlp(), regression()
    loss = mean_square(model, data)
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss(), list(model.parameters())), strict=True))
    optimizer = ZOOptimizer(model, lr=0.0, eps=EPS, estimator=ForwardGradient(), safeguard=None)
    residency = optimizer.residency
    for p in residency.trained[:2]:
        for index in range(0, p.numel, 7):
            basis = torch.zeros(p.numel, dtype=torch.float64)
            basis[index] = 1.0
            with torch.no_grad(), showing(model, residency.trained, {id(p): basis.view(p.shape)}):
                _, slope = slope_of(loss())
            assert float(slope) == pytest.approx(float(expected[p.name].flatten()[index]), rel=1e-9)


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("rule", ["random", "small_weights"])
def test_masks_and_micro_batches(rule: str, weights: str) -> None:
    ends = []
    for pieces in (1, 4):
        model, (x, y) = mlp(), regression()
        before = snapshot(model)
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=ForwardGradient(2), mask=Mask(rule, 0.3))
        for _ in range(5):
            for rows in torch.arange(len(x)).chunk(pieces):
                estimate = optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
                assert estimate.loss is not None
            optimizer.apply()
        ends.append(snapshot(model))
        assert any(bool((ends[-1][name] == before[name]).any()) for name in before)
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_log_is_replayed_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model, (x, y) = mlp(dtype=dtype), regression(dtype)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=ForwardGradient(2), update="adam", safeguard=None)
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for _ in range(6):
        optimizer.step(lambda: (model(x) - y).float().square().mean())
    recorder.writer.close()
    assert optimizer.forward_passes == 12
    again = mlp(dtype=dtype)
    assert replay(again, tmp_path / "run.zolog") == 6
    assert same(snapshot(again), snapshot(model))


def test_lightning_and_hugging_face(tmp_path: Path) -> None:
    model, data = net(), list(loader())
    optimizer = ZOOptimizer(model, lr=1e-3, estimator=ForwardGradient(2))
    for step in range(8):
        optimizer.step(lambda step=step: loss_of(model, data[step % len(data)]))
    module = lit()()
    trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, estimator=ForwardGradient(2)), max_steps=8).fit(module, loader())
    assert same(state(module.net), state(model))
    given = {"zo_estimator": "forward_gradient", "zo_queries": 2, "zo_lr": 1e-3}
    host = hf_tools.trainer(tmp_path, **given)
    host.train()
    spsa = hf_tools.trainer(tmp_path, **{**given, "zo_estimator": "spsa"})
    spsa.train()
    for one, other in zip(hf_tools.losses(host, "zo/projected_grad"), hf_tools.losses(spsa, "zo/projected_grad"), strict=True):
        assert one == pytest.approx(other, rel=0.05, abs=0.01)
    assert host.zo_optimizer.forward_passes == 8


def test_dropout_and_autocast_are_those_of_other_evaluations() -> None:
    model, (x, y) = mlp(dropout=0.5, dtype=torch.float32), regression(torch.float32)
    found = []
    for estimator in (ForwardGradient(2), OneSided(2)):
        optimizer = ZOOptimizer(copy.deepcopy(model), lr=0.0, eps=1e-4, estimator=estimator, safeguard=None)

        def loss(module: Any = optimizer.module) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return (module(x).float() - y).square().mean()

        optimizer.step(loss)
        assert optimizer.report is not None
        found.append(optimizer.report.values)
    assert found[0][-1] == found[1][0]


class Cached(nn.Module):
    """Reads a weight by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 4), nn.Linear(4, 1)
        self.kept = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(F.linear(x, self.kept[0]) + self.first.bias))


class Doubled(torch.autograd.Function):
    """Has a derivative backward, and none forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def step(model: nn.Module, loss: Any = None, **options: Any) -> None:
    x = torch.randn(8, 10, dtype=next(model.parameters()).dtype)
    ZOOptimizer(model, lr=LR, estimator=ForwardGradient(), **options).step(loss or (lambda: model(x).square().mean()))


def doubled() -> None:
    model = mlp()
    step(model, lambda: Doubled.apply(model(regression()[0])).square().mean())


@pytest.mark.parametrize(
    ("error", "make", "said"),
    [
        (ValueError, lambda: ForwardGradient(0), r"Invalid queries: 0"),
        (ValueError, lambda: step(mlp(), objective=Score(lambda preds, target: 0.0)), r"it differentiates the loss"),
        (ValueError, lambda: step(mlp(), weights=Offload()), r"tangents of all trained weights are in memory at once"),
        (ValueError, lambda: ZOOptimizer([nn.Parameter(torch.ones(3))], lr=LR, estimator=ForwardGradient()).residency, r"is in none"),
        (RuntimeError, lambda: step(Cached()), r"'first.weight' is read by another name"),
        (RuntimeError, doubled, r"has no forward-mode derivative: You must implement the jvp function.* Use the estimator SPSA"),
        (RuntimeError, lambda: step(mlp(), lambda: 1.0), r"returned float, which has no derivative"),
        (RuntimeError, lambda: step(mlp(), lambda: torch.ones(())), r"The loss has no derivative with respect to the trained weights"),
    ],
)
def test_what_has_no_derivative_is_said(error: type[Exception], make: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_an_error_leaves_the_weights_where_they_were() -> None:
    model = mlp()
    before, parameters = snapshot(model), list(model.parameters())

    def loss() -> Tensor:
        model(regression()[0])
        raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError, match="in the middle"):
        step(model, loss)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(snapshot(model), before)


class Twice(nn.Module):
    """Two layers; a subclass says what else happens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)
        self.kept = [self.a.weight, self.b.weight]
        self.calls = 0

    def more(self, x: Tensor) -> Tensor:
        return x.new_zeros(())

    def first(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.b(self.first(x))
        return out.square().mean() + self.more(x)


class InLists(Twice):
    def more(self, x: Tensor) -> Tensor:
        return torch.cat([self.kept[0], self.kept[0]]).square().sum()


class Norms(Twice):
    def more(self, x: Tensor) -> Tensor:
        return torch.stack(torch._foreach_norm(self.kept)).sum()


class Later(Twice):
    def more(self, x: Tensor) -> Tensor:
        return self.kept[0].square().sum() if self.calls > 2 else x.new_zeros(())


class View(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.view = self.a.weight.detach().t()[1:]

    def more(self, x: Tensor) -> Tensor:
        return self.view.square().sum()


class Transposed(Twice):
    def more(self, x: Tensor) -> Tensor:
        return self.kept[1].T.square().sum()


class Reentrant(Twice):
    def first(self, x: Tensor) -> Tensor:
        return checkpoint(super().first, x, use_reentrant=True)  # type: ignore[no-any-return]


class WithoutGradients(Twice):
    def first(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().first(x)


class Nested(Twice):
    def more(self, x: Tensor) -> Tensor:
        return torch.func.jvp(torch.sin, (x.sum(),), (torch.ones(()),))[1]  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None:UserWarning")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (InLists, "is read by another name"),
        (Norms, "is read by another name"),
        (Later, "'a.weight' is read by another name"),
        (View, "'a.weight' is read by another name"),
        (Transposed, "'b.weight' is read by another name"),
        (Reentrant, r"'a.weight' is read where forward-mode derivatives are off.*use_reentrant=False"),
        (WithoutGradients, "'a.weight' is read where forward-mode derivatives are off"),
        (Nested, r"An operation of the model has no forward-mode derivative: Nested forward mode AD.* Use the estimator SPSA\(\)"),
    ],
)
def test_derivatives_that_would_be_missing(kind: type[Twice], said: str) -> None:
    model, x = kind(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    optimizer = ZOOptimizer(model, lr=1e-3, estimator=ForwardGradient())

    def train() -> None:
        for _ in range(4):
            optimizer.step(lambda: model(x))

    with pytest.raises(RuntimeError, match=said):
        train()


def test_tables_whose_rows_are_shortened_when_they_are_read() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 1))
    optimizer = ZOOptimizer(model, lr=1e-3, estimator=ForwardGradient())
    with pytest.raises(ValueError, match=r"'0.weight' is a table with max_norm=1.0.*Leave max_norm out"):
        optimizer.step(lambda: model(torch.tensor([1, 2])).square().mean())


def test_eps_is_a_unit_also_in_16_bits() -> None:
    slopes = []
    for eps in (1e-8, 1e-3, 10.0):
        model, (x, y) = mlp(dtype=torch.float16), regression(torch.float16)
        optimizer = ZOOptimizer(model, lr=0.0, eps=eps, estimator=ForwardGradient())
        optimizer.step(mean_square(model, (x, y)))
        assert optimizer.report is not None
        slopes.append(optimizer.report.values[0] / eps)
    assert slopes[0] != 0
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-12)


def test_a_loss_that_has_a_value_and_no_derivative() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=1e-3, estimator=ForwardGradient(), max_nonfinite=2)

    def train() -> None:
        for _ in range(2):
            optimizer.step(lambda: (model(data[0]) * 0).abs().sqrt().sum() + 1.0)

    with pytest.raises(FloatingPointError, match=r"The derivative of the loss was not finite in 2 steps.* a square root or a norm at 0"):
        train()
