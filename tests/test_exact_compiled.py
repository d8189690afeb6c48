"""weights="exact" on compiled and partly compiled models: the losses and bits of a copy, no graph compiled anew, base weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from engine_models import Closure, LanguageModel, Nested, Spy, bits, next_token, same, snapshot, train
from torch import nn
from torch._dynamo.testing import CompileCounter

from zo_lightning.engine import ZOOptimizer, ZOWarning
from zo_lightning.engine.residency import Exact
from zo_lightning.engine.residency.units import hookable, is_compiled

pytestmark = pytest.mark.filterwarnings("ignore:weights=.exact. writes .* a compiled module:zo_lightning.engine.ZOWarning")

Compiler = Callable[[nn.Module], nn.Module]


def wrapped(backend: object) -> Compiler:
    return lambda module: torch.compile(module, backend=backend)


def in_place(backend: object) -> Compiler:
    def call(module: nn.Module) -> nn.Module:
        module.compile(backend=backend)
        return module

    return call


HOW: dict[str, Callable[[object], Compiler]] = {"torch.compile(module)": wrapped, "module.compile()": in_place}


def all_blocks(model: LanguageModel, compiled: Compiler) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = compiled(block)
    return model


def one_block(model: LanguageModel, compiled: Compiler) -> nn.Module:
    model.blocks[1] = compiled(model.blocks[1])
    return model


def inside_a_block(model: LanguageModel, compiled: Compiler) -> nn.Module:
    model.blocks[0].up = compiled(model.blocks[0].up)
    model.norm = compiled(model.norm)
    return model


def inside_a_compiled_block(model: LanguageModel, compiled: Compiler) -> nn.Module:
    model.blocks[0].up = compiled(model.blocks[0].up)
    model.blocks[0] = compiled(model.blocks[0])
    return model


def embedding(model: LanguageModel, compiled: Compiler) -> nn.Module:
    model.embed = compiled(model.embed)
    return model


WHAT: dict[str, Callable[[LanguageModel, Compiler], nn.Module]] = {
    "all blocks": all_blocks,
    "one block": one_block,
    "modules inside a block and outside": inside_a_block,
    "a block and a module in it": inside_a_compiled_block,
    "the embedding, whose weight is the head's": embedding,
    "the whole model": lambda model, compiled: compiled(model),
}

LEAVES = ("modules inside a block and outside", "the embedding, whose weight is the head's")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(what: str, compiled: Compiler, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return WHAT[what](LanguageModel(blocks=3).to(dtype), compiled)


@pytest.mark.parametrize("called_before", [False, True], ids=["new", "called before"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WHAT)
def test_compiled_models_train_the_bits_of_a_copy(what: str, how: str, called_before: bool) -> None:
    results = []
    for weights in ("copy", "exact"):
        torch._dynamo.reset()
        model = make(what, HOW[how]("eager"))
        if called_before:
            with torch.no_grad():
                next_token(model)()
        results.append((train(ZOOptimizer(model, lr=0.01, weights=weights), next_token(model), 4), snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    assert all(plus != minus for plus, minus in results[0][0])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WHAT)
def test_nothing_is_compiled_after_the_first_step(what: str, how: str) -> None:
    counter = CompileCounter()
    model = make(what, HOW[how](counter))
    optimizer = ZOOptimizer(model, lr=0.01, weights="exact")
    optimizer.step(next_token(model))
    graphs = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(optimizer, next_token(model), 4)
    assert counter.frame_count == graphs
    if not (how == "module.compile()" and what in LEAVES):  # torch compiles nothing of a layer of its own that is called like that
        assert graphs >= 1  # compiled code runs, and is not given up because of what is watched or hooked


@pytest.mark.filterwarnings('ignore:weights="exact" writes')
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WHAT)
def test_base_weights_keep_their_bits_and_no_unit_is_inside_a_compiled_module(what: str, how: str) -> None:
    model = make(what, HOW[how]("eager"), torch.bfloat16)
    before = {name: bits(weight).clone() for name, weight in model.named_parameters()}
    pointers = [weight.data_ptr() for weight in model.parameters()]
    optimizer = ZOOptimizer(model, lr=0.0, weights="exact")
    losses = train(optimizer, next_token(model), 5)
    assert all(plus != minus for plus, minus in losses)
    assert all(torch.equal(bits(weight), before[name]) for name, weight in model.named_parameters())
    assert [weight.data_ptr() for weight in model.parameters()] == pointers
    assert isinstance(optimizer.residency, Exact)
    reachable = hookable(model)
    assert all(unit.module in reachable for unit in optimizer.residency.units if unit.module is not None)


@pytest.mark.parametrize("how", HOW)
def test_an_exception_in_a_compiled_block_points_back(how: str) -> None:
    for error in (ValueError, KeyboardInterrupt):

        def broken(*args: object, error: type[BaseException] = error) -> None:
            raise error("inside")

        torch._dynamo.reset()
        torch.manual_seed(0)
        model = LanguageModel().double()
        optimizer = ZOOptimizer(model, lr=0.0, weights="exact")
        spy = Spy(model)
        model.blocks[1].down.register_forward_hook(torch.compiler.disable(broken))
        model.blocks[1] = HOW[how]("eager")(model.blocks[1])
        call = model.blocks[1]._compiled_call_impl
        with pytest.raises(error, match="inside"):
            optimizer.step(next_token(model))
        assert spy.back()
        assert model.blocks[1]._compiled_call_impl is call


def test_blocks_that_are_compiled_between_steps_are_units_as_before() -> None:
    results = []
    for weights in ("copy", "exact"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Nested().double()
        optimizer = ZOOptimizer(model, lr=0.01, weights=weights)
        values = train(optimizer, next_token(model))
        model.stages[0].compile(backend="eager")
        values += train(optimizer, next_token(model))
        model.stages[1] = torch.compile(model.stages[1], backend="eager")
        results.append(values + train(optimizer, next_token(model)))
    assert results[0] == results[1]


def test_a_compiled_model_costs_a_copy_in_memory_and_says_so_once() -> None:
    model = make("the whole model", wrapped("eager"))
    with pytest.warns(ZOWarning, match=r'weights="exact" writes 0\.1 MB to scratch at once.*Compile the blocks one by one'):
        residency = ZOOptimizer(model, weights="exact").residency
    assert isinstance(residency, Exact)
    assert [is_compiled(unit.module) for unit in residency.units if unit.module is not None] == [True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # an import inside torch
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", ["all blocks", "the whole model"])
def test_fused_kernels_train_the_bits_of_a_copy(what: str, how: str) -> None:
    results = []
    for weights in ("copy", "exact"):
        torch._dynamo.reset()
        model = make(what, HOW[how]("inductor"), torch.float32)
        loss: Closure = next_token(model)
        results.append((train(ZOOptimizer(model, lr=0.01, weights=weights), loss, 4), snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
