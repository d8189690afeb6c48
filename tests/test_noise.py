"""Noise is a function of (seed, parameter key, index): equal to its naive reference, however it is grouped, chunked or compiled."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from engine_models import FLOATS, bits, eagerly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import noise as reference
from reference.threefry import KNOWN_ANSWERS, threefry_array
from reference.threefry import threefry as reference_threefry
from torch import Tensor

from zo_lightning.engine import Gaussian, Noise, Rademacher
from zo_lightning.engine.noise import Item, sweep
from zo_lightning.engine.noise.base import Stretch
from zo_lightning.engine.noise.threefry import threefry
from zo_lightning.engine.seeds import evaluation_seed, parameter_key, query_seed, stream

NOISES: dict[str, Noise] = {"rademacher": Rademacher(), "gaussian": Gaussian()}
TOLERANCE = {"rademacher": 0.0, "gaussian": 2e-6}
"""Radii are off by up to 3.7e-7 and sines by 2.2e-7, the angle's rounding included (all of them were tried), and r < 5.77; z is rounded."""
BIG = (1 << 19) + 3 * 64 + 5
"""More than one block of Box-Muller, one chunk and one row of 64 signs, and not a multiple of any."""

each_noise = pytest.mark.parametrize("name", NOISES)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


SWEEP, LARGE = (sys.modules[f"zo_lightning.engine.noise.{name}"] for name in ("sweep", "large"))  # they have functions of the same names


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels are in test_compile.py."""
    eagerly(monkeypatch)


def added(
    tensor: Tensor, noise: str, coefficients: Sequence[float] = (1.0,), decay: float = 1.0, key: int = 5, first_seed: int = 9
) -> Tensor:
    """decay * tensor + sum_j c_j z(first_seed + j, key), in a new tensor of the same strides."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    seeds = [first_seed + j for j in range(len(coefficients))]
    sweep([Item(out, tensor, key, decay, tuple(coefficients))], seeds, NOISES[noise])
    return out


def z_of(noise: str, count: int, seed: int = 9, key: int = 5) -> Tensor:
    return torch.from_numpy(reference.NOISES[noise](seed, key, np.arange(count)))


def signed(words: Sequence[int]) -> list[int]:
    return [word - 2**32 if word >= 2**31 else word for word in words]


# ---- the generator and its keys


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_threefry_gives_the_published_answers(counter: tuple[int, int], key: tuple[int, int], answer: tuple[int, int]) -> None:
    words = threefry(*(torch.tensor([word], dtype=torch.int32) for word in signed([*counter, *key])))
    assert [int(word) & 0xFFFFFFFF for word in words] == list(answer)
    assert reference_threefry(counter, key) == answer


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 4))
@quick
def test_threefry_equals_integer_arithmetic_for_any_counter_and_key(words: tuple[int, int, int, int]) -> None:
    c0, c1, k0, k1 = words
    ours = threefry(*(torch.tensor([word], dtype=torch.int32) for word in signed(words)))
    assert tuple(int(word) & 0xFFFFFFFF for word in ours) == reference_threefry((c0, c1), (k0, k1))
    assert tuple(int(word[0]) for word in threefry_array(np.array([c0], np.uint32), c1, k0, k1)) == reference_threefry((c0, c1), (k0, k1))


@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(0, 2**20), st.text(max_size=30))
@quick
def test_seeds_and_streams_are_those_of_the_reference(run_seed: int, step: int, query: int, name: str) -> None:
    assert query_seed(run_seed, step, query) == reference.query_seed(run_seed, step, query) < 2**63
    assert evaluation_seed(run_seed, step, query, 3) == reference.evaluation_seed(run_seed, step, query, 3)
    assert parameter_key(name) == reference.parameter_key(name)
    assert stream(run_seed, step) == tuple(signed(reference.stream(run_seed, step)))


def test_no_two_streams_share_a_stretch() -> None:
    """All 64-bit words of 40,000 neighbouring streams differ; a stretch shared at any offset would repeat a word of 64 signs."""
    seeds, keys = range(100), range(400)
    table = torch.tensor([stream(seed, key) for seed, key in itertools.product(seeds, keys)], dtype=torch.int32)
    words = threefry(torch.arange(64, dtype=torch.int32)[:, None], table[:, 2], table[:, 0], table[:, 1])
    whole = words[0].long() << 32 | words[1].long() & 0xFFFFFFFF
    assert whole.numel() == 2_560_000
    assert whole.unique().numel() == whole.numel()


def test_seeds_of_steps_queries_runs_and_evaluations_never_coincide() -> None:
    drawn = [query_seed(run, step, query) for run in range(5) for step in range(1000) for query in range(8)]
    drawn += [
        evaluation_seed(run, step, micro, rank) for run in range(5) for step in range(1000) for micro in range(2) for rank in range(2)
    ]
    assert len(set(drawn)) == len(drawn) == 60_000


# ---- values


@each_noise
def test_values_are_those_of_the_reference(name: str) -> None:
    z = added(torch.zeros(BIG, dtype=torch.float64), name)
    assert float((z - z_of(name, BIG)).abs().max()) <= TOLERANCE[name]


