"""HiZOO: against a naive reference, what its Hessian comes to, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import mean_square, mlp, regression, same, snapshot
from reference.noise import query_seed, whole
from torch import Tensor, nn
from torch.func import functional_call

from zo_lightning.engine import SPSA, Curvature, Gaussian, HiZOO, LowRank, OneSided, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.noise import Place
from zo_lightning.engine.noise.preconditioned import Preconditioned
from zo_lightning.engine.trajectory import Trajectory, replay

Weights = dict[str, Tensor]
ALPHA, EPS, LR = 1e-3, 1e-3, 1e-3


def reference(steps: int, queries: int, decay: float) -> tuple[Weights, Weights]:
    """(weights, h) with every z, u and h as a tensor."""
    model, (x, y) = mlp(), regression()
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    h = {name: torch.ones_like(p) for name, p in theta.items()}

    def loss(at: Weights) -> float:
        return float((functional_call(model, at, (x,)) - y).square().mean())

    for step in range(steps):
        u, g, added, here = [], [], {name: torch.zeros_like(p) for name, p in theta.items()}, loss(theta)
        for query in range(queries):
            seed = query_seed(0, step, query)
            z = {name: torch.from_numpy(whole("gaussian", seed, name, p.numel())).view(p.shape) for name, p in theta.items()}
            u.append({name: z[name] / h[name].sqrt() for name in z})
            plus, minus = (loss({name: p + sign * EPS * u[-1][name] for name, p in theta.items()}) for sign in (1.0, -1.0))
            g.append((plus - minus) / (2 * EPS * queries))
            for name in h:
                added[name] += ALPHA * abs(plus + minus - 2 * here) / (2 * EPS**2 * queries) * h[name] * z[name].square()
        for name, p in theta.items():
            theta[name] = (1 - LR * decay) * p - LR * sum(own * each[name] for own, each in zip(g, u, strict=True))
            h[name] = (1 - ALPHA) * h[name] + added[name]
    return theta, h


def hessian(optimizer: ZOOptimizer) -> Weights:
    saved = optimizer.state_dict()["zo"]["progress"]["update"]["state"]["hessian"]
    return {p.name: saved.get(str(p.key), torch.ones(p.shape)) for p in optimizer.residency.trained}


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_the_reference_for_100_steps(queries: int, weights: str) -> None:
    model = mlp()
    optimizer = ZOOptimizer(
        model,
        LR,
        eps=EPS,
        weight_decay=0.1,
        noise="gaussian",
        update=HiZOO(ALPHA),
        estimator=SPSA(queries),
        weights=weights,
        safeguard=None,
    )
    for _ in range(100):
        optimizer.step(mean_square(model, regression()))
    theta, h = reference(100, queries, 0.1)
    assert all(torch.allclose(p.detach(), theta[name], rtol=0, atol=2e-7) for name, p in model.named_parameters())
    found = hessian(optimizer)
    assert all(torch.allclose(found[name].double(), h[name], rtol=1e-4) for name in h)
    assert max(float((each - 1).abs().max()) for each in h.values()) > 0.05
    assert optimizer.forward_passes == 100 * (2 * queries + 1)


class Bowl(nn.Module):
    """1/2 sum_i a_i theta_i^2."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.theta, self.a = nn.Parameter(torch.ones_like(a)), a

    def forward(self) -> Tensor:
        return 0.5 * (self.a * self.theta.square()).sum()


def test_on_a_quadratic_h_rests_at_the_diagonal_of_the_hessian_times_1_plus_half_d() -> None:
    a = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64)
    model = Bowl(a)
    optimizer = ZOOptimizer(model, 0.0, eps=1e-3, noise="gaussian", update=HiZOO(2e-3), safeguard=None)
    seen = []
    for step in range(12_000):
        optimizer.step(model)
        if step >= 4_000:
            seen.append(hessian(optimizer)["theta"].double())
    mean = torch.stack(seen).mean(0) / a
    assert float((mean / 3 - 1).abs().max()) < 0.15  # the mean over some 16 times of its memory, 1 / alpha


def minimised(a: Tensor, rule: Any, lrs: list[float]) -> float:
    model = Bowl(a)
    optimizer = ZOOptimizer(model, lrs[0], eps=1e-4, noise="gaussian", update=rule, safeguard=None)
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(model)
    return model().item()


def test_with_a_hessian_learnt_first_a_badly_scaled_quadratic_is_minimised_far_better_than_by_sgd() -> None:
    """6,000 evaluations each; of HiZOO's steps the first half has lr 0."""
    a = torch.logspace(-2, 2, 10, dtype=torch.float64)
    sgd = min(minimised(a, "sgd", [lr] * 3_000) for lr in (3e-3, 1e-3))
    assert minimised(a, HiZOO(1e-2), [0.0] * 1_000 + [0.3] * 1_000) < sgd / 100


