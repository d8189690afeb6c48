"""Masked runs with a step log: cut off across a refresh and begun again, replayed, exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_tools import Loop, Setup, equal
from torch import Tensor, nn

from zo_lightning.engine.masks import Mask, NofM, PrincipalWeights, Sensitive, Structured, Where
from zo_lightning.engine.trajectory import apply, export, load_base, read_log, verify

pytestmark = pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = ("exact", "copy", "inplace")


def some(name: str, tensor: Tensor) -> Tensor | bool:
    """A mask of the user's own, which no seed determines."""
    return torch.rand(tensor.shape) < 0.5 if tensor.dim() > 1 else name.endswith("bias")


MASKS: dict[str, Any] = {
    "small": Mask("small_weights", 0.4, refresh=4),
    "large, fixed from step 5 on": Mask("large_weights", 0.3, refresh=2, until=5),
    "random": Mask("random", 0.5, refresh=3),
    "a list": Mask("random", 0.5, refresh=3, exclude="*bias"),
    "n of m": Mask(NofM(1, 2), refresh=4),
    "rows": Mask(Structured(), 0.25, refresh=4),
    "own": Mask(Where(some), refresh=4),
    "low rank": Mask(PrincipalWeights(2, vectors="rest"), 0.3, refresh=4),
    "measured": Mask(Sensitive(steps=2), 0.4, refresh=5),
    "gradients": Mask(Sensitive(lambda: gradients[0]()), 0.4, refresh=4),
}
MASKS_OF = {"large, fixed from step 5 on": 3, "random": 4, "a list": 4, "measured": 4}
gradients: list[Callable[[], Any]] = []


def loop(setup: Setup, folder: Path, seed: int = 1) -> Loop:
    """A loop, of whose network the losses of "gradients" are from now on."""
    made = Loop(setup, folder, seed=seed)

    def losses() -> Iterator[Tensor]:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(9)).to(setup.dtype)
        yield nn.functional.cross_entropy(made.net.eval()(x).float(), torch.arange(6) % 2)
        made.net.train()

    gradients[:] = [losses]
    return made


def setup_of(kind: str, weights: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> Setup:
    if kind == "a list":
        monkeypatch.setattr("zo_lightning.engine.masks.rules.LIST_BELOW", 0.9)
    return Setup(weights, DTYPES[dtype], steps=10, micro=2, options={"mask": MASKS[kind]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", MASKS)
def test_a_masked_run_that_is_cut_off_ends_as_the_whole_one(
    kind: str, weights: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(kind, weights, dtype, monkeypatch)
    torch.manual_seed(0)
    whole = loop(setup, tmp_path / "whole").run()
    log = read_log(whole.log.path)
    assert len(log.masks) == MASKS_OF.get(kind, 3)
    assert verify(load_base(log.path.parent / str(log.segments[0].base)), log).ok
    for cut in ((0, 1), (4, 0), (5, 1), (9, 1), *(((2, 0), (7, 1)) if kind == "measured" else ())):
        folder = tmp_path / f"{cut[0]}.{cut[1]}"
        torch.manual_seed(0)
        loop(setup, folder).run(cut)
        again = loop(setup, folder, seed=77).run()  # where the user's own mask comes out otherwise, the recorded one is used
        if kind != "own" or cut[0] > 8:
            assert equal(again.state(), whole.state()), cut
        found = read_log(again.log.path)
        assert {mask.step for mask in found.masks} == {mask.step for mask in log.masks}  # one of them twice, where its step was cut off
        assert verify(load_base(folder / str(found.segments[0].base)), found).ok


@pytest.mark.parametrize("kind", MASKS)
def test_an_export_has_masks_that_are_numbers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop(setup_of(kind, "exact", "float32", monkeypatch), tmp_path / "run").run()
    log = read_log(run.log.path)
    base = load_base(log.path.parent / str(log.segments[0].base))
    if any(mask.file for mask in log.masks):
        with pytest.raises(ValueError, match="masks that are stored in files"):
            export(log, tmp_path / "tune.safetensors")
        return
    export(log, tmp_path / "tune.safetensors")
    assert apply(base, tmp_path / "tune.safetensors") == 10
    assert all(torch.equal(base[name], weight) for name, weight in run.net.named_parameters())