def test_sign_i_is_bit_i_mod_64_of_the_hash_of_i_over_64() -> None:
    k0, k1, c1 = reference.stream(9, 5)
    signs = added(torch.zeros(640), "rademacher").tolist()
    for i in range(640):
        low, high = reference_threefry((i // 64, c1), (k0, k1))
        assert signs[i] == (1.0 if (high << 32 | low) >> (i % 64) & 1 else -1.0)


@given(
    st.sampled_from(sorted(NOISES)),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**20 + 10), st.integers(1, 5000)), min_size=1, max_size=5),
)
@quick
def test_any_list_of_stretches_has_the_values_of_the_whole_streams(name: str, cuts: list[tuple[int, int, int]]) -> None:
    keys = torch.tensor([stream(9, key) for key in range(4)], dtype=torch.int32)
    values = NOISES[name].values(keys, [Stretch(*cut) for cut in cuts], torch.float64)
    expected = [reference.NOISES[name](9, row, np.arange(first, first + count)) for row, first, count in cuts]
    assert float((values - torch.from_numpy(np.concatenate(expected))).abs().max()) <= TOLERANCE[name]


@given(
    st.sampled_from(sorted(NOISES)),
    st.lists(st.integers(0, 7), max_size=4),
    st.sampled_from(FLOATS),
    st.sampled_from(["contiguous", "transposed", "strided", "channels last"]),
    st.integers(1, 3),
)
@quick
def test_any_shape_layout_and_dtype_gets_the_same_noise_by_logical_index(
    name: str, shape: list[int], dtype: torch.dtype, layout: str, terms: int
) -> None:
    """0-d and empty tensors are among the shapes. Rademacher with dyadic coefficients is exact in every dtype."""
    start = torch.linspace(-2, 2, int(np.prod(shape, dtype=int))).mul(64).round().div(64).view(shape).to(dtype)
    if layout == "transposed":
        axes = tuple(reversed(range(start.dim())))
        start = start.permute(axes).contiguous().permute(axes)
    if layout == "strided" and start.dim():
        start = torch.stack([start, start], -1)[..., 0]
    if layout == "channels last" and start.dim() == 4:
        start = start.contiguous(memory_format=torch.channels_last)
    coefficients = [0.5, -0.25, 0.125][:terms]
    got = added(start, name, coefficients)
    expected = start.double() + sum(c * z_of(name, start.numel(), 9 + j).view(shape) for j, c in enumerate(coefficients))
    allowed = TOLERANCE[name] + (0.0 if name == "rademacher" else 4.0 * torch.finfo(dtype).eps)
    assert got.shape == start.shape
    assert got.numel() == 0 or float((got.double() - expected).abs().max()) <= allowed


# ---- one value, however it is computed


@each_noise
@pytest.mark.parametrize("chunk", [64, 1000, 4096, 1 << 18])
def test_the_size_of_chunks_and_packs_changes_no_bit(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(shape) for shape in ((40_000,), (7, 900), (), (33, 40, 41), (2000,))] + [torch.randn(300, 200).T]
    whole = [added(tensor, name, (0.3, -0.7), 0.9) for tensor in tensors]
    for module in (SWEEP, LARGE):
        monkeypatch.setattr(module, "PACK", chunk)
    monkeypatch.setattr(SWEEP, "SMALL", chunk // 2)
    for tensor, expected in zip(tensors, whole, strict=True):
        assert torch.equal(bits(added(tensor, name, (0.3, -0.7), 0.9)), bits(expected))


@each_noise
def test_several_terms_at_once_are_one_after_another(name: str) -> None:
    """In float64, where the roundings between the terms are far below float32 noise values; Rademacher with dyadic scalars is exact."""
    for count in (40, BIG):
        start = torch.ones(count, dtype=torch.float64)
        together = added(start, name, (0.5, -0.25, 2.0))
        one_by_one = start
        for j, c in enumerate((0.5, -0.25, 2.0)):
            one_by_one = added(one_by_one, name, (c,), first_seed=9 + j)
        assert float((together - one_by_one).abs().max()) <= (0.0 if name == "rademacher" else 1e-14)


@each_noise
def test_values_do_not_depend_on_the_company_order_or_threads(name: str) -> None:
    shapes = {3: (5, 7), 8: (), 1: (50_000,), 6: (33,), 2: (0,), 9: (4, 4, 4)}
    alone = {key: added(torch.zeros(shape), name, key=key) for key, shape in shapes.items()}
    threads = torch.get_num_threads()
    try:
        for count, order in ((1, sorted(shapes)), (2, sorted(shapes, reverse=True))):
            torch.set_num_threads(count)
            outs = {key: torch.zeros(shapes[key]) for key in order}
            sweep([Item(outs[key], outs[key], key, 1.0, (1.0,)) for key in order], [9], NOISES[name])
            assert all(torch.equal(bits(outs[key]), bits(alone[key])) for key in order)
    finally:
        torch.set_num_threads(threads)


@each_noise
def test_another_seed_or_key_is_other_noise(name: str) -> None:
    z = added(torch.zeros(4096), name)
    others = [
        added(torch.zeros(4096), name, key=6),
        added(torch.zeros(4096), name, first_seed=10),
        added(torch.zeros(4096), name, key=9, first_seed=5),
    ]
    assert all(abs(float((z * other).mean())) < 4 / 64 for other in others)


def test_an_item_without_terms_only_decays() -> None:
    weights = torch.tensor([1.0, -2.0, 4.0])
    sweep([Item(weights, weights, 5, 0.5, ())], [], Rademacher())
    assert weights.tolist() == [0.5, -1.0, 2.0]


def test_noise_leaves_the_generators_of_the_program_alone() -> None:
    before = torch.get_rng_state()
    added(torch.zeros(BIG), "gaussian")
    assert torch.equal(torch.get_rng_state(), before)
