"""Which way of perturbing weights a model gets, what each needs, and what is said: auto, compiled models, adapters, 16 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable

import peft
import pytest
import torch
from engine_models import (
    RESIDENCIES,
    LanguageModel,
    by_hand,
    mlp,
    next_token,
    sequence_model,
    snapshot,
    train,
)
from reference.spsa import Settings

from zo_lightning.engine import ZOOptimizer, ZOWarning
from zo_lightning.engine.residency import Copy, Exact, InPlace

CHOOSE = sys.modules["zo_lightning.engine.residency.choose"]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of the tests count as large."""
    monkeypatch.setattr(CHOOSE, "SMALL_BYTES", 0)


def test_auto_copies_what_is_small_and_says_nothing() -> None:
    assert isinstance(ZOOptimizer(mlp()).residency, Copy)
    assert isinstance(ZOOptimizer(list(mlp().parameters())).residency, Copy)


def test_auto_takes_blocks_where_it_finds_them_and_says_nothing(large: None) -> None:
    assert isinstance(ZOOptimizer(LanguageModel()).residency, Exact)
    assert isinstance(ZOOptimizer(LanguageModel().parameters(), module=LanguageModel()).residency, Exact)


IN_PLACE: dict[str, Callable[[], ZOOptimizer]] = {
    "the model is not known": lambda: ZOOptimizer(LanguageModel().parameters()),
    "the model is compiled": lambda: ZOOptimizer(torch.compile(LanguageModel(), backend="eager")),
    "the model has no repeated blocks": lambda: ZOOptimizer(mlp()),
}


@pytest.mark.parametrize("reason", IN_PLACE)
def test_auto_is_in_place_otherwise_and_says_once_why(reason: str, large: None) -> None:
    with pytest.warns(ZOWarning, match=f"in place, because {reason}"):
        assert isinstance(IN_PLACE[reason]().residency, InPlace)
    assert isinstance(IN_PLACE[reason]().residency, InPlace)  # warnings are errors: said once


def test_exact_needs_the_model() -> None:
    with pytest.raises(ValueError, match='weights="exact" needs the model'):
        ZOOptimizer(mlp().parameters(), weights="exact").step(lambda: 0.0)


@pytest.mark.filterwarnings("ignore:weights=.exact. writes .* a compiled module:zo_lightning.engine.ZOWarning")
@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("given", ["compiled", "inner"])
def test_a_model_that_was_compiled_and_called_before_trains_as_an_uncompiled_one(given: str, weights: str) -> None:
    """Hooks that are added after its first call may never run: then both losses would be equal, and the gradient zero, silently."""
    torch._dynamo.reset()
    model, plain = sequence_model("tied head"), sequence_model("tied head")
    compiled = torch.compile(model, backend="eager")
    next_token(compiled)()
    expected = train(ZOOptimizer(plain, lr=0.01, weights="copy"), next_token(plain))
    got = train(ZOOptimizer(compiled if given == "compiled" else model, lr=0.01, weights=weights), next_token(compiled))
    assert got == [pytest.approx(row, rel=1e-11) for row in expected]


def test_adapters_alone_train_and_auto_copies_them(large: None) -> None:
    """LoRA through peft: the base model, larger by far, stays as it is, and no block of it is copied."""
    torch.manual_seed(0)
    base = LanguageModel(width=64, head="tied").double()
    model = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["up", "down"], lora_dropout=0.1))
    before = snapshot(model)
    expected, losses = by_hand(model, next_token, Settings(0.05), prefix="base_model.model.")
    optimizer = ZOOptimizer(model, lr=0.05, eps=1e-3)
    assert isinstance(optimizer.residency, Copy)
    assert train(optimizer, next_token(model)) == [pytest.approx(row, rel=1e-9) for row in losses]
    changed = {name for name, weight in snapshot(model).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(expected) == len(changed) == 8
