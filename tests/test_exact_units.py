"""weights="exact" over many forwards, branches that begin late, replaced modules: the values of a copy, with few writes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from engine_models import TOKENS, Block, Closure, LanguageModel, Spy, mean_square, next_token, regression, same, snapshot, train
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from zo_lightning.engine import ZOOptimizer, ZOWarning
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency import Exact
from zo_lightning.engine.residency.exact import KEEP_AFTER
from zo_lightning.engine.residency.memory import Scratch

SCRATCH = sys.modules["zo_lightning.engine.residency.scratch"]
PATHS = sys.modules["zo_lightning.engine.residency.paths"]
NEW = 12


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each write to scratch had."""
    plain, seen = SCRATCH.sweep, []

    def counted(items: Sequence[object], *rest: object, **more: object) -> None:
        seen.append(len(items))
        plain(items, *rest, **more)

    monkeypatch.setattr(SCRATCH, "sweep", counted)
    return seen


def exact(optimizer: ZOOptimizer) -> Exact:
    residency = optimizer.residency
    assert isinstance(residency, Exact)
    return residency


# ---- many forwards in one evaluation


def opt() -> nn.Module:
    sizes = {"ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=16, max_position_embeddings=40, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2))


def generating(model: nn.Module, found: list[list[int]]) -> Closure:
    def closure() -> Tensor:
        tokens = model.generate(torch.tensor([[5, 7, 9]]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=1)
        found.append(tokens[0].tolist())
        return tokens.double().mean()

    return closure


@pytest.mark.parametrize("make", [opt, gpt2])
def test_generation_writes_each_unit_a_few_times_and_gives_the_tokens_of_a_copy(make: Callable[[], nn.Module], writes: list[int]) -> None:
    found: dict[str, list[list[int]]] = {"copy": [], "exact": []}
    for weights, tokens in found.items():
        torch.manual_seed(0)
        model = make().eval()
        spy = Spy(model)
        optimizer = ZOOptimizer(model, lr=0.0, eps=0.05, weights=weights, safeguard=None)
        optimizer.step(generating(model, tokens))
        writes.clear()
        optimizer.step(generating(model, tokens))
        assert spy.back()
        if weights == "exact":
            units = len(exact(optimizer).units)
            assert len(writes) == 2 * units * (KEEP_AFTER + 1)
            assert 2 * units * NEW > len(writes)
    assert len(found["exact"]) == len(found["copy"]) + 1  # one pass is watched
    assert found["exact"][1:] == found["copy"]
    assert len({tuple(tokens) for tokens in found["copy"]}) > 1  # the perturbation changes what is generated


def test_between_the_forwards_of_a_generation_the_weights_are_back() -> None:
    model = gpt2().eval()
    spy, backs = Spy(model), []
    plain = model.prepare_inputs_for_generation

    def looking(*args: object, **kwargs: object) -> object:
        backs.append(spy.back())
        return plain(*args, **kwargs)

    model.prepare_inputs_for_generation = looking
    ZOOptimizer(model, lr=0.0, weights="exact", safeguard=None).step(generating(model, []))
    assert backs == [True] * (3 * NEW)


def test_losses_over_up_to_four_forwards_keep_to_the_memory_of_one_unit(writes: list[int]) -> None:
    memory = {}
    for forwards in (1, KEEP_AFTER, KEEP_AFTER + 1, 3 * KEEP_AFTER):
        model = LanguageModel("tied", blocks=3).double()
        loss = next_token(model)
        optimizer = ZOOptimizer(model, lr=0.0, weights="exact")
        residency = exact(optimizer)

        def closure(loss: Closure = loss, forwards: int = forwards) -> Tensor:
            return torch.stack([loss() for _ in range(forwards)]).sum()

        optimizer.step(closure)
        writes.clear()
        optimizer.step(closure)
        units = sum(unit.module is not None for unit in residency.units)
        assert len(writes) == 2 * (units * min(forwards, KEEP_AFTER + 1) + len(residency.units) - units)
        memory[forwards] = residency.scratch_bytes()
    assert memory[1] == memory[KEEP_AFTER] < memory[KEEP_AFTER + 1] == memory[3 * KEEP_AFTER]


def test_layers_that_share_one_block_write_it_a_few_times(writes: list[int]) -> None:
    results = []
    for weights in ("copy", "exact"):
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
        model = AlbertForSequenceClassification(AlbertConfig(vocab_size=30, embedding_size=8, hidden_size=16, **sizes)).double()
        optimizer = ZOOptimizer(model, lr=0.01, weights=weights)
        values = train(optimizer, lambda model=model: model(TOKENS, labels=torch.tensor([0, 1])).loss)
        results.append((values, snapshot(model)))
        writes.clear()
        train(optimizer, lambda model=model: model(TOKENS, labels=torch.tensor([0, 1])).loss, 1)
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    entries = exact(optimizer)._lane.entries.values()
    assert max(entries) == 12
    assert len(writes) == 2 * sum(min(count, KEEP_AFTER + 1) for count in entries)


def test_an_embedding_that_is_kept_has_all_its_rows(writes: list[int]) -> None:
    """Later forwards read rows that the first ones have not."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.scale = nn.Embedding(400, 128), nn.Parameter(torch.tensor(0.5))

        def forward(self, at: int) -> Tensor:
            return self.embed(torch.tensor([at, at + 1])).tanh().mean() * self.scale

    values = []
    for weights in ("copy", "exact"):
        torch.manual_seed(0)
        model = Table().double()
        closure = lambda model=model: torch.stack([model(7 * i) for i in range(20)]).sum()  # noqa: E731
        values.append(train(ZOOptimizer(model, lr=0.01, eps=0.1, weights=weights), closure))
    assert values[0] == values[1]


# ---- reads that begin later


class Branching(nn.Module):
    """`path` says which branch runs; both readers of the embedding are in `pair`, and so is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        self.pair = nn.ModuleDict({"embed": nn.Embedding(11, 16), "first": nn.Linear(16, 16)})
        self.blocks = nn.ModuleList([Block(), Block()])
        self.extra = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.pair["first"](self.pair["embed"](tokens))
        for i, block in enumerate(self.blocks):
            x = x if self.path == "skip" and i else block(x)
        if self.path == "skip":
            x = x + self.blocks[1].norm.weight
        if self.path == "call":
            x = self.extra(x) + self.blocks[0].down.bias
        if self.path == "read":
            x = x + self.blocks[0].down.bias
        return self.head(x)


def losses_along(paths: Sequence[str], weights: str) -> list[tuple[float, ...]]:
    torch.manual_seed(0)
    model = Branching().double()
    optimizer = ZOOptimizer(model, lr=0.0, eps=0.1, weights=weights)
    values = []
    for path in paths:
        model.path = path
        optimizer.step(next_token(model))
        assert optimizer.report is not None
        values.append(optimizer.report.values)
    return values


@pytest.mark.parametrize("path", ["call", "skip"])
def test_a_branch_that_runs_other_modules_is_watched_once_it_was_taken(path: str) -> None:
    """One step, in which the branch was not known, reads a base weight; it is said."""
    steps = ["", "", path, path, path, "", path]
    expected = losses_along(steps, "copy")
    with pytest.warns(ZOWarning, match=r'weights="exact": blocks\.\d\..* began to be read by another module after the first step'):
        got = losses_along(steps, "exact")
    assert [a == b for a, b in zip(got, expected, strict=True)] == [True, True, False, True, True, True, True]


def test_a_read_in_a_branch_of_the_same_modules_is_found_by_the_next_periodic_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATHS, "WATCH_AGAIN", 8)
    steps = ["", "", "read", "read", "read", "read"]
    expected = losses_along(steps, "copy")
    with pytest.warns(ZOWarning, match=r"blocks\.0\.down\.bias began to be read"):
        got = losses_along(steps, "exact")
    assert [a == b for a, b in zip(got, expected, strict=True)] == [True, True, False, False, True, True]


def test_periodic_passes_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATHS, "WATCH_AGAIN", 8)
    model = LanguageModel("tied").double()
    loss, calls = next_token(model), []
    optimizer = ZOOptimizer(model, lr=0.0, weights="exact")
    for _ in range(32):
        optimizer.step(lambda: calls.append(optimizer.steps) or loss())
    watched = [step for step in range(32) if calls.count(step) == 3]
    assert watched == [0, 4, 8, 16]


