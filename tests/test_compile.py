"""Compiled kernels and the eager way out: the same values, with a C++ compiler, without one, and when it is switched off."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import FLOATS, bits, eagerly
from reference import noise as reference
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from zo_lightning.engine import SPSA, Gaussian, Noise, Rademacher, ZOOptimizer, ZOWarning, masks
from zo_lightning.engine.masks import Masks
from zo_lightning.engine.noise import Item, compiling, gaussian, joins, sweep, sweep_both
from zo_lightning.engine.noise.compiling import available

NOISES: dict[str, Noise] = {"rademacher": Rademacher(), "gaussian": Gaussian()}
SWEEP = sys.modules["zo_lightning.engine.noise.sweep"]
BIG = (1 << 19) + 3 * 64 + 5
"""More than one block of Box-Muller and one row of 64 signs, and not a multiple of either."""


@pytest.fixture
def compiler() -> None:
    if not available("cpu"):
        pytest.skip("there is no C++ compiler here: the eager path is the only one")


def added(start: Tensor, noise: str, coefficients: Sequence[float], decay: float, in_place: bool = False) -> Tensor:
    weights = start.clone()
    out = weights if in_place else torch.empty_like(weights)
    sweep([Item(out, weights, 5, decay, tuple(coefficients))], [9 + j for j in range(len(coefficients))], NOISES[noise])
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "coefficients", [(0.3,), (0.3, -0.7, 0.01), (0.3, -0.7, 0.01, 0.4, -0.2, 0.11)], ids=["one term", "three terms", "six terms"]
)
def test_compiled_rademacher_is_eager_bit_for_bit(
    coefficients: tuple[float, ...], dtype: torch.dtype, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = [torch.randn(count).to(dtype) for count in (BIG, 1 << 19, 40_001)]
    cases = [(start, decay, in_place) for start in starts for decay in (1.0, 0.97) for in_place in (False, True)]
    compiled = [added(start, "rademacher", coefficients, decay, in_place) for start, decay, in_place in cases]
    eagerly(monkeypatch)
    for got, (start, decay, _) in zip(compiled, cases, strict=True):
        assert torch.equal(bits(got), bits(added(start, "rademacher", coefficients, decay)))


def test_compiled_gaussian_is_eager_to_a_millionth(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sines, cosines and logarithms of vector libraries differ in their last bits."""
    start = torch.randn(BIG)
    compiled = added(start, "gaussian", (0.3,), 0.97)
    eagerly(monkeypatch)
    assert float((compiled - added(start, "gaussian", (0.3,), 0.97)).abs().max()) <= 1e-6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("odd", [False, True], ids=["whole blocks of signs", "odd lengths"])
