"""Which tensors are trained, what they are called, and that their noise follows the name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_models import LanguageModel, bits, mean_square, mlp, next_token, regression, same, snapshot
from torch import nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.parameters import canonical_names, collect, names_of
from zo_lightning.engine.seeds import parameter_key

NAMES = {
    "bare": (["a.weight", "b.bias"], ["a.weight", "b.bias"]),
    "common prefix": (["model.net.a.weight", "model.net.b.bias"], ["a.weight", "b.bias"]),
    "DDP": (["module.a.weight", "module.b.bias"], ["a.weight", "b.bias"]),
    "compiled": (["_orig_mod.a.weight", "_orig_mod.b.bias"], ["a.weight", "b.bias"]),
    "compiled inside": (["net._orig_mod.a.weight", "net.b.bias"], ["a.weight", "b.bias"]),
    "FSDP": (["_fsdp_wrapped_module.a._fsdp_wrapped_module.weight", "_fsdp_wrapped_module.b.bias"], ["a.weight", "b.bias"]),
    "checkpointed": (["a._checkpoint_wrapped_module.weight", "b.bias"], ["a.weight", "b.bias"]),
    "one layer keeps the last part": (["model.layer.weight", "model.layer.bias"], ["weight", "bias"]),
    "one weight": (["model.weight"], ["weight"]),
    "a module that is called module": (["module.weight", "weight"], ["module.weight", "weight"]),
    "a weight that is called module": (["a.module", "b.weight"], ["a", "b.weight"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_those_of_the_bare_model(case: str) -> None:
    given, expected = NAMES[case]
    assert canonical_names(given) == expected


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, *args: object) -> object:
        return self.module(*args)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as .module": Wrapped,
    "twice": lambda inner: Wrapped(Wrapped(inner)),
    "in a ModuleDict": lambda inner: nn.ModuleDict({"model": inner}),
    "compiled": lambda inner: torch.compile(inner, backend="eager"),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_trains_as_the_bare_one(wrapper: str) -> None:
    data, bare, inner = regression(), mlp(), mlp()
    first, second = ZOOptimizer(bare, lr=0.05), ZOOptimizer(WRAPPERS[wrapper](inner), lr=0.05)
    for _ in range(3):
        first.step(mean_square(bare, data))
        second.step(mean_square(inner, data))
    assert same(snapshot(bare), snapshot(inner))


def train(model: nn.Module, params: object, **options: object) -> dict[str, torch.Tensor]:
    optimizer = ZOOptimizer(params, lr=0.05, **options)  # type: ignore[arg-type]
    for _ in range(3):
        optimizer.step(mean_square(model, regression()))
    return snapshot(model)


INPUTS: dict[str, Callable[[nn.Module], tuple[object, dict[str, object]]]] = {
    "named parameters": lambda model: (model.named_parameters(), {}),
    "reversed names": lambda model: (list(model.named_parameters())[::-1], {}),
    "tensors and the module": lambda model: (model.parameters(), {"module": model}),
    "groups and the module": lambda model: ([{"params": [p]} for p in reversed(list(model.parameters()))], {"module": model}),
    "groups of names": lambda model: ([{"params": [pair]} for pair in model.named_parameters()], {}),
    "a group of one tensor": lambda model: ([{"params": p} for p in model.parameters()], {"module": model}),
}


@pytest.mark.parametrize("given", INPUTS)
def test_noise_follows_the_name_whatever_the_order_and_the_groups(given: str) -> None:
    model = mlp()
    params, options = INPUTS[given](model)
    whole = mlp()
    assert same(train(model, params, **options), train(whole, whole))


def test_tensors_without_names_are_numbered() -> None:
    model = mlp()
    optimizer = ZOOptimizer(list(model.parameters()))
    assert [p.name for p in collect(optimizer.param_groups, {})] == ["unnamed.0", "unnamed.1", "unnamed.2"]


def test_freezing_one_weight_does_not_change_the_noise_of_the_others() -> None:
    """A stream belongs to a name of the whole model, not to a place in the list of what is trained."""
    model = mlp()
    names = names_of(model)
    model[0].requires_grad_(False)
    trained = collect([{"params": list(model.parameters())}], names)
    assert [(p.name, p.key) for p in trained] == [(name, parameter_key(name)) for name in ("3.weight", "3.bias")]


def test_equal_shapes_have_different_noise() -> None:
    """Released code reseeds per tensor: with 24 tensors, the cosine to the gradient cannot exceed 0.2."""
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(24)])
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()
    optimizer = ZOOptimizer(model, lr=1.0, eps=1.0)
    optimizer.step(lambda: sum(layer.weight.sum() for layer in model))  # type: ignore[arg-type,return-value]
    steps = torch.stack([layer.weight.detach().flatten().sign() for layer in model])
    assert steps.unique(dim=0).shape[0] == 24
    assert float((steps @ steps.T / 64 - torch.eye(24)).abs().max()) < 0.7


def test_tied_weights_are_perturbed_and_updated_once() -> None:
    """Released code perturbs them twice. The embedding and the head are one parameter with one place in the list."""
    model = LanguageModel("tied").double()
    optimizer = ZOOptimizer(model, lr=0.01)
    names = [p.name for p in optimizer.residency.trained]
    assert names.count("embed.weight") == 1
    assert "head.weight" not in names
    untied = LanguageModel("functional").double()
    untied.load_state_dict({k: v for k, v in model.state_dict().items() if k != "head.weight"})
    other = ZOOptimizer(untied, lr=0.01)
    for _ in range(3):
        optimizer.step(next_token(model))
        other.step(next_token(untied))
    assert torch.equal(bits(model.embed.weight), bits(untied.embed.weight))
    assert model.head is not None
    assert model.head.weight is model.embed.weight


def test_two_parameters_over_one_storage_are_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    optimizer = ZOOptimizer(model, lr=1.0, eps=1.0)
    start = model[0].weight.detach().clone()
    optimizer.step(lambda: model[0].weight.sum() + model[1].weight.sum())
    (trained,) = optimizer.residency.trained
    assert len(trained.aliases) == 2
    change = (model[0].weight.detach() - start).abs()
    assert float(change.min()) > 0
    torch.testing.assert_close(change, change[:1, :1].expand(4, 4).contiguous(), rtol=1e-3, atol=1e-3)
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()


def test_frozen_and_integer_tensors_are_never_touched() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    model.register_parameter("count", nn.Parameter(torch.arange(5), requires_grad=False))
    before = snapshot(model)
    ZOOptimizer(model, lr=0.1, weight_decay=0.5).step(mean_square(model[:4], regression()))
    after = snapshot(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["count"], after["count"])
    assert not torch.equal(before["3.weight"], after["3.weight"])


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels-last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "permuted": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "a slice with holes": lambda w: torch.stack([w, w], -1)[..., 0],
}


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_a_weight_changes_neither_its_noise_nor_itself(layout: str, weights: str) -> None:
    results = []
    for change in (lambda w: w, LAYOUTS[layout]):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 6, 3).double()
        conv.weight = nn.Parameter(change(conv.weight.detach()))
        model = nn.Sequential(conv)
        strides = conv.weight.stride()
        optimizer = ZOOptimizer(model, lr=0.05, weights=weights)
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        for _ in range(3):
            optimizer.step(lambda model=model, x=x: model(x).square().mean())
        assert conv.weight.stride() == strides
        results.append(conv.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
    assert not torch.equal(results[0], torch.zeros_like(results[0]))


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_a_weight_without_dimensions_and_an_empty_one_train(weights: str) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    model.none = nn.Parameter(torch.empty(0, 4, dtype=torch.float64))
    model.forward = lambda x: (model.scale * x - 1).square().sum() + model.none.sum()  # type: ignore[method-assign]
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    for _ in range(60):
        optimizer.step(lambda: model(torch.ones((), dtype=torch.float64)))
    assert float(model.scale.detach()) == pytest.approx(1.0, abs=1e-3)