@pytest.mark.parametrize(("every", "watched"), [(2, 3), (20, 1 + 2 * PATHS.TRIES)])
def test_a_branch_that_comes_and_goes_is_watched_a_bounded_number_of_times(every: int, watched: int) -> None:
    """Every second step: found at once. Rarer than that: a few passes each time that it is taken."""
    model = Branching().double()
    optimizer = ZOOptimizer(model, lr=0.0, weights="exact")
    loss, calls = next_token(model), []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(60):
            model.path = "call" if step % every == every - 1 else ""
            optimizer.step(lambda: calls.append(model.path) or loss())
    assert len(calls) == 2 * 60 + watched
    assert len(said) == (every == 2)


def test_a_reader_on_each_side_has_the_weight_on_scratch_in_their_common_parent_alone() -> None:
    """Two modules read a weight that a third one owns: it moves to the module that holds all three, not to the whole evaluation."""

    class Reader(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.table = table
            self.own = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x) + self.table.weight[2]

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = nn.Embedding(11, 16)
            self.table, self.first, self.second = table, Reader(table), Reader(table)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.second(self.first(self.table(tokens)))

    values = []
    for weights in ("copy", "exact"):
        torch.manual_seed(0)
        model = nn.Sequential(Parent(), nn.Linear(16, 11)).double()
        optimizer = ZOOptimizer(model, lr=0.01, eps=0.1, weights=weights)
        values.append(train(optimizer, next_token(model)))
    assert values[0] == values[1]
    assert {unit.module for unit in exact(optimizer).units if any(p.name == "0.table.weight" for p in unit.parameters)} == {
        model[0].table,
        model[0],
    }