def test_many_small_tensors_are_compiled_together_to_the_same_bits(
    odd: bool, noise: str, dtype: torch.dtype, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter's factors: none of them large, each with scalars of its own, in every layout; more than one pack of them."""
    starts = [torch.randn(8, 768 + 8 * (i % 3)).to(dtype) for i in range(100)]
    starts = [start.T if i % 2 else start for i, start in enumerate(starts)] + ([torch.randn(77).to(dtype)] if odd else [])
    asked: list[torch.dtype] = []
    together = Rademacher.together

    def counted(self: Rademacher, base: Tensor, *how: Any) -> Tensor:
        asked.append(base.dtype)
        return together(self, base, *how)

    monkeypatch.setattr(Rademacher, "together", counted)

    def moved() -> list[Tensor]:
        outs = [torch.empty_like(start) for start in starts]
        scalars = [(1.0, (0.3,)) if i % 5 else (0.97, (-0.01 * i,)) for i in range(len(starts))]
        sweep([Item(out, start, 5 + i, *scalars[i]) for i, (out, start) in enumerate(zip(outs, starts, strict=True))], [9], NOISES[noise])
        return outs

    compiled = moved()
    assert len(asked) == (noise == "rademacher") * (1 if odd else 2)  # the last pack has the odd one
    eagerly(monkeypatch)
    assert all(torch.equal(bits(got), bits(expected)) for got, expected in zip(compiled, moved(), strict=True))


def small_ones(dtype: torch.dtype) -> list[Tensor]:
    """As an adapter's factors: none of them large, half of them transposed."""
    starts = [torch.randn(8, 768).to(dtype) for _ in range(40)]
    return [start.T if i % 2 else start for i, start in enumerate(starts)]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_point_and_its_opposite_are_two_sweeps_to_the_same_bits(
    dtype: torch.dtype, noise: str, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = small_ones(dtype)

    def items(sign: float) -> list[Item]:
        return [Item(torch.zeros_like(start), start, 5 + i, 1.0, (sign * (0.3 + i % 3),)) for i, start in enumerate(starts)]

    one, other = items(1.0), [item.out for item in items(1.0)]
    fits = noise == "rademacher" and dtype.itemsize > 2  # 16-bit weights are rounded with a dither of each sweep
    assert joins(starts, NOISES[noise]) == fits
    assert not joins([*starts, torch.zeros(77, dtype=dtype)], NOISES[noise])
    assert not joins([*starts, *small_ones(dtype), *small_ones(dtype)], NOISES[noise])
    if not fits:
        return
    sweep_both(one, other, 9, NOISES[noise])
    eagerly(monkeypatch)
    for sign, got in ((1.0, [item.out for item in one]), (-1.0, other)):
        expected = items(sign)
        sweep(expected, [9], NOISES[noise])
        assert all(torch.equal(bits(a), bits(b.out)) for a, b in zip(got, expected, strict=True))


def factors(dtype: torch.dtype = torch.float32) -> ZOOptimizer:
    return ZOOptimizer([(str(i), start.requires_grad_()) for i, start in enumerate(small_ones(dtype))], 1e-3, eps=0.1, weights="copy")


def squares(optimizer: ZOOptimizer) -> Callable[[], Tensor]:
    tensors = optimizer.param_groups[0]["params"]
    return lambda: torch.stack([(tensor * (i + 1)).square().sum() for i, tensor in enumerate(tensors)]).sum() / 1e4


@pytest.mark.parametrize("change", ["one query", "two queries", "a mask", "accumulation"])
def test_steps_of_small_tensors_are_the_eager_ones_bit_for_bit(change: str, compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    both: list[int] = []

    def spy(items: Sequence[Item], *how: Any) -> None:
        both.append(len(items))
        sweep_both(items, *how)

    scratch = sys.modules["zo_lightning.engine.residency.scratch"]
    monkeypatch.setattr(scratch, "sweep_both", spy)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        optimizer = factors()
        optimizer.estimator = SPSA(2 if change == "two queries" else 1)
        optimizer.masks = Masks(masks.Mask(masks.Random(), 0.5) if change == "a mask" else None)
        loss = squares(optimizer)
        for _ in range(3):
            for _ in range(1 + (change == "accumulation")):
                optimizer.estimate(loss)
            optimizer.apply()
        return [tensor.detach() for tensor in optimizer.param_groups[0]["params"]]

    compiled = run()
    assert both == [40] * {"one query": 3, "a mask": 0}.get(change, 6)
    eagerly(monkeypatch)
    monkeypatch.setattr(scratch, "available", lambda device: False)
    assert all(torch.equal(bits(got), bits(expected)) for got, expected in zip(compiled, run(), strict=True))


def test_what_was_written_for_the_next_point_is_dropped_with_an_exception(compiler: None) -> None:
    torch.manual_seed(0)
    optimizer, undisturbed = factors(), factors()
    with torch.no_grad():
        for mine, other in zip(optimizer.param_groups[0]["params"], undisturbed.param_groups[0]["params"], strict=True):
            other.copy_(mine)

    def fails() -> Tensor:
        raise ArithmeticError

    optimizer.step(squares(optimizer))
    undisturbed.step(squares(undisturbed))
    kept = optimizer.residency.scratch_bytes()  # type: ignore[attr-defined]
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            optimizer.estimate(fails)
        with torch.no_grad():  # what is ahead would be theirs of before
            for optimized in (optimizer, undisturbed):
                for tensor in optimized.param_groups[0]["params"]:
                    tensor.mul_(1.01)
        optimizer.step(squares(optimizer))
        undisturbed.step(squares(undisturbed))
    assert optimizer.report is not None
    assert undisturbed.report is not None
    assert optimizer.report.values == undisturbed.report.values
    assert optimizer.residency.scratch_bytes() == kept  # type: ignore[attr-defined]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, CompileCounter]]:
    """Gaussian kernels that are traced as always and then run as they were traced; how often is counted."""
    counters = {}
    for name in ("_add_pair", "_add_pair_", "_add_first", "_add_first_"):
        plain, counters[name] = getattr(gaussian, name)._torchdynamo_orig_callable, CompileCounter()
        monkeypatch.setattr(gaussian, name, torch.compile(plain, dynamic=True, fullgraph=True, backend=counters[name]))
    monkeypatch.setattr(SWEEP, "available", lambda device: True)
    torch._dynamo.reset()
    yield counters
    torch._dynamo.reset()


def test_kernels_are_compiled_a_few_times_whatever_the_lengths_and_dtypes(counted: dict[str, CompileCounter]) -> None:
    """torch.compile gives up after 8 graphs of one function, and each costs seconds."""
    lengths = [40_001, 50_000, 1 << 18, (1 << 18) + 1, (1 << 18) + 2, 300_000, 1 << 19, (1 << 19) + 1, BIG, (1 << 20) + 77, 3 << 19]
    for dtype in (torch.float32, torch.bfloat16):
        for length in lengths:
            start = torch.ones(length, dtype=dtype)
            for in_place in (False, True):
                got = added(start, "gaussian", (0.5,), 1.0, in_place).double()
                z = torch.from_numpy(reference.gaussian(9, 5, np.arange(length)))
                assert bool(((got - 1 - 0.5 * z).abs() <= 2e-6 + got.abs() * torch.finfo(dtype).eps).all())
    counts = {name: counter.frame_count for name, counter in counted.items()}
    assert max(counts.values()) <= 5, counts


def test_one_kernel_serves_every_dtype_without_reaching_the_limit_of_graphs(counted: dict[str, CompileCounter]) -> None:
    for dtype in FLOATS:
        for length in (40_001, (1 << 18) + 1, (1 << 18) + 300, BIG):
            for coefficients in ((0.5,), (0.5, 0.25)):
                for in_place in (False, True):
                    assert bool(added(torch.ones(length, dtype=dtype), "gaussian", coefficients, 1.0, in_place).isfinite().all())
    assert max(counter.frame_count for counter in counted.values()) <= 8


# ---- without a compiler

SCRIPT = """
import hashlib, warnings
import torch
from torch import nn
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from zo_lightning.engine import ZOOptimizer
    from zo_lightning.engine.noise.compiling import available
    torch.manual_seed(0)
    model = nn.Linear(300, 200)
    x = torch.randn(4, 300)
    optimizer = ZOOptimizer(model, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(lambda: torch.ones(()) * model.weight[:2, :2].double().round(decimals=3).sum().float() + x[0, 0])
    ours = [str(w.message) for w in said if type(w.message).__name__ == "ZOWarning"]
print(available("cpu"), hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest(), len(ours), " ".join(ours))
"""


def fresh(tmp_path: Path, **variables: str) -> tuple[bool, str, str]:
    """(whether kernels are compiled, digest of the weights after three steps, what was said) in a new process."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2", **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    flag, digest, count, *said = done.stdout.split()
    assert int(count) <= 1
    return flag == "True", digest, " ".join(said)


@pytest.mark.slow
def test_without_a_compiler_steps_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    nothing = {"CXX": "/nonexistent/c++", "PATH": str(tmp_path / "empty"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ordinary = fresh(tmp_path)
    switched_off = fresh(tmp_path, ZO_LIGHTNING_COMPILE="0")
    without = fresh(tmp_path, **nothing)
    assert switched_off == (False, ordinary[1], "")
    assert without[:2] == (False, ordinary[1])
    assert "torch.compile does not work here on cpu" in without[2]
    assert "ZO_LIGHTNING_COMPILE=0" in without[2]


def test_a_warning_of_torch_while_it_compiles_does_not_switch_compilation_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(function: object, **options: object) -> object:
        def probe(x: Tensor) -> Tensor:
            warnings.warn("an import inside torch is deprecated", DeprecationWarning, stacklevel=1)
            return x

        return probe

    monkeypatch.setattr(torch, "compile", noisy)
    assert compiling.available.__wrapped__("cpu")


def test_a_compiler_that_fails_is_reported_once_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **options: object) -> object:
        raise RuntimeError("no such linker\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not compiling.available.__wrapped__("cpu")
        assert not compiling.available.__wrapped__("cpu")
    assert [warning.category for warning in said] == [ZOWarning]
    assert "RuntimeError: no such linker), so the noise kernels run eagerly" in str(said[0].message)
    assert "ZO_LIGHTNING_COMPILE=0" in str(said[0].message)


@pytest.mark.parametrize("weights", ["inplace", "exact", "copy"])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "sphere"])
def test_no_tensor_of_a_step_outlives_the_next_steps(noise: str, weights: str, compiler: None) -> None:
    """Tiny ones that do lie between the large temporaries of every step, whose memory then can't be given back."""
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 2))
    optimizer = ZOOptimizer(model, 1e-3, eps=1e-3, noise=noise, weights=weights, safeguard=None)
    found = []
    for _ in range(2):
        for _ in range(15):
            optimizer.step(lambda: model(torch.ones(1, 300)).square().mean())
        gc.collect()
        found.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
    assert found[1] <= found[0]
