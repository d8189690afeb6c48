"""Update rules: against torch.optim and naive references that materialise the estimate, logs, states, masks, hosts, what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, STREAMED, distance, mean_square, mlp, regression, same, snapshot
from reference import updates as reference
from reference.noise import query_seed, whole
from reference.spsa import Settings
from torch import Tensor, nn
from torch.func import functional_call
from trajectory_tools import Recorder

from zo_lightning.engine import (
    SGD,
    SPSA,
    Adam,
    Conservative,
    HiZOO,
    Momentum,
    OneSided,
    RankSGD,
    Sign,
    TorchOptimizer,
    UpdateRule,
    ZOOptimizer,
)
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.parameters import Scale
from zo_lightning.engine.residency import Offload
from zo_lightning.engine.trajectory import Trajectory, replay, undo, verify
from zo_lightning.engine.updates import RULES, Dense, DenseState

EPS, LR, STEPS = 1e-2, 1e-3, 100
Make = Callable[[list[Tensor]], torch.optim.Optimizer]
DENSE: dict[str, tuple[UpdateRule, reference.Move | Make]] = {
    "sign": (Sign(), reference.sign),
    "AdamW without decay": (TorchOptimizer("AdamW"), lambda w: torch.optim.AdamW(w, lr=LR, weight_decay=0.0)),
    "adam": (Adam(), lambda w: torch.optim.Adam(w, lr=LR)),
    "adam, other betas": (Adam(beta1=0.5, beta2=0.9, epsilon=1e-3), lambda w: torch.optim.Adam(w, lr=LR, betas=(0.5, 0.9), eps=1e-3)),
    "heavy ball": (TorchOptimizer("SGD", momentum=0.9), lambda w: torch.optim.SGD(w, lr=LR, momentum=0.9)),
    "RMSprop": (TorchOptimizer(torch.optim.RMSprop, alpha=0.9), lambda w: torch.optim.RMSprop(w, lr=LR, alpha=0.9)),
    "NAdam": (TorchOptimizer("NAdam", betas=(0.8, 0.99)), lambda w: torch.optim.NAdam(w, lr=LR, betas=(0.8, 0.99))),
    "Adagrad": (TorchOptimizer("Adagrad"), lambda w: torch.optim.Adagrad(w, lr=LR)),
}
RULES_TO_LOG: dict[str, UpdateRule] = {
    "momentum": Momentum(0.8, window=4),
    "sign": Sign(clip=5.0),
    "adam": Adam(),
    "RMSprop": TorchOptimizer("RMSprop", alpha=0.9, momentum=0.5),
}


def error(theta: dict[str, Tensor]) -> float:
    x, y = regression(next(iter(theta.values())).dtype)
    return float((functional_call(mlp(dtype=x.dtype), theta, (x,)) - y).square().mean())


def naive(move: reference.Move, settings: Settings, dtype: torch.dtype, steps: int = STEPS) -> dict[str, Tensor]:
    theta = {name: p.detach().clone() for name, p in mlp(dtype=dtype).named_parameters()}
    reference.run(theta, error, settings, move, steps)
    return theta


def trained(rule: UpdateRule | str, *, steps: int = STEPS, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model, data = mlp(dtype=dtype), regression(dtype)
    optimizer = ZOOptimizer(model, **{"lr": LR, "eps": EPS, "update": rule, **options})
    for _ in range(steps):
        optimizer.step(mean_square(model, data))
    with optimizer.settled():
        return copy.deepcopy(model)


# ---- the steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", ["exact", "copy"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_rules_are_torch_optim_bit_for_bit(name: str, weights: str, dtype: torch.dtype) -> None:
    rule, how = DENSE[name]
    move: Any = how if rule.name == "sign" else reference.torch_optimizer(how)  # type: ignore[arg-type]
    expected = naive(move, Settings(LR, eps=EPS, queries=2), dtype)
    got = trained(rule, weights=weights, estimator=SPSA(2), dtype=dtype)
    assert same(snapshot(got), expected)


@pytest.mark.parametrize("name", ["sign", "adam"])
def test_in_place_differs_by_rounding_alone(name: str) -> None:
    expected = trained(name, estimator=SPSA(2), weights="exact", steps=10)
    got = trained(name, estimator=SPSA(2), weights="inplace", steps=10)
    assert distance(snapshot(got), snapshot(expected)) < 1e-9


def test_adam_with_weight_decay_is_adamw() -> None:
    settings = Settings(LR, eps=EPS)
    expected = naive(reference.torch_optimizer(lambda w: torch.optim.AdamW(w, lr=LR, weight_decay=0.3)), settings, torch.float64)
    assert same(snapshot(trained("adam", weight_decay=0.3)), expected)


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
def test_momentum_sums_the_estimates_of_its_window(weights: Any) -> None:
    settings = Settings(LR, eps=EPS, queries=2, weight_decay=0.1)
    expected = naive(reference.window(0.8, 5), settings, torch.float64)
    got = trained(Momentum(0.8, window=5), weights=weights, estimator=SPSA(2), weight_decay=0.1)
    assert distance(snapshot(got), expected) < 1e-11


def test_a_window_as_long_as_the_run_is_the_heavy_ball() -> None:
    dense = trained(TorchOptimizer("SGD", momentum=0.9), steps=30)
    assert distance(snapshot(trained(Momentum(0.9, window=30), steps=30)), snapshot(dense)) < 1e-12
    assert distance(snapshot(trained(Momentum(0.9, window=5), steps=30)), snapshot(dense)) > 1e-6


@pytest.mark.parametrize("rule", [Momentum(0.9, window=1), Momentum(0.0, window=3)], ids=str)
def test_momentum_without_memory_is_sgd(rule: Momentum) -> None:
    assert distance(snapshot(trained(rule)), snapshot(trained("sgd"))) < 1e-13


def test_sign_of_one_query_of_rademacher_noise_is_the_noise() -> None:
    before, after = snapshot(mlp()), snapshot(trained("sign", steps=1))
    assert all(torch.allclose((after[name] - before[name]).abs(), torch.tensor(LR).double(), rtol=1e-9) for name in before)


def test_16_bit_weights_are_moved_in_float32() -> None:
    """Steps far below the spacing of bfloat16 add up: 100 steps of 1e-5 on weights of about 0.1 to 0.3."""
    model, data = mlp(dtype=torch.bfloat16), regression(torch.bfloat16)
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=1e-5, eps=EPS, update="sign")
    for _ in range(3):
        optimizer.step(mean_square(model, data))
    kept = optimizer.masters.state_dict()
    assert len(kept) == 3
    far = torch.cat([(kept[str(p.key)] - before[p.name].float()).abs().flatten() for p in optimizer.residency.trained])
    assert 0 < float(far.max()) <= 3.1e-5
    assert all(torch.equal(kept[str(p.key)].bfloat16(), p.tensor) for p in optimizer.residency.trained)


def test_a_scale_is_moved_in_its_own_unit() -> None:
    scale = Scale(torch.full((4,), 2.0, dtype=torch.float64), unit=0.1, least=1.995)
    target = torch.tensor([0.0, 3.0, 0.0, 3.0], dtype=torch.float64)
    optimizer = ZOOptimizer([("scale", scale)], lr=0.1, eps=1e-3, update="sign", weights="copy", estimator=SPSA(64))
    for expected in ([1.995, 2.01, 1.995, 2.01], [1.995, 2.02, 1.995, 2.02]):
        optimizer.step(lambda: (scale - target).square().sum())
        assert scale.detach().tolist() == pytest.approx(expected)


# ---- masks, micro-batches, groups


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("mask", [Mask("random", 0.05), Mask("small_weights", 0.3), Mask("half_layers")], ids=repr)
@pytest.mark.parametrize("rule", ["momentum", "sign", "adam"])
def test_what_a_mask_leaves_out_stays(rule: str, mask: Mask, weights: str) -> None:
    before, after = snapshot(mlp()), snapshot(trained(rule, mask=mask, weights=weights, steps=6, weight_decay=0.5))
    moved = torch.cat([(after[name] - before[name]).abs().flatten() > 1e-9 for name in before])
    assert 0 < int(moved.sum()) < 0.95 * len(moved)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_new_mask_begins_without_memory(rule: str) -> None:
    """Otherwise what is no longer trained would go on moving, or what now is would follow directions that were not measured on it."""
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, update=rule, mask=Mask("random", 0.3, refresh=3))
    for step in range(6):
        before = snapshot(model)
        optimizer.step(mean_square(model, data))
        still = sum(int((p == before[name]).sum()) for name, p in model.named_parameters())
        assert still > 100
        state = optimizer.progress.rule.state_dict()
        if rule == "momentum":
            assert len(state["steps"]) == step % 3 + 1
        else:
            assert {int(own[0]["step"]) for own in state.values()} == {step % 3 + 1}


@pytest.mark.parametrize("rule", ["momentum", "sign", "adam"])
def test_micro_batches_are_one_batch(rule: str) -> None:
    ends = []
    for pieces in (1, 4):
        model, (x, y) = mlp(), regression()
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, update=rule)
        for _ in range(8):
            for rows in torch.arange(len(x)).chunk(pieces):
                optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
            optimizer.apply()
        ends.append(snapshot(model))
    assert distance(*ends) < 1e-9


@pytest.mark.parametrize("rule", ["momentum", "sign", "adam"])
def test_groups_have_their_own_lr_and_may_come_later(rule: str) -> None:
    model, data = mlp(), regression()
    first, *rest = model.parameters()
    names = dict(model.named_parameters())
    optimizer = ZOOptimizer(
        [{"params": [("0.weight", first)], "lr": 0.0}, {"params": [("3.weight", rest[0])]}], lr=LR, eps=EPS, update=rule
    )
    before = snapshot(model)
    for _ in range(3):
        optimizer.step(mean_square(model, data))
    assert torch.equal(first, before["0.weight"])
    assert not torch.equal(rest[0], before["3.weight"])
    optimizer.add_param_group({"params": [("3.bias", names["3.bias"])]})
    optimizer.step(mean_square(model, data))
    assert not torch.equal(names["3.bias"], before["3.bias"])


# ---- logs and states


@pytest.mark.parametrize(
    ("name", "weights", "dtype"),
    [
        (name, weights, dtype)
        for name, rule in RULES_TO_LOG.items()
        for weights in RESIDENCIES
        for dtype in (torch.float32, torch.bfloat16)
        if not (rule.dense and weights == "inplace" and dtype == torch.bfloat16)  # refused
    ],
)
def test_the_step_log_is_replayed_bit_for_bit(name: str, weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    rule = RULES_TO_LOG[name]
    model, (x, y) = mlp(dtype=dtype), regression(dtype)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, update=rule, estimator=SPSA(2), safeguard=None)
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for _ in range(12):
        optimizer.step(lambda: (model(x) - y).float().square().mean())
    recorder.writer.close()
    again = mlp(dtype=dtype)
    assert replay(again, tmp_path / "run.zolog") == 12
    assert same(snapshot(again), snapshot(model))
    assert verify(mlp(dtype=dtype), tmp_path / "run.zolog").ok
    assert undo(again, tmp_path / "run.zolog", 5) == 5
    half = mlp(dtype=dtype)
    replay(half, tmp_path / "run.zolog", 5)
    assert same(snapshot(again), snapshot(half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES_TO_LOG)
def test_a_state_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Through a file that torch.load reads with weights_only."""
    model, data = mlp(dtype=dtype), regression(dtype)
    options = {"lr": LR, "eps": EPS, "update": RULES_TO_LOG[name]}
    optimizer = ZOOptimizer(model, **options)
    for _ in range(6):
        optimizer.step(mean_square(model, data))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), model.state_dict()], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    again = mlp(dtype=dtype, seed=3)
    again.load_state_dict(values)
    second = ZOOptimizer(again, **options)
    second.load_state_dict(state)
    third_model, third = copy.deepcopy((model, optimizer))
    for one, own in ((optimizer, model), (second, again), (third, third_model)):
        for _ in range(6):
            one.step(mean_square(own, data))
    assert same(snapshot(again), snapshot(model))
    assert same(snapshot(third_model), snapshot(model))