# ---- modules that change


class OtherInEvaluation(Branching):
    """Reads a weight of another module in evaluation mode, where the same modules run."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.path = "" if self.training else "read"
        return super().forward(tokens)


def test_a_read_in_evaluation_mode_alone_is_watched_when_the_mode_is_new() -> None:
    values = []
    for weights in ("copy", "exact"):
        torch.manual_seed(0)
        model = OtherInEvaluation().double()
        optimizer = ZOOptimizer(model, lr=0.01, eps=0.1, weights=weights)
        rows = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for training in (True, False, True, False):
                rows += train(optimizer, next_token(model.train(training)), 2)
        assert len(said) == (weights == "exact")
        values.append(rows)
    assert values[0] == values[1]


class Around(nn.Module):
    """Reads the weights of what it holds instead of calling it."""

    def __init__(self, inner: nn.LayerNorm) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), self.inner.weight, self.inner.bias) * 1.5


def replace_unit(model: LanguageModel) -> None:
    model.norm = Around(model.norm)


def replace_in_block(model: LanguageModel) -> None:
    model.blocks[0].norm = Around(model.blocks[0].norm)


def replace_blocks(model: LanguageModel) -> None:
    model.blocks = nn.ModuleList(reversed(model.blocks))


@pytest.mark.parametrize("replace", [replace_unit, replace_in_block, replace_blocks])
def test_modules_replaced_between_steps(replace: Callable[[LanguageModel], None]) -> None:
    values = []
    for weights in ("copy", "exact"):
        torch.manual_seed(0)
        model = LanguageModel("tied").double()
        optimizer = ZOOptimizer(model, lr=0.01, eps=0.1, weights=weights)
        rows = train(optimizer, next_token(model))
        replace(model)
        values.append(rows + train(optimizer, next_token(model)))
    assert values[0] == values[1]


def test_one_layer_under_two_names_and_blocks_in_containers_of_containers() -> None:
    values = []
    for weights in ("copy", "exact"):
        torch.manual_seed(0)
        shared = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(10, 10)), nn.Tanh())
        towers = nn.ModuleList([nn.ModuleList([shared, nn.Sequential(nn.Linear(10, 10), nn.Tanh()), shared]) for _ in range(2)])
        model = nn.ModuleDict({"towers": towers, "head": nn.Linear(10, 1)}).double()

        def forward(x: Tensor, model: nn.ModuleDict = model) -> Tensor:
            for tower in model["towers"]:
                for layer in tower:
                    x = x + layer(x)
            return model["head"](x)

        values.append(train(ZOOptimizer(model, lr=0.01, weights=weights), mean_square(forward, regression())))
    assert values[0] == values[1]


def test_scratch_that_is_given_back_out_of_order_is_not_handed_out_twice() -> None:
    """As after an error inside a unit that the unit around it caught."""
    first, second, third = (Trained(name, i, torch.zeros(64), 0, ()) for i, name in enumerate("abc"))
    scratch = Scratch([[first, second]])
    _, give_back_first = scratch.take([first])
    (out,), give_back_second = scratch.take([second])
    give_back_first()
    others = [scratch.take([third])[0][0] for _ in range(2)]
    out.fill_(1)
    for other in others:
        other.fill_(2)
    assert bool((out == 1).all())
    give_back_second()
