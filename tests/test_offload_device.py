"""Weights in files or in CPU memory, and a device that computes: the steps of "exact", bit for bit, in a few buffers that are used again.

The device is the CPU here, whose copies are done at once; `Late` stands in for one that does them as late as it may. What needs a GPU runs
where there is one.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import same, snapshot
from test_offload import MODELS, OPTIONS, evaluated, loss_of, made, offloaded, opened, train, values
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.offload import choose
from zo_lightning.engine.offload.buffers import InBuffers
from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.lanes import Lanes
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency import Offload
from zo_lightning.engine.residency.watch import ReadWatch

MEMORY = Offload(tier="memory")


# ---- a device that does everything as late as it may


@dataclass(eq=False)
class Copy:
    """A copy that was asked for."""

    out: Tensor
    source: Tensor
    after: list[Any]
    before: Copy | None
    done: bool = False

    def make(self) -> None:
        if not self.done:
            for other in [self.before, *self.after]:
                if isinstance(other, Copy):
                    other.make()
            self.out.copy_(self.source)
            self.done, self.before, self.after = True, None, []


@dataclass
class Computed:
    """A mark of what was computed."""

    clock: int


@dataclass
class Late(Lanes):
    """Copies are made when somebody waits for them, some by chance before. A buffer that is written to must not be used any more."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    clock: int = 0
    last: dict[str, Copy] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)
    """By address of a buffer, the clock when it was last lent."""

    def mark(self) -> Any:
        self.clock += 1
        return Computed(self.clock)

    def _copy(self, lane: str, out: Tensor, source: Tensor, after: Iterable[Any]) -> Any:
        made = Copy(out, source, list(after), self.last.get(lane))
        self.last[lane] = made
        if self.chance.random() < 0.2:
            made.make()
        return made

    def inward(self, out: Tensor, source: Tensor, after: Iterable[Any]) -> Any:
        after = list(after)
        clocks = [mark.clock for mark in after if isinstance(mark, Computed)]
        assert max(clocks) > self.used.get(out.data_ptr(), 0), "a buffer is written to while somebody computes with it"
        return self._copy("in", out, source, after)

    def outward(self, out: Tensor, source: Tensor, after: Iterable[Any]) -> Any:
        return self._copy("out", out, source, after)

    def hold(self, mark: Any) -> None:
        mark.make()
        self.clock += 1
        self.used[mark.out.data_ptr()] = self.clock

    def join(self, mark: Any) -> None:
        mark.make()


@pytest.fixture(params=["files", "memory", "memory, late", "staged", "staged, late"])
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Offload:
    """All ways between weights and a device; the staged one is that of files to a GPU."""
    if request.param == "files":
        return Offload()
    if "late" in request.param:
        monkeypatch.setattr(choose, "lanes_of", lambda device: Late())
    if "staged" in request.param:
        plain = Offload.place
        monkeypatch.setattr(
            Offload,
            "place",
            lambda self, parcels, device, anew=False: (
                choose.in_buffers(DiskTier(self.folder, parcels, anew), parcels, device)
                if self.tier == "memory"
                else plain(self, parcels, device, anew)
            ),
        )
    return MEMORY


def buffers(optimizer: ZOOptimizer) -> InBuffers:
    place = offloaded(optimizer)._place
    assert isinstance(place, InBuffers)
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model(kind: str, dtype: torch.dtype, weights: Offload) -> None:
    one, other = made(kind, dtype), made(kind, dtype)
    expected, _ = train(one, "exact")
    found, optimizer = train(other, weights)
    assert found == expected
    assert evaluated(other) == evaluated(one)
    assert same(snapshot(other), snapshot(one))
    assert buffers(optimizer).traffic.written > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, dtype: torch.dtype, weights: Offload) -> None:
    one, other = made("llama", dtype), made("llama", dtype)
    expected, _ = train(one, "exact", **OPTIONS[options])
    found, _ = train(other, weights, **OPTIONS[options])
    assert found == expected
    assert same(snapshot(other), snapshot(one))


