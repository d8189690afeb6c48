"""Rademacher noise: z[i] = +1 or -1, sign i is bit i mod 64 of hash(i // 64)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Elementwise, Stretch, coefficients_of, compute_dtype, constants, counters, layout, pieces
from zo_lightning.engine.noise.compiling import dispatch, kernel
from zo_lightning.engine.noise.dither import BLOCK, Dithers, dither
from zo_lightning.engine.noise.inside import Inside, chosen
from zo_lightning.engine.noise.rounding import stochastic
from zo_lightning.engine.noise.threefry import fused_threefry, threefry

if TYPE_CHECKING:
    from zo_lightning.engine.noise.members import Members

_CHUNK = 1 << 22
"""Elements whose sign words (1 bit each) exist at once."""


def _words_into(words: Tensor, first: Tensor, key: Tensor) -> None:
    """words[h, i] = half h (low, high) of hash(first + i), for words (2, n) int32."""
    c0 = torch.arange(words.shape[1], dtype=torch.int32, device=key.device) + first
    low, high = threefry(c0, key[2], key[0], key[1])
    words[0].copy_(low)
    words[1].copy_(high)


def _signed(words: Tensor, scale: Tensor) -> Tensor:
    """(n, 2, 32): scale where the bit is set, else -scale."""
    bits = torch.ones((), dtype=torch.int32, device=words.device) << torch.arange(32, dtype=torch.int32, device=words.device)
    return torch.where((words.t()[:, :, None] & bits) != 0, scale, -scale)


def _moved(base: Tensor, words: Tensor, first: Tensor, key: Tensor, scalars: Tensor, inside: Inside | None) -> Tensor:
    _words_into(words, first, key)
    wide = base.to(scalars.dtype)
    return chosen(inside, wide, wide * scalars[0] + _signed(words, scalars[1]), wide)


def _rounded(base: Tensor, words: Tensor, first: Tensor, key: Tensor, scalars: Tensor, inside: Inside | None, dithers: Dithers) -> Tensor:
    """For `scalars` = (decay - 1, c)."""
    _words_into(words, first, key)
    wide = base.float()
    change = chosen(inside, wide, wide * scalars[0] + _signed(words, scalars[1]), 0.0)
    return stochastic(wide, change, dithers.values(), base.dtype)


@kernel
def _add_signs(out: Tensor, base: Tensor, *how: Any) -> None:
    out.copy_(_moved(base, *how))


@kernel
def _add_signs_(weights: Tensor, *how: Any) -> None:
    weights.copy_(_moved(weights, *how))


@kernel
def _round_signs(out: Tensor, base: Tensor, *how: Any) -> None:
    out.copy_(_rounded(base, *how))


@kernel
def _round_signs_(weights: Tensor, *how: Any) -> None:
    weights.copy_(_rounded(weights, *how))


@kernel
def _words_of(words: Tensor, first: Tensor, keys: Tensor) -> None:
    """words[j, h, i] = half h of the hash of key j and first + i, for words (terms, 2, n) and keys (terms, 3)."""
    c0 = torch.arange(words.shape[2], dtype=torch.int32, device=keys.device) + first
    low, high = threefry(c0[None], keys[:, 2:], keys[:, :1], keys[:, 1:2])
    words[:, 0].copy_(low)
    words[:, 1].copy_(high)


@kernel
def _add_sums_(weights: Tensor, words: Sequence[Tensor], scalars: Tensor) -> None:
    total = functools.reduce(torch.add, [_signed(own, scalars[1 + j]) for j, own in enumerate(words)])
    weights.copy_(weights.to(scalars.dtype) * scalars[0] + total)


@kernel
def _accumulate_(total: Tensor, words: Sequence[Tensor], scales: Tensor) -> None:
    total.copy_(functools.reduce(torch.add, [total, *(_signed(own, scales[j]) for j, own in enumerate(words))]))


@kernel
def _add_streams(base: Tensor, words: Tensor, c0: Tensor, owner: Tensor, keys: Tensor, scalars: Tensor) -> Tensor:
    """For blocks of several streams, each with a key of `keys` (n, 3) and, in every step, a (decay, c) of `scalars` (steps, n, 2)."""
    low, high = threefry(c0, keys[owner, 2], keys[owner, 0], keys[owner, 1])
    words[0].copy_(low)
    words[1].copy_(high)
    decay, c = scalars[:, owner, 0], scalars[:, owner, 1]
    return base.to(scalars.dtype) * decay[:, :, None, None] + _signed(words, c[:, :, None, None])


@kernel
def _sign_at(index: Tensor, key: Tensor) -> Tensor:
    low, high = threefry((index >> 6).int(), key[2], key[0], key[1])
    lane = (index & 63).int()
    return (((torch.where(lane < 32, low, high) >> (lane & 31)) & 1) * 2 - 1).float()


@functools.cache
def _byte_signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the eight signs that a byte of the hash stands for."""
    byte = torch.arange(256, device=device)[:, None]
    return (((byte >> torch.arange(8, device=device)) & 1) * 2 - 1).to(dtype)


