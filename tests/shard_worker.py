"""Run by test_sharded: trains each case sharded on two gloo processes, and saves what it ends with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from zo_lightning.engine import SPSA, DataParallel, Momentum, Processes, ZOOptimizer
from zo_lightning.engine.masks import Mask, Sensitive
from zo_lightning.engine.parallel import broadcast_parameters
from zo_lightning.engine.residency import Offload
from zo_lightning.engine.shards import fsdp_modules, is_sharded
from zo_lightning.engine.trajectory.comparing import describe
from zo_lightning.engine.trajectory.targets import match

WORLD = 2
STEPS = 6
WIDTH = 33
WORDS = 1001
Wrap = Callable[[nn.Module], None]


class Block(nn.Module):
    """Matrices of odd shapes, one of them large enough for a pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 70)
        self.down = nn.Linear(70, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """An embedding of more than 2**15 elements, which is tied or not, two blocks, and a head of which rank 1 has nothing."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.head = nn.Linear(WORDS, 1)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.out(x).relu()).squeeze(-1)


class Mlp(nn.Module):
    """Two layers for tensor parallel: the first by columns, the second by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 2000)
        self.down = nn.Linear(2000, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Two(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.sum(-1)


def by_fsdp(**options: Any) -> Wrap:
    """fully_shard for each block, then for the rest."""

    def wrap(model: Any) -> None:
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)

    return wrap


def by_columns(model: Any) -> None:
    """FSDP2 that shards matrices along their second dimension where that is even, as it must be."""
    placement = lambda p: Shard(1) if p.dim() > 1 and p.shape[1] % WORLD == 0 else Shard(0)  # noqa: E731
    for block in model.blocks:
        fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def by_tensor(model: Any) -> None:
    """Tensor parallel."""
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tensor",))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def by_both(shape: tuple[int, int]) -> Wrap:
    """FSDP2 around tensor parallel, on a mesh of this shape."""

    def wrap(model: Any) -> None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])

    return wrap


def prefetching(model: Any) -> None:
    """Blocks are gathered ahead of their forward."""
    by_fsdp()(model)
    model.set_modules_to_forward_prefetch([model.blocks[0]])
    model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1]])


def partly(model: Any) -> None:
    """Only one block is sharded."""
    fully_shard(model.blocks[1])


@dataclass(frozen=True)
class Case:
    """A model, how it is sharded, options of the optimizer."""

    wrap: Wrap = field(default_factory=by_fsdp)
    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = Model
    dtype: torch.dtype = torch.float32
    steps: int = STEPS
    micro_batches: int = 1
    given: bool = False
    """The loss values are given, not those of the model."""
    masked: tuple[Any, ...] | None = None
    own_data: bool = False


