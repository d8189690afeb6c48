"""One pass over a list of tensors: out <- decay * base + sum_j c_j z(seed_j), without z ever being stored as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Noise, Stretch, constants
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.seeds import stream

SMALL = 1 << 15
"""Tensors of at most this many elements are done together: their noise is generated in one go."""
PACK = 1 << 19
"""At most so many elements of noise exist at a time."""


class Item(NamedTuple):
    """One tensor of a sweep: where the result goes (may be `base` itself), the weights, the parameter's key, its scalars.

    With `rows` (int64, repetitions allowed), only these rows of a matrix need to be written; the others of a large one are not.
    """

    out: Tensor
    base: Tensor
    key: int
    decay: float
    coefficients: tuple[float, ...]
    rows: Tensor | None = None


@torch.no_grad()
def sweep(items: Sequence[Item], seeds: Sequence[int], noise: Noise, done: list[Item] | None = None) -> None:
    """out <- decay * base + sum_j coefficients[j] * z(seeds[j], key), for every item.

    Weights of any floating dtype and layout; arithmetic in float32 (float64 for float64 weights), one rounding to the dtype of `out` at
    the end. The sum over j runs in the order of `seeds`, so that results do not depend on how tensors are grouped, chunked or compiled.
    Finished items are appended to `done`.
    """
    done = [] if done is None else done
    for device in {item.base.device for item in items}:
        _sweep_device([item for item in items if item.base.device == device], seeds, noise, device, done)


def _sweep_device(items: list[Item], seeds: Sequence[int], noise: Noise, device: torch.device, done: list[Item]) -> None:
    rows = [stream(seed, item.key) for item in items for seed in seeds]
    keys = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3).to(device, non_blocking=True)
    pack: list[tuple[int, Item]] = []
    size = 0
    fused = any(item.base.numel() > SMALL for item in items) and available(device.type)
    for row, item in enumerate(items):
        numel = item.base.numel()
        if item.rows is not None and numel > SMALL:
            _rows(item, item.rows, keys[row * len(seeds) : (row + 1) * len(seeds)], noise)
            done.append(item)
        elif numel > SMALL:
            _large(item, keys[row * len(seeds) : (row + 1) * len(seeds)], noise)
            done.append(item)
        elif numel:
            if size + numel > PACK:
                _packed(pack, keys, len(seeds), noise, fused, done)
                pack, size = [], 0
            pack.append((row, item))
            size += numel
    if pack:
        _packed(pack, keys, len(seeds), noise, fused, done)


def compute_dtype(base: Tensor) -> torch.dtype:
    """float64 for float64 weights, else float32."""
    return torch.float64 if base.dtype == torch.float64 else torch.float32


def _packed(pack: Sequence[tuple[int, Item]], keys: Tensor, terms: int, noise: Noise, fused: bool, done: list[Item]) -> None:
    """Small tensors: z of all of them is one tensor of at most PACK elements."""
    drawn = [
        noise.values(keys, [Stretch(row * terms + j, 0, item.base.numel()) for row, item in pack], torch.float32, fused)
        for j in range(terms)
    ]
    at = 0
    for _, item in pack:
        end = at + item.base.numel()
        _combine(item, item.out, item.base, [z[at:end].view(item.base.shape) for z in drawn])
        done.append(item)
        at = end


def _combine(item: Item, out: Tensor, base: Tensor, drawn: Sequence[Tensor]) -> None:
    """out <- decay * base + sum_j c_j z_j, with z_j of the shape of `base`."""
    dtype = compute_dtype(base)
    total = None
    for c, z in zip(item.coefficients, drawn, strict=True):
        scaled = z.to(dtype) * c
        total = scaled if total is None else total.add_(scaled)
    if total is None:
        total = torch.zeros((), dtype=dtype, device=base.device)
    if item.decay == 1.0 and out.shape == base.shape:
        torch.add(base, total, out=out)
    else:
        out.copy_((base.to(dtype) * item.decay).add_(total))


def _rows(item: Item, rows: Tensor, keys: Tensor, noise: Noise) -> None:
    """Some rows of a matrix, for a lookup that reads no others."""
    width = item.base.shape[1]
    rows = rows.flatten()
    for some in rows.split(max(1, PACK // width)):
        index = some[:, None] * width + torch.arange(width, device=rows.device)
        base = item.base[some]
        out = torch.empty_like(base)
        _combine(item, out, base, [noise.at(index, key) for key in keys])
        item.out[some] = out


def _large(item: Item, keys: Tensor, noise: Noise) -> None:
    """A large tensor: in one compiled pass where it can be, else in chunks of bounded size."""
    flat = item.base.is_contiguous() and item.out.is_contiguous()
    if flat and available(item.base.device.type):
        _compiled(item, keys, noise)
        return
    for out, base, start in _chunks(item.out, item.base, 0):
        drawn = [
            noise.values(keys, [Stretch(j, start, base.numel())], torch.float32).view(base.shape) for j in range(len(item.coefficients))
        ]
        _combine(item, out, base, drawn)


def _chunks(out: Tensor, base: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(out, base, index of the first element) of pieces of at most PACK elements, consecutive in logical order."""
    if base.numel() <= PACK:
        yield out, base, start
        return
    if base.is_contiguous() and out.is_contiguous():
        flat_out, flat_base = out.view(-1), base.view(-1)
        for at in range(0, base.numel(), PACK):
            yield flat_out[at : at + PACK], flat_base[at : at + PACK], start + at
        return
    row = base[0].numel()
    step = max(1, PACK // row)
    for at in range(0, base.shape[0], step):
        piece = slice(at, at + step)
        if row > PACK:
            yield from _chunks(out[at], base[at], start + at * row)
        else:
            yield out[piece], base[piece], start + at * row


def _compiled(item: Item, keys: Tensor, noise: Noise) -> None:
    """One fused pass for one term; several terms are summed first, in a buffer of bounded size."""
    same = item.out is item.base
    base = item.base.detach().view(-1)
    out = base if same else item.out.detach().view(-1)
    dtype = compute_dtype(base)

    if len(item.coefficients) == 1:
        noise.add(out, base, keys[0], 0, constants((item.decay, item.coefficients[0]), dtype, base.device))
        return
    for at in range(0, base.numel(), PACK):
        piece = base[at : at + PACK]
        total = torch.zeros(piece.numel(), dtype=dtype, device=base.device)
        for j, c in enumerate(item.coefficients):
            noise.add(total, total, keys[j], at, constants((1.0, c), dtype, base.device))
        out[at : at + PACK] = (piece.to(dtype) * item.decay).add_(total)