def test_steps_go_along_what_was_probed() -> None:
    model = mlp()
    x, y = regression()
    optimizer = ZOOptimizer(model, LR, eps=EPS, noise="gaussian", update=HiZOO(0.1), weights="inplace", safeguard=None)
    seen: list[Tensor] = []

    def flat() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def closure() -> Tensor:
        seen.append(flat())
        return (model(x) - y).square().mean()

    for _ in range(5):
        seen.clear()
        before = flat()
        optimizer.step(closure)
        assert abs(float(torch.nn.functional.cosine_similarity(flat() - before, seen[1] - seen[2], dim=0))) > 1 - 1e-9


def test_h_decays_where_the_loss_has_no_curvature() -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, 0.0, eps=EPS, noise="gaussian", update=HiZOO(0.25), safeguard=None)
    for _ in range(3):
        optimizer.step(lambda: next(model.parameters()).sum() * 0)
    assert all(bool((h == 0.75**3).all()) for h in hessian(optimizer).values())


def test_parts_of_preconditioned_noise_have_the_bits_of_the_whole_and_rows_are_close() -> None:
    shape, key = torch.Size((40, 20_000)), 7
    noise = Preconditioned(Gaussian(), {key: torch.rand(shape) + 0.5})
    place, numel = Place(key, shape, torch.device("cpu")), math.prod(shape)
    whole_of = noise.values(3, place, range(numel))
    for first, last in ((0, 1), (5, 40_000), (200_000, 600_001), (numel - 1, numel)):
        assert torch.equal(noise.values(3, place, range(first, last)), whole_of[first:last])
    index = torch.tensor([[0, 5, numel - 1], [1 << 18, 1 << 19, 77]])
    assert float((noise.values(3, place, index) - whole_of[index]).abs().max()) < 4e-6


def test_weights_outside_of_a_mask_keep_their_h() -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, LR, eps=EPS, noise="gaussian", update=HiZOO(0.1), mask=Mask("random", 0.4), safeguard=None)
    before = snapshot(model)
    for _ in range(5):
        optimizer.step(mean_square(model, regression()))
    after = snapshot(model)
    for name, h in hessian(optimizer).items():
        assert torch.equal(h == 1, after[name] == before[name])


@pytest.mark.parametrize("noise", ["gaussian", "sphere", LowRank(2, refresh=3)], ids=str)
def test_logs_and_states_go_on_bit_for_bit(noise: Any, tmp_path: Path) -> None:
    model, data = mlp(dtype=torch.float32), regression(torch.float32)
    base = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": LR, "eps": 1e-2, "noise": noise, "update": HiZOO(1e-2), "safeguard": None}
    optimizer = ZOOptimizer(model, **options)
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    for _ in range(6):
        optimizer.step(mean_square(model, data))
    second_model, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    for _ in range(6):
        optimizer.step(mean_square(model, data))
    log.end(optimizer)
    log.close(optimizer)
    second = ZOOptimizer(second_model, **options)
    second.load_state_dict(state)
    for _ in range(6):
        second.step(mean_square(second_model, data))
    assert same(snapshot(second_model), snapshot(model))
    assert replay(base, log.path) == 12
    assert same(snapshot(base), snapshot(model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": "rademacher"}, r"Invalid noise: 'rademacher' with update=HiZOO.*noise=\"gaussian\""),
        ({"estimator": OneSided(2)}, r"Invalid estimator: OneSided.* with update='hizoo'.*Use SPSA\(queries=n\)"),
        ({"estimator": SPSA(2, fitness="ranks")}, r"Invalid estimator: SPSA"),
        ({"mask": Mask("sensitive", 0.5)}, "Invalid mask: .* Use a mask whose rule measures nothing"),
        ({"update": HiZOO, "lr": None}, "update="),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ZOOptimizer(mlp(), **{"lr": LR, "eps": EPS, "noise": "gaussian", "update": HiZOO(), **options})


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, math.nan])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match="Invalid alpha"):
        HiZOO(alpha)


def test_curvature_is_spsa_with_the_second_difference() -> None:
    model, data = mlp(), regression()
    one, two = (ZOOptimizer(copy.deepcopy(model), LR, eps=EPS, estimator=kind) for kind in (SPSA(2), Curvature(2)))
    for optimizer in (one, two):
        optimizer.step(mean_square(optimizer.module, data))  # type: ignore[arg-type]
    assert one.report is not None
    assert two.report is not None
    assert two.report.values[1:] == one.report.values
    terms = two.estimator.terms(two.estimator.points(lambda i: i), (1.0, 3.0, 2.0, 7.0, 5.0))
    assert [(term.slope, term.curvature) for term in terms] == [(0.25, 1.5), (0.5, 5.0)]
    assert two.estimator.loss((1.0, 3.0, 2.0, 7.0, 5.0)) == 1.0
    assert two.estimator.sides((1.0, 3.0, 2.0, 7.0, 5.0)) == (5.0, 3.5)
