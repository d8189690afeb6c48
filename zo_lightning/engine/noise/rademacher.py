"""Rademacher noise: z[i] = +1 or -1, sign i is bit i mod 64 of hash(i // 64)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Noise, Stretch, constants, counters, pieces
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


@kernel
def _add_signs(out: Tensor, base: Tensor, words: Tensor, first: Tensor, key: Tensor, scalars: Tensor) -> None:
    _words_into(words, first, key)
    out.copy_(base.to(scalars.dtype) * scalars[0] + _signed(words, scalars[1]))


@kernel
def _add_signs_(weights: Tensor, words: Tensor, first: Tensor, key: Tensor, scalars: Tensor) -> None:
    _words_into(words, first, key)
    weights.copy_(weights.to(scalars.dtype) * scalars[0] + _signed(words, scalars[1]))


@kernel
def _round_signs(
    out: Tensor, base: Tensor, words: Tensor, pairs: Tensor, lane: Tensor, first: Tensor, key: Tensor, round_key: Tensor, scalars: Tensor
) -> None:
    _words_into(words, first, key)
    pairs_into(pairs, first, round_key)
    wide = base.float()
    out.copy_(stochastic(wide, wide * scalars[0] + _signed(words, scalars[1]), spread(pairs, lane), out.dtype))


@kernel
def _round_signs_(
    weights: Tensor, words: Tensor, pairs: Tensor, lane: Tensor, first: Tensor, key: Tensor, round_key: Tensor, scalars: Tensor
) -> None:
    _words_into(words, first, key)
    pairs_into(pairs, first, round_key)
    wide = weights.float()
    weights.copy_(stochastic(wide, wide * scalars[0] + _signed(words, scalars[1]), spread(pairs, lane), weights.dtype))


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

    def add(self, out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor) -> None:
        whole = base.numel() // 64 * 64
        words = torch.empty(2 * min(whole, _CHUNK) // 64, dtype=torch.int32, device=base.device)
        for begin in range(0, whole, _CHUNK):
            end = min(begin + _CHUNK, whole)
            first = constants((start + begin) // 64, torch.int32, key.device)
            target, drawn = out[begin:end].view(-1, 2, 32), words[: (end - begin) // 32].view(2, -1)
            if out is base:
                _add_signs_(target, drawn, first, key, scalars)
            else:
                _add_signs(target, base[begin:end].view(-1, 2, 32), drawn, first, key, scalars)
        if whole < base.numel():
            tail = Stretch(0, start + whole, base.numel() - whole)
            noise = self.values(key[None], [tail], scalars.dtype) * scalars[1]
            out[whole:] = base[whole:].to(scalars.dtype) * scalars[0] + noise

    def add_rounded(self, out: Tensor, base: Tensor, key: Tensor, round_key: Tensor, start: int, scalars: Tensor) -> None:
        whole = base.numel() // 64 * 64
        words = torch.empty(2 * min(whole, _CHUNK) // 64, dtype=torch.int32, device=base.device)
        pairs = torch.empty(2 * min(whole, _CHUNK) // 64, device=base.device)
        lane = lanes(base.device).view(2, 32)
        for begin in range(0, whole, _CHUNK):
            end = min(begin + _CHUNK, whole)
            first = constants((start + begin) // 64, torch.int32, key.device)
            count = (end - begin) // 32
            target, drawn, dithers = out[begin:end].view(-1, 2, 32), words[:count].view(2, -1), pairs[:count].view(2, -1)
            if out is base:
                _round_signs_(target, drawn, dithers, lane, first, key, round_key, scalars)
            else:
                _round_signs(target, base[begin:end].view(-1, 2, 32), drawn, dithers, lane, first, key, round_key, scalars)
        if whole < base.numel():
            tail = [Stretch(0, start + whole, base.numel() - whole)]
            wide = base[whole:].float()
            change = wide * scalars[0] + self.values(key[None], tail, torch.float32) * scalars[1]
            out[whole:] = stochastic(wide, change, dither(round_key[None], tail), base.dtype)