def test_a_state_of_another_rule_is_refused() -> None:
    optimizer = ZOOptimizer(mlp(), lr=LR, eps=EPS, update="adam")
    with pytest.raises(ValueError, match=r"update='sgd', but the state was saved with update='adam'. Resume with the same rule"):
        ZOOptimizer(mlp(), lr=LR, eps=EPS).load_state_dict(optimizer.state_dict())


def test_a_state_of_another_optimizer_of_torch_is_refused() -> None:
    optimizer = ZOOptimizer(mlp(), lr=LR, eps=EPS, update=TorchOptimizer("Adagrad"))
    said = r"update='torch.SGD', but the state was saved with update='torch.Adagrad'. Resume with the same rule"
    with pytest.raises(ValueError, match=said):
        ZOOptimizer(mlp(), lr=LR, eps=EPS, update=TorchOptimizer("SGD", momentum=0.9)).load_state_dict(optimizer.state_dict())


def test_a_shorter_window_takes_over_the_newest_steps() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, update=Momentum(0.5, window=20))
    for _ in range(10):
        optimizer.step(mean_square(model, data))
    other = ZOOptimizer(mlp(), lr=LR, eps=EPS, update=Momentum(0.5, window=3))
    other.load_state_dict(optimizer.state_dict())
    kept = [steps["zo"]["progress"]["update"]["state"]["steps"] for steps in (optimizer.state_dict(), other.state_dict())]
    assert kept[1] == kept[0][:3]