class Rademacher(Elementwise):
    """Independent signs. E z^2 = E z^4 = 1: exact in every dtype, and the least variance among SPSA's noises (Spall 1992)."""

    name = "rademacher"
    exact = True
    fuses = 4
    grain = BLOCK

    def values(self, keys: Tensor, stretches: Sequence[Stretch], dtype: torch.dtype, fused: bool = False) -> Tensor:
        blocks = [(row, start // 64, (start + count - 1) // 64 - start // 64 + 1) for row, start, count in stretches]
        words = torch.stack((fused_threefry if fused else threefry)(*counters(keys, blocks)), dim=-1).view(-1)
        # view(uint8) takes the bytes of a word from the lowest up, as every machine that torch runs on stores them
        signs = _byte_signs(dtype, keys.device).index_select(0, words.view(torch.uint8).int()).view(-1)
        return pieces(signs, 64, stretches)

    def joins(self, lengths: Sequence[int]) -> bool:
        return not any(length % BLOCK for length in lengths)

    def together(self, base: Tensor, keys: Tensor, stretches: Sequence[Stretch], steps: Sequence[Sequence[tuple[float, float]]]) -> Tensor:
        device, dtype = keys.device, compute_dtype(base.dtype)
        c0, owner = layout([(row, first // BLOCK, count // BLOCK) for row, first, count in stretches], device)
        rows = [row for row, _, _ in stretches]
        own = keys if rows == list(range(len(keys))) else keys[torch.tensor(rows, device=device)]
        scalars = coefficients_of(tuple(map(tuple, steps)), dtype, device)
        words = torch.empty(2, len(c0), dtype=torch.int32, device=device)
        moved: Tensor = _add_streams(base.view(-1, 2, 32), words, c0, owner, own, scalars)
        return moved.view(len(steps), -1)

    def at(self, index: Tensor, key: Tensor) -> Tensor:
        z: Tensor = dispatch(_sign_at, index.device)(index, key)
        return z

    def add(self, out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor, mask: Members | None = None) -> None:
        for target, given, _, how in _launches(out, base, key, start, scalars, mask):
            _add_signs_(target, *how) if given is None else _add_signs(target, given, *how)
        whole = base.numel() // BLOCK * BLOCK
        if whole < base.numel():
            tail = Stretch(0, start + whole, base.numel() - whole)
            wide = base[whole:].to(scalars.dtype)
            moved = wide * scalars[0] + self.values(key[None], [tail], scalars.dtype) * scalars[1]
            out[whole:] = moved if mask is None else torch.where(mask.keep(base[whole:], start + whole), moved, wide)

    def add_rounded(
        self, out: Tensor, base: Tensor, key: Tensor, round_key: Tensor, start: int, scalars: Tensor, mask: Members | None = None
    ) -> None:
        for target, given, at, how in _launches(out, base, key, start, scalars, mask):
            dithers = Dithers.of(len(target), at, round_key)
            _round_signs_(target, *how, dithers) if given is None else _round_signs(target, given, *how, dithers)
        whole = base.numel() // BLOCK * BLOCK
        if whole < base.numel():
            tail = [Stretch(0, start + whole, base.numel() - whole)]
            wide = base[whole:].float()
            change = wide * scalars[0] + self.values(key[None], tail, torch.float32) * scalars[1]
            if mask is not None:
                change = torch.where(mask.keep(base[whole:], start + whole), change, 0.0)
            out[whole:] = stochastic(wide, change, dither(round_key[None], tail), base.dtype)

    def add_terms(self, weights: Tensor, keys: Tensor, start: int, scalars: Tensor) -> None:
        for part, words in _several(weights, keys, start):
            _add_sums_(part, words, scalars)
        whole = weights.numel() // BLOCK * BLOCK
        if whole < weights.numel():
            rest = weights[whole:]
            tail = Stretch(0, start + whole, rest.numel())
            terms = (self.values(key[None], [tail], scalars.dtype) * c for key, c in zip(keys, scalars[1:], strict=True))
            rest.copy_(rest.to(scalars.dtype) * scalars[0] + functools.reduce(torch.add, terms))

    def accumulate(self, total: Tensor, keys: Tensor, start: int, coefficients: Sequence[float]) -> None:
        for begin in range(0, len(keys), self.fuses):
            group = slice(begin, begin + self.fuses)
            scales = coefficients_of(tuple(coefficients[group]), total.dtype, total.device)
            for part, words in _several(total, keys[group], start):
                _accumulate_(part, words, scales)
        whole = total.numel() // BLOCK * BLOCK
        if whole < total.numel():
            super().accumulate(total[whole:], keys, start + whole, coefficients)


def _launches(
    out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor, mask: Members | None
) -> Iterator[tuple[Tensor, Tensor | None, int, tuple[Any, ...]]]:
    """For all whole blocks: the target, the weights (None where they are the target), number of the first element, other arguments."""
    whole = base.numel() // BLOCK * BLOCK
    words = torch.empty(2 * min(whole, _CHUNK) // BLOCK, dtype=torch.int32, device=base.device)
    for begin in range(0, whole, _CHUNK):
        part = slice(begin, min(begin + _CHUNK, whole))
        at, room = start + begin, words[: (part.stop - begin) // 32].view(2, -1)
        inside = None if mask is None else mask.inside(base[part], at)
        how = (room, constants(at // BLOCK, torch.int32, key.device), key, scalars, inside)
        yield _blocks(out[part]), None if out is base else _blocks(base[part]), at, how


def _several(weights: Tensor, keys: Tensor, start: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Chunks of whole blocks, with the words of each key."""
    whole, terms = weights.numel() // BLOCK * BLOCK, len(keys)
    chunk = _CHUNK // Rademacher.fuses
    room = torch.empty(2 * terms * min(whole, chunk) // BLOCK, dtype=torch.int32, device=weights.device)
    for begin in range(0, whole, chunk):
        part = weights[begin : min(begin + chunk, whole)]
        words = room[: terms * part.numel() // 32].view(terms, 2, -1)
        _words_of(words, constants((start + begin) // BLOCK, torch.int32, keys.device), keys)
        yield _blocks(part), list(words)


def _blocks(flat: Tensor) -> Tensor:
    """64 elements a row, those of one hash."""
    return flat.view(-1, 2, 32)
