"""Rademacher noise: z[i] = +1 or -1, sign i is bit i mod 64 of hash(i // 64)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Noise, Stretch, counters
from zo_lightning.engine.noise.compiling import kernel
from zo_lightning.engine.noise.threefry import threefry

_CHUNK = 1 << 22
"""Elements whose sign words (1 bit each) exist at once."""


def _words(c0: Tensor, c1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    return torch.stack(threefry(c0, c1, k0, k1), dim=-1).view(-1)


@kernel
def _words_of(first: Tensor, blocks: Tensor, key: Tensor) -> Tensor:
    c0 = torch.arange(blocks.shape[0], dtype=torch.int32, device=key.device) + first
    return torch.stack(threefry(c0, key[2], key[0], key[1]), dim=-1)


@kernel
def _add_signs(out: Tensor, base: Tensor, words: Tensor, scalars: Tensor) -> None:
    shifts = torch.arange(64, device=base.device)
    bits = (words[:, None] >> shifts[None, :]) & 1
    signed = torch.where(bits != 0, scalars[1], -scalars[1])
    out.copy_(base.to(scalars.dtype) * scalars[0] + signed)


@kernel
def _add_signs_(weights: Tensor, words: Tensor, scalars: Tensor) -> None:
    shifts = torch.arange(64, device=weights.device)
    bits = (words[:, None] >> shifts[None, :]) & 1
    signed = torch.where(bits != 0, scalars[1], -scalars[1])
    weights.copy_(weights.to(scalars.dtype) * scalars[0] + signed)


@functools.cache
def _byte_signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the eight signs that a byte of the hash stands for."""
    byte = torch.arange(256, device=device)[:, None]
    return (((byte >> torch.arange(8, device=device)) & 1) * 2 - 1).to(dtype)


class Rademacher(Noise):
    """Independent signs. E z^2 = E z^4 = 1: exact in every dtype, and the least variance among SPSA's noises (Spall 1992)."""

    name = "rademacher"

    def values(self, keys: Tensor, stretches: Sequence[Stretch], dtype: torch.dtype) -> Tensor:
        blocks = [(row, start // 64, (start + count - 1) // 64 - start // 64 + 1) for row, start, count in stretches]
        words = _words(*counters(keys, blocks))
        # view(uint8) takes the bytes of a word from the lowest up, as every machine that torch runs on stores them
        signs = _byte_signs(dtype, keys.device).index_select(0, words.view(torch.uint8).int()).view(-1)
        if len(stretches) == 1:
            skip = stretches[0].first % 64
            return signs[skip : skip + stretches[0].length]
        pieces, at = [], 0
        for (_, start, count), (_, _, length) in zip(stretches, blocks, strict=True):
            pieces.append(signs[at + start % 64 : at + start % 64 + count])
            at += length * 64
        return torch.cat(pieces)

    def add(self, out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor) -> None:
        whole = base.numel() // 64 * 64
        for begin in range(0, whole, _CHUNK):
            end = min(begin + _CHUNK, whole)
            first = torch.tensor((start + begin) // 64, dtype=torch.int32, device=key.device)
            words = _words_of(first, base[begin:end].view(-1, 64), key).view(torch.int64).view(-1)
            target = out[begin:end].view(-1, 64)
            if out is base:
                _add_signs_(target, words, scalars)
            else:
                _add_signs(target, base[begin:end].view(-1, 64), words, scalars)
        if whole < base.numel():
            tail = Stretch(0, start + whole, base.numel() - whole)
            noise = self.values(key[None], [tail], scalars.dtype) * scalars[1]
            out[whole:] = base[whole:].to(scalars.dtype) * scalars[0] + noise
