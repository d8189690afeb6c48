"""What users do with masks that would train something else than they think: said before the first step, or made right."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from engine_models import mean_square, mlp, regression, same, snapshot
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.masks import LayerSampling, Mask, NofM, Random, Sensitive, SmallWeights, Where


def masked(model: nn.Module, mask: Mask | None, **options: Any) -> ZOOptimizer:
    return ZOOptimizer(model, lr=0.01, mask=mask, **options)


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_the_zeros_of_a_new_adapter_and_the_ones_of_a_norm_stay_trained(weights: str) -> None:
    """By its threshold alone, a weight that was equal to it would rest after its first update."""
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0 if p.dim() == 1 else 0.0)
        model[0].weight[0].normal_()  # type: ignore[index]
    optimizer = masked(model, Mask(SmallWeights(), 0.25), weights=weights)
    inputs = regression()

    def moved() -> list[int]:
        before = snapshot(model)
        optimizer.step(lambda: sum((p * 0.3 + 1).square().sum() for p in model.parameters()) + 0 * mean_square(model, inputs)())
        return [int((p != before[name]).sum()) for name, p in model.named_parameters()]

    counts = [round(0.25 * p.numel()) for p in model.parameters()]
    assert [moved(), moved(), moved()] == [counts] * 3


@pytest.mark.parametrize("weights", ["exact", "copy"])
def test_a_thread_that_settles_through_the_optimizer_waits_for_the_evaluation(weights: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer, x = ZOOptimizer(model, lr=0.01, weights=weights), torch.randn(8, 4)
    optimizer.step(lambda: model(x).square().mean())
    before, seen, began = snapshot(model), [], threading.Event()

    def read() -> None:
        began.set()
        with optimizer.settled():
            seen.append(same(before, snapshot(model)))

    reader = threading.Thread(target=read)

    def inside(*args: object) -> None:
        with optimizer.settled():
            seen.append(same(before, snapshot(model)))
        if not began.is_set():
            reader.start()
            began.wait(10)

    model[2].register_forward_hook(inside)
    optimizer.estimate(lambda: model(x).square().mean())
    reader.join(10)
    assert seen == [True] * len(seen)
    assert len(seen) >= 3


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (Mask("small_weights", 0.1), Mask("small_weights", 0.5)),
        (Mask("small_weights", 0.1), Mask("large_weights", 0.1)),
        (Mask("random", 0.1), Mask("random", 0.1, frozen="0.*")),
        (Mask("random", 0.1), None),
        (None, Mask("random", 0.1)),
    ],
)
def test_a_state_of_another_mask_is_refused(there: Mask | None, here: Mask | None) -> None:
    model = mlp()
    first = masked(model, there)
    first.step(mean_square(model, regression()))
    second = masked(model, here)
    with pytest.raises(ValueError, match="Resume with the same mask"):
        second.load_state_dict(first.state_dict())


def test_masks_with_functions_resume() -> None:
    masks = [Mask(Where(lambda name, tensor: tensor.dim() > 0 * len(name)), refresh=3) for _ in range(2)]
    model = mlp()
    first = masked(model, masks[0])
    first.step(mean_square(model, regression()))
    second = masked(model, masks[1])
    second.load_state_dict(first.state_dict())
    assert second.masks.chosen is not None


def test_losses_of_another_model_are_refused() -> None:
    model, copy = mlp(), mlp()
    loss = mean_square(copy, regression())
    optimizer = masked(model, Mask(Sensitive(lambda: [loss()]), 0.1))
    with pytest.raises(ValueError, match="depends on no trained weight"):
        optimizer.step(mean_square(model, regression()))


@pytest.mark.parametrize("given", [torch.zeros(()), None, 3.0])
def test_losses_that_are_no_sequence_are_refused(given: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"losses\(\) gave .* must return several losses"):
        masked(model, Mask(Sensitive(lambda: given), 0.1)).step(mean_square(model, regression()))


@pytest.mark.parametrize(("numel", "density"), [(2, 0.5), (10, 0.8), (100, 0.9), (1000, 0.99)])
def test_random_masks_of_small_layers_have_exactly_their_share(numel: int, density: float) -> None:
    for seed in range(100):
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(numel))  # type: ignore[assignment]
        optimizer = masked(model, Mask(Random(), density), seed=seed, weights="copy")
        optimizer.masks.begin(0, optimizer.residency.trained, seed, optimizer.noise)
        (p,) = optimizer.residency.trained
        mask = optimizer.masks.of(p.key)
        assert mask is not None
        assert int(mask.keep(p.tensor.detach(), 0).sum()) == round(density * numel)


def a_mask(**options: Any) -> Mask:
    return Mask("random", 0.5, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: a_mask(include=None), "Invalid include: None"),
        (lambda: a_mask(frozen=5), "Invalid frozen: 5"),
        (lambda: Mask(SmallWeights, 0.5), r"Did you mean SmallWeights\(\)"),
        (lambda: Where("bias"), "Invalid function: 'bias'"),
        (lambda: NofM(smallest="x"), "Invalid smallest: 'x'"),
        (lambda: LayerSampling(weights=5), "Invalid weights: 5"),
        (lambda: LayerSampling(weights="12"), "Invalid weights: '12'"),
        (lambda: LayerSampling(weights=[1, "a"]), "Invalid weights"),
        (lambda: LayerSampling(by="outliers", weights=[1, 2]), "by='outliers' does nothing"),
    ],
)
def test_bad_options_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("options", [{"exclude": "*"}, {"include": []}, {"frozen": "*"}])
def test_a_rule_without_layers_is_an_error(options: dict[str, Any]) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="leave no layer to"):
        masked(model, a_mask(**options)).step(mean_square(model, regression()))


def test_an_empty_tensor_is_nothing_to_train() -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.ones(10, 10)), nn.Parameter(torch.empty(0))  # type: ignore[assignment]
    optimizer = masked(model, Mask("random", 1e-4), weights="copy")

    def loss() -> Tensor:
        total: Tensor = model.a.sum()  # type: ignore[operator,assignment]
        return total

    with pytest.raises(ValueError, match=r"leaves nothing to train\. Use a higher density"):
        optimizer.step(loss)