CASES: dict[str, Case] = {
    "exact": Case(options={"weights": "exact"}, steps=100),
    "inplace": Case(options={"weights": "inplace"}, steps=100),
    "auto": Case(),
    "gaussian": Case(options={"noise": "gaussian", "estimator": SPSA(2), "weight_decay": 0.1}),
    "gaussian inplace": Case(options={"noise": "gaussian", "weights": "inplace"}),
    "bfloat16": Case(dtype=torch.bfloat16, steps=20),
    "bfloat16 inplace": Case(dtype=torch.bfloat16, options={"weights": "inplace"}),
    "accumulated": Case(micro_batches=3),
    "tied": Case(model=lambda: Model(tied=True), options={"lr": 1e-5}),
    "small weights": Case(masked=("small_weights", 0.3)),
    "small weights, inplace": Case(masked=("small_weights", 0.3), options={"weights": "inplace"}),
    "random, columns": Case(by_columns, {"weights": "inplace"}, masked=("random", 0.2)),
    "a list": Case(masked=("random", 0.01), options={"weights": "exact"}),
    "a list, tensor": Case(by_tensor, {"weights": "exact"}, Two, masked=("random", 0.01), given=True),
    "measured": Case(masked=(Sensitive(steps=2), 0.2)),
    "momentum": Case(options={"update": Momentum(0.8, window=3)}),
    "sign, bfloat16": Case(options={"update": "sign"}, dtype=torch.bfloat16),
    "sign, columns, small weights": Case(by_columns, {"update": "sign", "weights": "inplace"}, masked=("small_weights", 0.3)),
    "gathered until the end": Case(by_fsdp(reshard_after_forward=False)),
    "gathered until the end, inplace": Case(by_fsdp(reshard_after_forward=False), {"weights": "inplace"}),
    "resharded at once": Case(by_fsdp(reshard_after_forward=True)),
    "prefetching": Case(prefetching),
    "offloaded": Case(by_fsdp(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "columns": Case(by_columns),
    "columns inplace": Case(by_columns, {"weights": "inplace"}),
    "partly": Case(partly),
    "data of its own": Case(own_data=True),
    "tensor, given": Case(by_tensor, {"weights": "exact"}, Two, given=True),
    "tensor, given, copy": Case(by_tensor, {"weights": "copy"}, Two, given=True),
    "tensor, given, inplace": Case(by_tensor, {"weights": "inplace"}, Two, given=True),
    "tensor, given, bfloat16": Case(by_tensor, {}, Two, torch.bfloat16, given=True),
    "tensor, given, gaussian": Case(by_tensor, {"noise": "gaussian"}, Two, given=True),
    "tensor": Case(by_tensor, {"lr": 1e-7}, Two, steps=100),
    "1 x 2, given": Case(by_both((1, 2)), {}, Two, given=True),
    "2 x 1, given": Case(by_both((2, 1)), {}, Two, given=True),
    "2 x 1, given, inplace": Case(by_both((2, 1)), {"weights": "inplace"}, Two, given=True),
}


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.model().to(case.dtype)
    for p in model.parameters():
        p.data += 0.01 * torch.randn(p.shape).to(p.dtype)  # no gain is exactly 1, no bias 0
    return model


def batch(case: Case, step: int, micro_batch: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank * case.own_data)
    x = torch.randn(8, 24, generator=draw).to(case.dtype) if case.model is Two else torch.randint(WORDS, (8, 5), generator=draw)
    return x, torch.randn(x.shape[:-1] if case.model is Two else x.shape, generator=draw).to(case.dtype)


def full(tensor: Tensor) -> Tensor:
    """The whole of a parameter; on all ranks."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    for module in fsdp_modules(model):
        module.reshard()
    return {name: full(p) for name, p in model.named_parameters()}


def run(case: Case, rank: int, sharded: bool, exchange: bool = False) -> dict[str, Any]:
    """Train, and return the values of each step and the whole weights."""
    model: Any = build(case)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if sharded:
        case.wrap(model)
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-2, "safeguard": None, **case.options}
    if case.masked is not None:
        options["mask"] = Mask(*case.masked)
    optimizer = ZOOptimizer(model, **options)
    if exchange:
        optimizer.exchange = DataParallel()
    values, measured = [], []
    for step in range(case.steps):
        for micro_batch in range(case.micro_batches):
            x, y = batch(case, step, micro_batch, rank)
            told = iter([0.3 + 0.01 * step, 0.2 - 0.02 * step] * 4)

            def closure(x: Tensor = x, y: Tensor = y, told: Any = told) -> Any:
                loss = (model(x) - y).float().square().mean()
                measured.append(float(loss))
                return next(told) if case.given else loss

            optimizer.estimate(closure, weight=1 / case.micro_batches)
        report = optimizer.apply()
        values.append(list(report.values))  # type: ignore[union-attr]
    shards = sum(is_sharded(p) for p in model.parameters())
    return {
        "start": start,
        "weights": weights_of(model),
        "values": values,
        "measured": measured,
        "residency": optimizer.residency.name,
        "sharded": shards,
        "kind": type(optimizer.residency).__name__,
    }


def interrupted(rank: int) -> dict[str, Any]:
    """Both ranks stop in the second evaluation, inside a block; then the step is made again."""
    case = Case()
    model: Any = build(case)
    case.wrap(model)
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights="exact")
    optimizer.exchange = DataParallel()
    before = weights_of(model)
    calls = iter(range(100))

    def stop(module: nn.Module, args: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    hook = model.blocks[1].up.register_forward_pre_hook(stop)
    x, y = batch(case, 0, 0, rank)
    raised = False
    try:
        optimizer.estimate(lambda: (model(x) - y).square().mean())
    except KeyboardInterrupt:
        raised = True
    hook.remove()
    optimizer.discard()
    plain = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    after = weights_of(model)
    optimizer.step(lambda: (model(x) - y).square().mean())
    return {"raised": raised, "plain": plain, "before": before, "after": after, "values": list(optimizer.report.values)}  # type: ignore[union-attr]


def stale(rank: int) -> dict[str, Any]:
    """A forward of somebody else leaves the root gathered just before an update; what the next one computes."""
    case = Case()
    model: Any = build(case)
    case.wrap(model)
    optimizer = ZOOptimizer(model, lr=1e-1, eps=1e-2, weights="exact")
    optimizer.exchange = DataParallel()
    x, y = batch(case, 0, 0, rank)
    optimizer.estimate(lambda: (model(x) - y).square().mean())
    with torch.no_grad():
        before = model(x)
        gathered = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        optimizer.apply()
        after = model(x)
    plain = build(case)
    plain.load_state_dict(weights_of(model))
    with torch.no_grad():
        expected = plain(x)
    return {"before": before, "after": after, "expected": expected, "gathered": gathered}


def resumed(rank: int) -> dict[str, Any]:
    """bfloat16, whose vectors have masters: a state in the middle, in another model."""
    case = CASES["bfloat16"]
    model: Any = build(case)
    case.wrap(model)
    options: dict[str, Any] = {"lr": 1e-3, "eps": 1e-2, "safeguard": None}
    first = ZOOptimizer(model, **options)
    first.exchange = DataParallel()

    def train(model: nn.Module, optimizer: ZOOptimizer, steps: range) -> None:
        for step in steps:
            x, y = batch(case, step, 0, rank)
            optimizer.step(lambda x=x, y=y: (model(x) - y).float().square().mean())  # type: ignore[misc]

    train(model, first, range(3))
    weights, state = weights_of(model), first.state_dict()
    train(model, first, range(3, 6))
    again = build(case)
    again.load_state_dict(weights)
    case.wrap(again)
    second = ZOOptimizer(again, **options)
    second.exchange = DataParallel()
    second.load_state_dict(state)
    train(again, second, range(3, 6))
    alone = build(case)
    third = ZOOptimizer(alone, **options)
    train(alone, third, range(3))
    return {
        "weights": weights_of(model),
        "again": weights_of(again),
        "masters": state["zo"]["masters"],
        "alone": third.state_dict()["zo"]["masters"],
    }


def refused(rank: int) -> dict[str, str]:
    """What can't be done, and what is said."""

    def message(make: Callable[[], Any]) -> str:
        try:
            make()
        except ValueError as error:
            return str(error)
        return ""

    case = Case()

    def sharded() -> Any:
        model = build(case)
        case.wrap(model)
        return model

    def gathered() -> Any:
        model = sharded()
        with torch.no_grad():
            model(batch(case, 0, 0, rank)[0])
        return ZOOptimizer(list(model.named_parameters()), module=model).residency

    def compiled() -> Any:
        model = sharded()
        model.blocks[0].compile()
        return ZOOptimizer(model, weights="exact").residency

    def partial() -> Any:
        mesh = init_device_mesh("cpu", (WORLD,))
        return ZOOptimizer([nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))]).residency

    def shared_out(parallel: str, **options: Any) -> Any:
        model = sharded()
        optimizer = ZOOptimizer(model, estimator=SPSA(2), **options)
        optimizer.exchange = Processes(parallel)
        return optimizer.step(lambda: model(ids).mean())

    def copies_that_differ() -> Any:
        torch.manual_seed(rank)
        model: Any = Two()
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("copies", "shards")))
        optimizer = ZOOptimizer(model)
        optimizer.exchange = DataParallel()
        return optimizer.step(lambda: model(batch(CASES["tensor"], 0, 0, 0)[0]).mean())

    plain = sharded()
    segment: Any = SimpleNamespace(parameters=describe(ZOOptimizer(plain), "", "", None).parameters)
    masked: Any = build(case)
    by_fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))(masked)
    with_mask = ZOOptimizer(masked, weights="exact", mask=Mask("small_weights", 0.3))
    ids, _ = batch(case, 0, 0, rank)
    return {
        "perturbation": message(lambda: shared_out("perturbation=2")),
        "seeds": message(lambda: shared_out("seeds=2", weights="inplace")),
        "copies": message(copies_that_differ),
        "copy": message(lambda: ZOOptimizer(sharded(), weights="copy").residency),
        "adam": message(lambda: ZOOptimizer(sharded(), lr=1e-3, update="adam").residency),
        "no module": message(lambda: ZOOptimizer(list(sharded().parameters())).residency),
        "offload": message(lambda: ZOOptimizer(sharded(), weights=Offload()).residency),
        "gathered": message(gathered),
        "compiled": message(compiled),
        "partial": message(partial),
        "replayed": message(lambda: match(plain, segment)),
        "cast": message(lambda: with_mask.step(lambda: masked(ids).float().mean())),
        "differentiated": message(
            lambda: ZOOptimizer(plain, mask=Mask(Sensitive(lambda: [plain(ids).mean()]), 0.2)).step(lambda: plain(ids).mean())
        ),
    }