@pytest.mark.parametrize("matrices", [False, True])
def test_little_is_trained_on_a_base_that_is_only_read(matrices: bool, weights: Offload) -> None:
    results = []
    for kept in ("exact", weights):
        model = made("opt")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in model.model.decoder.layers:
            layer.fc1.bias.requires_grad_(True)
            layer.fc2.weight.requires_grad_(matrices)
        results.append((train(model, kept), snapshot(model)))
    assert results[0][0][0] == results[1][0][0]
    assert same(results[0][1], results[1][1])
    traffic = buffers(results[1][0][1]).traffic
    assert (0 < traffic.written < traffic.read / 2) if matrices else traffic.written == 0


@pytest.mark.parametrize("mask", [None, Mask("small_weights", 0.01, refresh=2)], ids=["dense", "lists"])
def test_weights_that_the_loss_reads_beside_the_model(mask: Mask | None, weights: Offload) -> None:
    results = []
    for kept in ("exact", weights):
        model = made("llama")
        optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=kept, mask=mask)

        def penalized(model: Any = model) -> torch.Tensor:
            return loss_of(model)() + model.model.layers[1].mlp.up_proj.weight.square().sum()

        losses = [float(optimizer.step(penalized)) for _ in range(4)]  # type: ignore[arg-type]
        results.append((losses, snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, weights: Offload) -> None:
    results = []
    for kept in ("exact", weights):
        model = made("bert")
        optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=kept)

        def cast(model: Any = model) -> torch.Tensor:
            with torch.autocast("cpu", dtype):
                return loss_of(model)()

        results.append([float(optimizer.step(cast)) for _ in range(4)])  # type: ignore[arg-type]
    assert results[0] == results[1]


def test_weights_of_between_are_never_late(weights: Offload) -> None:
    """Evaluation, a state dict, a loaded one, a copy, reading and writing inside settled(), after every step."""
    one, other = made("llama"), made("llama")
    optimizers = [ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=kept) for model, kept in ((one, "exact"), (other, weights))]
    for turn in range(2):
        for look in (
            evaluated,
            lambda model: model.generate(torch.ones(2, 3, dtype=torch.int64), max_new_tokens=4, do_sample=False, pad_token_id=0).tolist(),
            snapshot,
            lambda model: snapshot(copy.deepcopy(model)),
        ):
            assert values(one, optimizers[0], 1) == values(other, optimizers[1], 1)
            with optimizers[1].settled():
                read = {name: weight.detach().clone() for name, weight in other.named_parameters()}
            assert all(torch.equal(read[name], weight) for name, weight in one.named_parameters())
            seen = [look(one), look(other)]
            assert same(*seen) if isinstance(seen[0], dict) else seen[0] == seen[1]
        start = snapshot(made("llama"))
        for model in (one, other):
            model.load_state_dict(start)
        for model, optimizer in zip((one, other), optimizers, strict=True):
            values(model, optimizer, 1)
            with optimizer.settled():
                model.model.embed_tokens.weight.data[3] = turn
    assert values(one, optimizers[0]) == values(other, optimizers[1])
    assert same(snapshot(one), snapshot(other))


def test_what_is_written_between_two_steps_without_a_word_is_seen(weights: Offload) -> None:
    """What was copied ahead of the next pass is copied again; the rest of what a step still has to change is written to on its way."""
    one, other = made("llama"), made("llama")
    optimizers = [ZOOptimizer(model, lr=0.0, eps=1e-2, weights=kept) for model, kept in ((one, "exact"), (other, weights))]
    embedding = [one for one in offloaded(optimizers[1])._parcels if one.tensors[0].tensor is other.model.embed_tokens.weight]
    for _ in range(3):
        assert values(one, optimizers[0], 1) == values(other, optimizers[1], 1)
        assert list(buffers(optimizers[1])._ahead) in ([], embedding)
        for model in (one, other):
            with torch.no_grad():
                model.model.embed_tokens.weight.mul_(1.5)
    assert embedding
    assert values(one, optimizers[0], 1) == values(other, optimizers[1], 1)
    for model, optimizer in zip((one, other), optimizers, strict=True):
        with optimizer.settled():  # here also what torch does not count as a write
            model.model.embed_tokens.weight.data.mul_(1.5)
    assert values(one, optimizers[0], 1) == values(other, optimizers[1], 1)
    assert list(buffers(optimizers[1])._ahead) == embedding
    assert same(snapshot(one), snapshot(other))