@pytest.mark.parametrize("rule", [Momentum(0.9, window=50), TorchOptimizer("SGD", momentum=0.9)], ids=str)
def test_weights_that_are_unfrozen_are_not_moved_along_directions_of_before(rule: UpdateRule) -> None:
    """The first step after it is that of a run which begins there, for what was frozen."""
    model, data = mlp(), regression()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-3, update=rule, safeguard=None)
    for _ in range(5):
        optimizer.step(mean_square(model, data))
    first.requires_grad_(True)
    before = first.detach().clone()
    optimizer.step(mean_square(model, data))
    fresh = mlp()
    fresh.load_state_dict({**model.state_dict(), "0.weight": before})
    assert optimizer.report is not None
    (term,) = optimizer.estimator.terms(optimizer.estimator.points(lambda i: query_seed(0, 5, i)), optimizer.report.values)
    z = torch.from_numpy(whole("rademacher", term.seed, "0.weight", first.numel())).view(first.shape)
    assert torch.allclose(first.detach() - before, -1e-2 * term.slope / 1e-3 * z, rtol=1e-9, atol=0)


def test_a_window_of_other_weights_is_not_taken_over_behind_a_step_either() -> None:
    frozen, data = mlp(), regression()
    next(iter(frozen.parameters())).requires_grad_(False)
    optimizer = ZOOptimizer(frozen, lr=LR, eps=EPS, update=Momentum(0.9))
    for _ in range(3):
        optimizer.step(mean_square(frozen, data))
    model = mlp()
    other = ZOOptimizer(model, lr=LR, eps=EPS, update=Momentum(0.9))
    other.step(mean_square(model, data))
    other.load_state_dict(optimizer.state_dict())
    other.step(mean_square(model, data))
    assert len(other.state_dict()["zo"]["progress"]["update"]["state"]["steps"]) == 1