def cast(rank: int) -> dict[str, Any]:
    """float32 shards that are gathered as bfloat16, beside a plain model of bfloat16 weights that is displaced at the same points."""
    case = Case()
    model: Any = build(case)
    by_fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))(model)
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights="exact")
    optimizer.exchange = DataParallel()
    x, y = batch(case, 0, 0, rank)
    optimizer.estimate(lambda: (model(x) - y).float().square().mean())
    plain = build(case).to(torch.bfloat16)
    beside = ZOOptimizer(plain, lr=1e-3, eps=1e-2, weights="exact")
    beside.estimate(lambda: (plain(x) - y).float().square().mean())
    values = [list(one.apply().values) for one in (optimizer, beside)]  # type: ignore[union-attr]
    whole = weights_of(model)
    alone = build(case)
    given = ZOOptimizer(alone, lr=1e-3, eps=1e-2)
    told = iter(values[0])
    given.step(lambda: next(told))
    return {"values": values, "dtype": [str(w.dtype) for w in whole.values()], "weights": whole, "alone": weights_of(alone)}


def one_row(rank: int) -> dict[str, Any]:
    """Rank 0 has all of a model, and rank 1 nothing; what is broadcast to others leaves parts alone."""

    def train(model: Any) -> dict[str, Tensor]:
        optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2)
        optimizer.exchange = DataParallel()
        optimizer.step(lambda: model(torch.ones(2, 5)).square().mean())
        return weights_of(model)

    torch.manual_seed(0)
    models = [nn.Linear(5, 1), nn.Linear(5, 1), nn.Linear(5, 4)]
    models[1].load_state_dict(models[0].state_dict())
    start = {name: p.detach().clone() for name, p in models[2].named_parameters()}
    for model in models[1:]:
        fully_shard(model)
    broadcast_parameters(list(models[2].parameters()))
    return {"alone": train(models[0]), "sharded": train(models[1]), "start": start, "broadcast": weights_of(models[2])}


def main(folder: Path, rank: int, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if names and name not in names:
            continue
        results[name] = run(case, rank, sharded=True, exchange=True)
        if case.own_data:
            results[f"{name}, whole"] = run(case, rank, sharded=False, exchange=True)
    for function in (interrupted, stale, resumed, refused, cast, one_row):
        if not names or function.__name__ in names:
            results[function.__name__] = function(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