def test_what_is_on_its_way_home_is_read_when_it_has_come(weights: Offload) -> None:
    _, optimizer = train(made("llama"), weights, 2)
    place, residency = buffers(optimizer), offloaded(optimizer)
    for parcel in list(place.due):
        views = [view.clone() for view in place.begin(parcel, residency.noise, False)]
        assert parcel not in place.due
        place.end(parcel)
        again = place.begin(parcel, residency.noise, True)
        assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
        place.end(parcel)


def test_exceptions_leave_the_weights_of_the_last_step(weights: Offload) -> None:
    one, other = made("llama"), made("llama")
    train(one, "exact", 3)
    _, optimizer = train(other, weights, 3)

    def broken() -> torch.Tensor:
        hook = other.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        try:
            return loss_of(other)()
        finally:
            hook.remove()

    with pytest.raises(ZeroDivisionError):
        optimizer.estimate(broken)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not buffers(optimizer)._lent
    assert values(one, ZOOptimizer(one, lr=1e-3, eps=1e-2, weights="exact"), 2) == values(
        other, ZOOptimizer(other, lr=1e-3, eps=1e-2, weights=weights), 2
    )


@pytest.mark.parametrize("late", [False, True])
def test_a_write_that_fails_is_made_again(weights: Offload, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = made("llama"), made("llama")
    train(one, "exact", 5)
    _, optimizer = train(other, weights, 3)
    place = buffers(optimizer)
    plain, calls = place._route.save, iter(range(100))

    def failing(parcel: Any, memory: Tensor, after: Any, step: int) -> Any:
        if next(calls) != 1:
            return plain(parcel, memory, after, step)
        if not late:
            raise OSError(5, "Input/output error")
        failed: Future[Any] = Future()  # known when it has ended
        failed.set_exception(OSError(5, "Input/output error"))
        return failed

    monkeypatch.setattr(place._route, "save", failing)
    with pytest.raises(OSError, match="Input/output"):
        values(other, optimizer, 2)
    values(other, optimizer, 5 - optimizer.steps)
    assert same(snapshot(other), snapshot(one))


def test_few_buffers_and_what_follows_is_copied_ahead(weights: Offload) -> None:
    model = made("llama")
    _, optimizer = train(model, weights, 3)
    place, parcels = buffers(optimizer), offloaded(optimizer)._parcels
    assert set(place.made.values()) <= {1, 2}
    before, plain, ahead = place.traffic.read, place.begin, []

    def begun(parcel: Any, *given: Any) -> Any:
        ahead.append(parcel in place._ahead)
        return plain(parcel, *given)

    place.begin = begun  # type: ignore[method-assign]
    values(model, optimizer, 1)
    assert ahead == [True] * len(parcels)
    # nothing is copied twice, and what was copied ahead for the next pass is as much as for this one
    assert place.traffic.read - before == sum(parcel.nbytes for parcel in parcels)


def test_a_block_with_several_parcels_is_copied_ahead_as_a_whole(weights: Offload) -> None:
    """Trained and frozen matrices of a block lie apart."""
    model = made("opt")
    for layer in model.model.decoder.layers:
        layer.fc2.weight.requires_grad_(False)
    _, optimizer = train(model, weights, 3)
    place, plain, ahead = buffers(optimizer), buffers(optimizer).begin, []

    def begun(parcel: Any, *given: Any) -> Any:
        ahead.append(len(place._ahead))
        return plain(parcel, *given)

    place.begin = begun  # type: ignore[method-assign]
    values(model, optimizer, 1)
    assert min(ahead) >= 1
    assert max(ahead) >= 2
    assert max(place.made.values()) <= 2


def test_what_is_in_memory_is_aligned_pages() -> None:
    optimizer = ZOOptimizer(made("llama"), lr=1e-3, weights=MEMORY)
    tier: Any = buffers(optimizer).tier
    for parcel in offloaded(optimizer)._parcels:
        assert tier.flat(parcel).data_ptr() % 4096 == 0
        for p, home in zip(parcel.tensors, tier.home(parcel), strict=True):
            assert p.tensor.data_ptr() == home.data_ptr()
            assert home.data_ptr() % 64 == 0
            assert home.untyped_storage().nbytes() == home.nbytes


def test_memory_for_a_second_model_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block is taken in, those before are at home, and nobody holds what they were in."""
    from zo_lightning.engine.offload import tiers

    model = made("llama")
    before = [StorageWeakRef(p.untyped_storage()) for p in model.parameters() if p.dim() > 1]
    plain, alive = tiers.Pinned.allocate, []

    def allocated(self: tiers.Pinned, nbytes: int, total: int) -> Tensor:
        alive.append(sum(not storage.expired() for storage in before))
        return plain(self, nbytes, total)

    monkeypatch.setattr(tiers.Pinned, "allocate", allocated)
    ZOOptimizer(model, weights=MEMORY)
    assert alive == sorted(alive, reverse=True)
    assert alive[0] == len(before)
    assert alive[-1] < len(before) / 2


def test_opened_weights_come_into_memory(tmp_path: Path, weights: Offload) -> None:
    one, other = made("llama"), opened(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert train(one, "exact")[0] == train(other, weights)[0]
    assert same(snapshot(one), snapshot(other))
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}


def test_tensors_that_are_frozen_in_between(weights: Offload) -> None:
    results = []
    for kept in ("exact", weights):
        model = made("llama")
        _, optimizer = train(model, kept, 2, estimator=SPSA(2))
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        found = values(model, optimizer, 2)
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
        with optimizer.settled():
            model.model.layers[2].mlp.up_proj.weight.data = model.model.layers[2].mlp.up_proj.weight.data.clone()
        results.append((found + values(model, optimizer, 2), snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def test_a_second_optimizer_takes_over(weights: Offload) -> None:
    """The hooks of the first one leave alone what is not theirs any more."""
    one, other = made("llama"), made("llama")
    for model, kept in ((one, "exact"), (other, weights)):
        train(model, kept, 2)
        train(model, kept, 2)
    assert evaluated(one) == evaluated(other)
    assert same(snapshot(one), snapshot(other))


def test_what_somebody_put_elsewhere_is_left_there(weights: Offload) -> None:
    """Between two steps, until the optimizer has looked."""
    model = made("llama")
    _, optimizer = train(model, weights, 2)
    with optimizer.settled():
        other = torch.zeros_like(model.model.layers[1].mlp.up_proj.weight)
        model.model.layers[1].mlp.up_proj.weight.data = other
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    evaluated(model)
    hook.remove()
    assert not seen[0].any()
    assert model.model.layers[1].mlp.up_proj.weight.data_ptr() == other.data_ptr()


# ---- weights that others read


class Handing(nn.Module):
    """The embedding hands out a view of its weight, which the head reads when others have run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Views(40, 32)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3)])
        self.other = nn.Linear(32, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, view = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return (self.other(hidden) + hidden @ view).logsumexp(-1).mean()


class Views(nn.Embedding):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(ids), self.weight.t()


@pytest.mark.parametrize("frozen", [False, True])
def test_views_that_outlive_their_module(frozen: bool, weights: Offload) -> None:
    """The buffer that they are in would have other weights by then: those of `other` have its size."""
    results = []
    ids = torch.arange(40).view(4, 10)
    for kept in ("exact", weights):
        torch.manual_seed(0)
        model = Handing()
        model.embedding.weight.requires_grad_(not frozen)
        optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=kept)
        with torch.no_grad():
            seen = [float(model(ids)) for _ in range(3)]
        seen += [float(optimizer.step(lambda model=model: model(ids))) for _ in range(4)]  # type: ignore[misc]
        with torch.no_grad():
            seen += [float(model(ids)) for _ in range(3)]
        results.append(seen)
    assert results[0] == results[1]
    owner = offloaded(optimizer)._holders[model]  # around all who read it
    assert [parcel.tensors[0].tensor is model.embedding.weight for parcel in owner] == [True]