@pytest.mark.parametrize("name", ["adam", "heavy ball", "RMSprop", "NAdam"])
def test_steps_with_lr_0_count_as_they_do_in_torch(name: str) -> None:
    """A warm-up begins with them."""
    model, data, lrs = mlp(), regression(), [0.0, 1e-2, 1e-2, 0.0, 1e-2]
    theta = {key: p.detach().clone() for key, p in model.named_parameters()}
    rule, how = DENSE[name]
    theirs: torch.optim.Optimizer = how(list(theta.values()))  # type: ignore[arg-type, assignment, call-arg]
    optimizer = ZOOptimizer(model, lr=1.0, eps=EPS, update=rule, safeguard=None)
    for step, lr in enumerate(lrs):
        estimate = reference.estimate(theta, error, Settings(lr, eps=EPS), step)
        for key, p in theta.items():
            p.grad = estimate[key]
        theirs.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = lr
        theirs.step()
        optimizer.step(mean_square(model, data))
    assert same(snapshot(model), theta)


# ---- options


def test_rules_and_their_names() -> None:
    assert {name: type(ZOOptimizer(mlp(), lr=LR, update=name, noise="gaussian").rule) for name in RULES if name != "torch"} == {
        "sgd": SGD,
        "sign": Sign,
        "momentum": Momentum,
        "adam": Adam,
        "hizoo": HiZOO,
    }
    assert ZOOptimizer(mlp(), lr=LR, update="momentum", clip=3.0).rule == Momentum(clip=3.0)
    assert TorchOptimizer(torch.optim.Adam, betas=[0.8, 0.9]) == TorchOptimizer("Adam", betas=(0.8, 0.9))
    assert ZOOptimizer(mlp(), update="momentum").defaults["lr"] == 1e-6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ZOOptimizer(mlp(), lr=LR, update="adamw"), r"update='adamw' is not known. Use one of 'sgd', 'sign', 'momentum', 'adam'"),
        (lambda: ZOOptimizer(mlp(), lr=LR, update="torch"), r"update='torch' is not known.* or an UpdateRule such as TorchOptimizer"),
        (lambda: ZOOptimizer(mlp(), update="adam"), r"lr is left out, and there is no usual one with update='adam'.* Give lr"),
        (lambda: ZOOptimizer(mlp(), lr=LR, update=Sign(clip=2.0), clip=1.0), r"Invalid clip: 1.0 beside update=Sign.*Give one of them"),
        (
            lambda: ZOOptimizer(mlp(), lr=LR, update="sign", estimator=Conservative()),
            r"Invalid update: 'sign' with .*Conservative",
        ),
        (lambda: ZOOptimizer(mlp(), lr=LR, update="adam", estimator=RankSGD(4, search=2)), r"Invalid update: 'adam' with .*RankSGD"),
        (lambda: ZOOptimizer(mlp(), lr=LR, update=Momentum(clip=1.0), estimator=RankSGD(4)), r"Invalid clip: 1.0 with"),
        (lambda: ZOOptimizer(mlp(), lr=LR, update="adam", weights=Offload()), r"Invalid update: 'adam' with weights=Offload.*\"momentum\""),
        (lambda: trained("adam", weights="inplace", dtype=torch.bfloat16), r"Invalid update: 'adam' with weights=\"inplace\" and 16-bit"),
        (lambda: Momentum(1.0), r"Invalid beta: 1.0. Must be a finite number >= 0 and < 1"),
        (lambda: Momentum(window=0), r"Invalid window: 0. Must be an integer >= 1 \(the steps"),
        (lambda: Sign(clip=-1.0), r"Invalid clip: -1.0"),
        (lambda: Adam(beta2=1.0), r"Invalid beta2: 1.0"),
        (lambda: Adam(epsilon=0.0), r"Invalid epsilon: 0.0"),
        (lambda: TorchOptimizer("Adamm"), r"Invalid optimizer: 'Adamm'. Use one of torch.optim: .*Adam, AdamW"),
        (lambda: TorchOptimizer(dict), r"Invalid optimizer: <class 'dict'>"),  # type: ignore[arg-type]
        (lambda: TorchOptimizer("Adam", lr=1e-3), r"lr=0.001\): lr is not one of its options here. Give the learning rate to"),
        (lambda: TorchOptimizer("AdamW", weight_decay=0.1), r"weight_decay is not one of its options here.*decoupled"),
        (lambda: TorchOptimizer("SGD", maximize=True), r"maximize is not one of its options here"),
        (lambda: TorchOptimizer("LBFGS"), r"torch.optim.LBFGS can't be used with {}: .*closure"),
        (lambda: TorchOptimizer("SparseAdam"), r"torch.optim.SparseAdam can't be used with {}: .*dense gradients"),
        (lambda: TorchOptimizer("Adam", beta=0.1), r"torch.optim.Adam can't be used with {'beta': 0.1}: .*unexpected keyword"),
        (lambda: TorchOptimizer("Adam", capturable=True), r"torch.optim.Adam can't be used with {'capturable': True}"),
        (lambda: TorchOptimizer("SGD", momentum=float("nan")), r"torch.optim.SGD can't be used with {'momentum': nan}"),
        (lambda: TorchOptimizer("SGD", options="{bad"), r"Invalid options: '{bad' is no JSON. Give options as keywords"),
        (lambda: TorchOptimizer("SGD", options="3"), r"Invalid options: '3' is no JSON of names and values"),
        (
            lambda: trained(TorchOptimizer("Muon"), steps=1),
            r"Invalid update: TorchOptimizer.*Muon.* can't train '3.bias' of shape \(1,\): .*Freeze it .requires_grad=False",
        ),
        (lambda: trained("sgd", clip=1.0, estimator=OneSided(3, normalized=True)), r"Invalid clip: 1.0 with .* only together"),
        (lambda: TorchOptimizer("Adam", betas=(0.1, 2.0)), r"torch.optim.Adam can't be used with .*Invalid beta"),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(("rule", "goes_on"), [("sgd", True), ("momentum", False), ("sign", True), ("adam", False)])
