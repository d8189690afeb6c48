"""Masks in a sweep: what is inside moves as without a mask, what is outside keeps its bits, on every path through the kernels."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from zo_lightning.engine.noise import NOISES, Change, Item, apply_changes, sweep
from zo_lightning.engine.noise.members import Band, Bits, Listed, Lot, Members
from zo_lightning.engine.parameters import Trained

SHAPES = {"vector": (100,), "matrix": (96, 80), "odd": (641, 1027)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COMPILED = DTYPES[:2]
"""Of the large tensors: each dtype has kernels of its own, which take half a minute to compile."""


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)


def masks(theta: Tensor) -> dict[str, tuple[Members, Tensor]]:
    """Each kind, with the mask as a whole, made without it."""
    flat, place = theta.reshape(-1), torch.arange(theta.numel())
    size = flat.double().abs()
    bound = size.sort().values[flat.numel() // 4]
    some = torch.rand(flat.shape, generator=torch.Generator().manual_seed(9)) < 0.4
    last = int(torch.nonzero(size == bound)[0])
    lot = Lot(5, 77, -0.1)
    return {
        "small": (Band(float(bound), last, theta.dtype), (size < bound) | ((size == bound) & (place <= last))),
        "large": (Band(float(bound), last, theta.dtype, largest=True), (size > bound) | ((size == bound) & (place <= last))),
        "lot": (lot, lot.lots(0, theta.numel(), flat.device) <= -0.1),
        "bits": (Bits.of(some), some),
        "listed": (Listed(torch.nonzero(some).reshape(-1)), some),
    }


KINDS = ("small", "large", "lot", "bits", "listed")


@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "to scratch"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("shape", "dtype"), [(s, d) for s in SHAPES for d in (COMPILED if s == "odd" else DTYPES)])
def test_inside_as_without_a_mask_and_outside_untouched(shape: str, dtype: torch.dtype, noise: str, terms: int, inplace: bool) -> None:
    theta = weights(SHAPES[shape], dtype)
    for kind in KINDS:
        masked, plain, inside = both(kind, theta, noise, terms, inplace)
        if kind == "listed" and noise in ("gaussian", "sphere"):  # whose kernel for single elements rounds logarithms and sines otherwise
            ulp = 2.0 ** {torch.bfloat16: -7, torch.float16: -10}.get(dtype, -20)
            torch.testing.assert_close(masked[inside], plain[inside], rtol=ulp, atol=1e-7)
        else:
            assert torch.equal(masked[inside], plain[inside]), kind
        assert torch.equal(masked[~inside], theta[~inside]), kind
        assert not torch.equal(masked, theta), kind


def both(kind: str, theta: Tensor, noise: str, terms: int, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(what a sweep with the mask makes, what one without makes, the mask as a whole)."""
    mask, whole = masks(theta)[kind]
    seeds, coefficients = [3, 4][:terms], (1e-3, -2e-3)[:terms]
    found = {}
    for name, used in (("masked", mask), ("plain", None)):
        base = theta.clone()
        out = base if inplace else torch.empty_like(base)
        sweep([Item(out, base, 77, 0.9, coefficients, mask=used)], seeds, NOISES[noise](), rounding=11)  # type: ignore[operator]
        found[name] = out
    return found["masked"], found["plain"], whole.view(theta.shape)


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_contiguous(kind: str, dtype: torch.dtype) -> None:
    theta = weights((900, 700), dtype).t()
    mask, whole = masks(theta)[kind]
    out = theta.clone(memory_format=torch.preserve_format)
    plain = theta.clone(memory_format=torch.preserve_format)
    assert not out.is_contiguous()
    sweep([Item(out, out, 77, 0.9, (1e-3,), mask=mask)], [3], NOISES["rademacher"](), rounding=11)  # type: ignore[operator]
    sweep([Item(plain, plain, 77, 0.9, (1e-3,))], [3], NOISES["rademacher"](), rounding=11)  # type: ignore[operator]
    inside = whole.view(theta.shape)
    assert torch.equal(out[inside], plain[inside])
    assert torch.equal(out[~inside], theta[~inside])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_lookup(kind: str) -> None:
    theta = weights((5000, 64), torch.float32)
    mask, whole = masks(theta)[kind]
    rows = torch.tensor([4, 9, 4, 4999, 0])
    outs = []
    for lookup in (rows, None):
        out = torch.full_like(theta, 7.0)
        sweep([Item(out, theta, 77, 1.0, (1e-3,), lookup, mask)], [3], NOISES["rademacher"]())  # type: ignore[operator]
        outs.append(out[rows])
    assert torch.equal(*outs)
    assert torch.equal(outs[0][~whole.view(theta.shape)[rows]], theta[rows][~whole.view(theta.shape)[rows]])


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("kind", KINDS)
def test_many_changes_at_once_are_one_after_another(kind: str, dtype: torch.dtype) -> None:
    """Masks that follow the weights are taken anew for each of them."""
    tensors = [weights(shape, dtype, seed) for seed, shape in enumerate([(700, 900), (64, 3), (50,)])]
    used = {seed: masks(theta)[kind][0] for seed, theta in enumerate(tensors)}
    changes = [Change((s, s + 50), ((0.999, (2e-3, -3e-3)),), s + 99) for s in range(5)]
    together = [theta.clone() for theta in tensors]
    apply_changes([Trained(str(i), i, t, 0, (t,)) for i, t in enumerate(together)], changes, NOISES["rademacher"](), used)  # type: ignore[operator]
    single = [theta.clone() for theta in tensors]
    for change in changes:
        items = [Item(t, t, i, *change.steps[0], mask=used[i]) for i, t in enumerate(single)]
        sweep(items, change.seeds, NOISES["rademacher"](), rounding=change.rounding)  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(together, single, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(together, tensors, strict=True))


def test_without_a_compiler_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for able in (True, False):
        if not able:
            for module in ("compiling", "sweep"):
                monkeypatch.setattr(sys.modules[f"zo_lightning.engine.noise.{module}"], "available", lambda device: False)
        theta = weights((700, 900), torch.bfloat16)
        for kind in KINDS:
            out = theta.clone()
            sweep([Item(out, out, 77, 0.9, (1e-3,), mask=masks(theta)[kind][0])], [3], NOISES["rademacher"](), rounding=1)  # type: ignore[operator]
            found.append(out)
    half = len(KINDS)
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