def test_what_lies_elsewhere_is_read_on_the_device() -> None:
    """A watched pass: a weight whose module does not run is on the CPU, and what it is combined with is not."""
    weight = nn.Parameter(torch.ones(4, 3))
    p = Trained("weight", 1, weight, 0, (weight,))
    with torch.no_grad(), ReadWatch([], [p], lambda _: False, torch.device("meta")) as watch:
        view = weight.t()
    assert view.is_meta
    assert watch.missed == {p: None}


# ---- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tier": "ram"}, r"tier='ram' is not known. Use one of 'auto', 'disk', 'memory'"),
        ({"tier": "memory", "folder": "x"}, r"folder='x', tier='memory'\): weights in memory have no files. Leave one of the two out"),
        ({"device": "gpu"}, r"device='gpu'\) is no device"),
        ({"device": "mps"}, r"device='mps'\): blocks are streamed to 'cpu' and to 'cuda' devices so far"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Offload(**given)


def test_auto_is_files_on_the_cpu() -> None:
    for weights in (Offload(), Offload(device="cpu")):
        assert isinstance(offloaded(ZOOptimizer(made("opt"), weights=weights)).tier, DiskTier)


def test_no_room_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from zo_lightning.engine.offload import tiers

    def full(*given: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(tiers.mmap, "mmap", full)
    model = made("llama")
    before = snapshot(model)
    with pytest.raises(MemoryError, match=r"no room for 0.0 GB of weights in the CPU's memory .*Use tier='disk' with a folder"):
        ZOOptimizer(model, weights=MEMORY)
    assert same(snapshot(model), before)


def test_memory_that_can_not_be_pinned_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Lanes):
        asked = 0

        def pin(self, memory: Tensor) -> Any:
            self.asked += 1
            raise RuntimeError("cudaHostRegister returned error 2")

    lanes = Refusing(torch.device("cpu"))
    monkeypatch.setattr(choose, "lanes_of", lambda device: lanes)
    one, other = made("llama"), made("llama")
    with pytest.warns(ZOWarning, match=r"can't be pinned here \(cudaHostRegister returned error 2\).*ulimit -l"):
        found, _ = train(other, MEMORY)
    assert lanes.asked == 1
    assert found == train(one, "exact")[0]


def test_pinned_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: set[int] = set()

    class Pinning(Lanes):
        def pin(self, memory: Tensor) -> Any:
            pinned.add(memory.data_ptr())
            return lambda: pinned.remove(memory.data_ptr())

    monkeypatch.setattr(choose, "lanes_of", lambda device: Pinning(device))
    model = made("llama")
    optimizer = ZOOptimizer(model, weights=MEMORY)
    parcels = len(offloaded(optimizer)._parcels)
    assert len(pinned) == parcels
    offloaded(optimizer)._place.tier.close()
    assert not pinned
    assert same(snapshot(model), snapshot(made("llama")))  # what the model has stays


def test_a_model_on_two_devices() -> None:
    """A stand-in for a GPU, which lies on the CPU as well."""

    class Elsewhere(torch.nn.Linear):
        def parameters(self, recurse: bool = True) -> Any:
            other: Any = type("Weight", (), {"device": torch.device("cuda", 1), "is_meta": False})()
            return iter([other])

    with pytest.raises(ValueError, match=r"forward passes run on cpu, and a part of the model is on cuda:1. Keep the model on the CPU"):
        Offload(device="cpu").device_of(Elsewhere(2, 2))


# ---- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_on_a_gpu(tier: str, dtype: torch.dtype, kind: str) -> None:
    import test_offload

    one, other = made(kind, dtype).cuda(), made(kind, dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IDS", "LABELS", "TOKENS"):
            patch.setattr(test_offload, name, getattr(test_offload, name).cuda())
        expected, _ = train(one, "exact", 6)
        found, optimizer = train(other, Offload(tier=tier, device="cuda"), 6)
        assert found == expected
        assert evaluated(other) == evaluated(one)
    for name, weight in snapshot(one).items():
        assert torch.equal(weight.cpu(), snapshot(other)[name].cpu()), name
    assert all(p.tensor.device.type == "cpu" for p in optimizer.residency.trained if p.tensor.dim() > 1)
    tier_memory: Any = buffers(optimizer).tier
    assert tier == "disk" or all(tier_memory.flat(parcel).is_pinned() for parcel in offloaded(optimizer)._parcels)