def test_weights_within_a_run_are_a_state_to_replay_from_only_where_nothing_is_remembered(rule: str, goes_on: bool, tmp_path: Path) -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, update=rule)
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    for step in range(8):
        if step == 4:
            log.mark(optimizer)
            half = copy.deepcopy(model)
        optimizer.step(mean_square(model, data))
    log.end(optimizer)
    log.close(optimizer)
    if goes_on:
        assert replay(half, log.path) == 8
        assert same(snapshot(half), snapshot(model))
    else:
        with pytest.raises(ValueError, match="in none of the states"):
            replay(half, log.path)


@dataclass(frozen=True)
class Keeping(Dense):
    """Keeps the estimates and moves nothing."""

    kept: list[Tensor] = field(default_factory=list)

    name = "keeping"

    def begin(self) -> DenseState:
        return KeepingState(self)


class KeepingState(DenseState):
    rule: Keeping

    def move(self, key: int, theta: Tensor, estimate: Tensor, lr: float) -> None:
        self.rule.kept.append(estimate.clone())


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_estimates_are_zero_where_nothing_is_trained(weights: str) -> None:
    model, rule = mlp(), Keeping()
    optimizer = ZOOptimizer(model, lr=LR, update=rule, mask=Mask("random", 0.3), weights=weights)
    optimizer.step(mean_square(model, regression()))
    zeros = [int((estimate == 0).sum()) for estimate in rule.kept if estimate.numel() == 160]
    assert zeros == [112]
