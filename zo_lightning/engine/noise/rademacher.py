"""Rademacher noise: z[i] = +1 or -1, sign i is bit i mod 64 of hash(i // 64)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Noise, Stretch, constants, counters, inside, part_of, pieces
from zo_lightning.engine.noise.compiling import dispatch, kernel
from zo_lightning.engine.noise.rounding import dither, lanes, pairs_into, spread, stochastic
from zo_lightning.engine.noise.threefry import fused_threefry, threefry

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


def _moved(base: Tensor, words: Tensor, scalars: Tensor, keep: Tensor | None) -> Tensor:
    wide = base.to(scalars.dtype)
    moved = wide * scalars[0] + _signed(words, scalars[1])
    own = inside(keep, wide)
    return moved if own is None else torch.where(own, moved, wide)


def _change(wide: Tensor, words: Tensor, scalars: Tensor, keep: Tensor | None) -> Tensor:
    """What is added to 16-bit weights, for `scalars` = (decay - 1, c)."""
    change = wide * scalars[0] + _signed(words, scalars[1])
    own = inside(keep, wide)
    return change if own is None else torch.where(own, change, 0.0)


@kernel
def _add_signs(out: Tensor, base: Tensor, words: Tensor, first: Tensor, key: Tensor, scalars: Tensor, keep: Tensor | None) -> None:
    _words_into(words, first, key)
    out.copy_(_moved(base, words, scalars, keep))


@kernel
def _add_signs_(weights: Tensor, words: Tensor, first: Tensor, key: Tensor, scalars: Tensor, keep: Tensor | None) -> None:
    _words_into(words, first, key)
    weights.copy_(_moved(weights, words, scalars, keep))


@kernel
def _round_signs(
    out: Tensor,
    base: Tensor,
    words: Tensor,
    pairs: Tensor,
    lane: Tensor,
    first: Tensor,
    key: Tensor,
    round_key: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
) -> None:
    _words_into(words, first, key)
    pairs_into(pairs, first, round_key)
    wide = base.float()
    out.copy_(stochastic(wide, _change(wide, words, scalars, keep), spread(pairs, lane), out.dtype))


@kernel
def _round_signs_(
    weights: Tensor,
    words: Tensor,
    pairs: Tensor,
    lane: Tensor,
    first: Tensor,
    key: Tensor,
    round_key: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
) -> None:
    _words_into(words, first, key)
    pairs_into(pairs, first, round_key)
    wide = weights.float()
    weights.copy_(stochastic(wide, _change(wide, words, scalars, keep), spread(pairs, lane), weights.dtype))


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


class Rademacher(Noise):
    """Independent signs. E z^2 = E z^4 = 1: exact in every dtype, and the least variance among SPSA's noises (Spall 1992)."""

    name = "rademacher"

    def values(self, keys: Tensor, stretches: Sequence[Stretch], dtype: torch.dtype, fused: bool = False) -> Tensor:
        blocks = [(row, start // 64, (start + count - 1) // 64 - start // 64 + 1) for row, start, count in stretches]
        words = torch.stack((fused_threefry if fused else threefry)(*counters(keys, blocks)), dim=-1).view(-1)
        # view(uint8) takes the bytes of a word from the lowest up, as every machine that torch runs on stores them
        signs = _byte_signs(dtype, keys.device).index_select(0, words.view(torch.uint8).int()).view(-1)
        return pieces(signs, 64, stretches)

    def at(self, index: Tensor, key: Tensor) -> Tensor:
        z: Tensor = dispatch(_sign_at, index.device)(index, key)
        return z

    def add(self, out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor, keep: Tensor | None = None) -> None:
        whole = base.numel() // 64 * 64
        words = torch.empty(2 * min(whole, _CHUNK) // 64, dtype=torch.int32, device=base.device)
        for begin in range(0, whole, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, whole))
            first = constants((start + begin) // 64, torch.int32, key.device)
            target, drawn = _blocks(out[part]), words[: (part.stop - begin) // 32].view(2, -1)
            kept = part_of(keep, part)
            kept = kept if kept is None or kept is keep else _blocks(kept)
            if out is base:
                _add_signs_(target, drawn, first, key, scalars, kept)
            else:
                _add_signs(target, _blocks(base[part]), drawn, first, key, scalars, kept)
        if whole < base.numel():
            tail = Stretch(0, start + whole, base.numel() - whole)
            wide = base[whole:].to(scalars.dtype)
            moved = wide * scalars[0] + self.values(key[None], [tail], scalars.dtype) * scalars[1]
            own = inside(part_of(keep, slice(whole, None)), wide)
            out[whole:] = moved if own is None else torch.where(own, moved, wide)

    def add_rounded(
        self, out: Tensor, base: Tensor, key: Tensor, round_key: Tensor, start: int, scalars: Tensor, keep: Tensor | None = None
    ) -> None:
        whole = base.numel() // 64 * 64
        words = torch.empty(2 * min(whole, _CHUNK) // 64, dtype=torch.int32, device=base.device)
        pairs = torch.empty(2 * min(whole, _CHUNK) // 64, device=base.device)
        lane = lanes(base.device).view(2, 32)
        for begin in range(0, whole, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, whole))
            first = constants((start + begin) // 64, torch.int32, key.device)
            count = (part.stop - begin) // 32
            target, drawn, dithers = _blocks(out[part]), words[:count].view(2, -1), pairs[:count].view(2, -1)
            kept = part_of(keep, part)
            kept = kept if kept is None or kept is keep else _blocks(kept)
            if out is base:
                _round_signs_(target, drawn, dithers, lane, first, key, round_key, scalars, kept)
            else:
                _round_signs(target, _blocks(base[part]), drawn, dithers, lane, first, key, round_key, scalars, kept)
        if whole < base.numel():
            tail = [Stretch(0, start + whole, base.numel() - whole)]
            wide = base[whole:].float()
            change = wide * scalars[0] + self.values(key[None], tail, torch.float32) * scalars[1]
            own = inside(part_of(keep, slice(whole, None)), wide)
            if own is not None:
                change = torch.where(own, change, 0.0)
            out[whole:] = stochastic(wide, change, dither(round_key[None], tail), base.dtype)


def _blocks(flat: Tensor) -> Tensor:
    """64 elements a row, those of one hash."""
    return flat.view(-1, 2, 32)
