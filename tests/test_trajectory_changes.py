"""Weights that others change between steps, parameters that are unfrozen, and disks that are full, for a run with a step log."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_tools import Loop, Setup, equal

from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.trajectory import load_base, read_log, replay, save_base, verify, writer

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning"),
    pytest.mark.filterwarnings(r"ignore:Before step \d+ the trained weights were changed:zo_lightning.engine.messages.ZOWarning"),
]


@torch.no_grad()
def data(loop: Loop) -> None:
    """Behind the back of version counters."""
    loop.net[0].weight.data.mul_(0.5)


@torch.no_grad()
def copied(loop: Loop) -> None:
    loop.net[0].bias.copy_(torch.arange(8.0))


def loaded(loop: Loop) -> None:
    loop.net.load_state_dict({name: tensor * 0.9 for name, tensor in loop.net.state_dict().items()})


def replaced(loop: Loop) -> None:
    loop.net[0].weight.data = loop.net[0].weight.data * 1.1


CHANGES = [data, copied, loaded, replaced]
WINDOWS = [0, 3, 4]


@pytest.mark.parametrize("weights", ["exact", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed_and_recalled(change: Callable[[Loop], None], dtype: torch.dtype, weights: str, tmp_path: Path) -> None:
    setup, between = Setup(weights, dtype=dtype, norm=weights == "inplace"), dict.fromkeys(WINDOWS, change)
    whole = Loop(setup, tmp_path / "whole", between=between)
    whole.begin()
    with pytest.warns(ZOWarning, match="Before step 0 the trained weights were changed by something else than a step.*a new base"):
        whole.windows()
    whole.end()
    assert [segment.step for segment in read_log(whole.log.path).segments] == [0, *WINDOWS]
    target = {p.name: p.tensor.clone() for p in whole.optimizer.residency.trained}
    assert verify(target, read_log(whole.log.path)).ok
    for cut in [(0, 0), (0, 1), (3, 0), (3, 1), (4, 1), (7, 1)]:
        folder = tmp_path / f"{cut[0]}.{cut[1]}"
        Loop(setup, folder, between=between).run(cut)
        again = Loop(setup, folder, seed=5, between=between).run()
        assert equal(again.state(), whole.state()), cut
        base = load_base(folder / str(read_log(again.log.path).segments[-1].base))
        assert replay(base, again.log.path) == 9
        assert equal(base, {p.name: p.tensor for p in again.optimizer.residency.trained})


@pytest.mark.parametrize("cut", [(3, 0), (3, 1), (6, 1)])
def test_a_change_that_is_not_repeated_is_loaded(cut: tuple[int, int], tmp_path: Path) -> None:
    whole = Loop(Setup(), tmp_path / "whole", between={3: data}).run()
    Loop(Setup(), tmp_path / "run", between={3: data}).run(cut)
    assert equal(Loop(Setup(), tmp_path / "run", seed=5).run().state(), whole.state())


def test_a_change_that_is_neither_repeated_nor_kept_is_an_error(tmp_path: Path) -> None:
    Loop(Setup(), tmp_path, between={3: data}).run((6, 1))
    list(tmp_path.glob("base-00000003-*"))[0].unlink()  # noqa: RUF015
    again = Loop(Setup(), tmp_path, seed=5).begin()
    with pytest.raises(ValueError, match=r"At step 3 the run in .* went on from other weights.*base-00000003-.*is not there"):
        again.windows()
    again.close()
    assert equal(
        Loop(Setup(), tmp_path, seed=5, between={3: data}).run().state(), Loop(Setup(), tmp_path / "whole", between={3: data}).run().state()
    )


def test_steps_and_evaluations_are_no_changes(tmp_path: Path) -> None:
    for weights in ("exact", "copy", "inplace"):
        loop = Loop(Setup(weights, norm=True, micro=2, idle=(3,)), tmp_path / weights).run()
        assert len(read_log(loop.log.path).segments) == 1


def test_changed_weights_before_a_checkpoint_and_before_the_end(tmp_path: Path) -> None:
    loop = Loop(Setup(), tmp_path).begin()
    loop.windows(stop=4)
    data(loop)
    loop.log.mark(loop.optimizer)
    loop.windows(4)
    data(loop)
    loop.end()
    assert [segment.step for segment in read_log(loop.log.path).segments] == [0, 4, 9]
    assert verify(loop.optimizer, loop.log.path).ok


@pytest.mark.parametrize("cut", [(3, 1), (5, 0), (5, 1), (7, 1)])
def test_unfrozen_parameters_begin_a_segment(cut: tuple[int, int], tmp_path: Path) -> None:
    def freeze(loop: Loop) -> None:
        loop.net[0].requires_grad_(False)

    def unfreeze(loop: Loop) -> None:
        loop.net[0].requires_grad_(True)

    def run(folder: Path, seed: int = 1, cut: tuple[int, int] | None = None) -> Loop:
        loop = Loop(Setup(), folder, seed=seed, between={5: unfreeze})
        frozen = torch.Generator().manual_seed(0)
        with torch.no_grad():  # which a script loads from somewhere
            for parameter in loop.net[0].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=frozen))
        freeze(loop)
        return loop.run(cut)

    whole = run(tmp_path / "whole")
    assert [(s.step, len(s.parameters)) for s in read_log(whole.log.path).segments] == [(0, 2), (5, 4)]
    run(tmp_path / "run", cut=cut)
    assert equal(run(tmp_path / "run", 7).state(), whole.state())


def test_files_of_bases_are_pruned_but_for_the_first_and_the_newest_of_this_log(tmp_path: Path) -> None:
    Loop(Setup(options={"seed": 3}), tmp_path, seed=4).run((2, 1))
    older = {path.name for path in tmp_path.glob("base-*")}
    with pytest.warns(ZOWarning, match="seed differs"):
        loop = Loop(Setup(), tmp_path, between=dict.fromkeys(range(2, 9), data)).run((8, 1))
    named = [segment.base for segment in read_log(loop.log.path).segments]
    assert {path.name for path in tmp_path.glob("base-*")} == older | {named[0], *named[-2:]}
    whole = Loop(Setup(), tmp_path / "whole", between=dict.fromkeys(range(2, 9), data)).run()
    assert equal(Loop(Setup(), tmp_path, seed=6, between=dict.fromkeys(range(2, 9), data)).run().state(), whole.state())


# ---- disks


def full(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """No room from here on, but for some bytes."""
    plain, left = os.write, [after]

    def write(number: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = plain(number, memoryview(data)[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(writer.os, "write", write)


@pytest.mark.parametrize("after", [0, 9])
@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_a_full_disk_at_a_step(weights: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(weights, norm=True)
    loop = Loop(setup, tmp_path / "run").begin()
    loop.windows(stop=4)
    before, bytes_before = {p.name: p.tensor.clone() for p in loop.optimizer.residency.trained}, loop.log.path.read_bytes()
    with monkeypatch.context() as patch:
        full(patch, after)
        with pytest.raises(OSError, match=r"Step 4 was not written to the step log .*No space left.*Make room") as caught:
            loop.windows(4)
    assert caught.value.filename == str(loop.log.path)
    assert loop.log.path.read_bytes() == bytes_before
    trained = {p.name: p.tensor for p in loop.optimizer.residency.trained}
    for name, tensor in before.items():  # in place, an evaluation that is restored rounds
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6 if weights == "inplace" else 0)
    assert loop.optimizer.steps == 4
    loop.close()
    again = Loop(setup, tmp_path / "run", seed=9).run()
    assert equal(again.state(), Loop(setup, tmp_path / "whole").run().state())


def test_a_full_disk_at_a_changed_base_and_at_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Loop(Setup(), tmp_path / "whole", between={4: data}).run()
    loop = Loop(Setup(), tmp_path / "run").begin()
    loop.windows(stop=4)
    data(loop)
    with monkeypatch.context() as patch:
        full(patch)
        with pytest.raises(OSError, match="Step 4 was not written to the step log"):
            loop.windows(4)
        with pytest.raises(OSError, match="Step 4 was not written to the step log"):
            loop.log.mark(loop.optimizer)
    assert len(read_log(loop.log.path).segments) == 1
    loop.log.mark(loop.optimizer)
    assert [segment.step for segment in read_log(loop.log.path).segments] == [0, 4]
    loop.windows(4)
    assert equal(loop.end().state()["tensors"], whole.state()["tensors"])


def test_a_folder_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    loop = Loop(Setup(), tmp_path / "file")
    before = loop.state()
    with pytest.raises(OSError, match="file"):
        loop.begin()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, *args, **kwargs: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied", str(path))))
        with pytest.raises(OSError, match=r"base-00000000-.*was not written: Permission denied.*choose a folder that can be written"):
            Loop(Setup(), tmp_path / "readonly").begin()
    assert not list((tmp_path / "readonly").iterdir())
    assert equal(loop.state(), before)


def test_a_full_disk_at_the_beginning_leaves_the_old_log_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Loop(Setup(), tmp_path).run((4, 1))
    old = (tmp_path / "trajectory.zolog").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("zo_lightning.engine.trajectory.keeper.save_base", no_room)
        with pytest.raises(OSError, match="No space"):
            Loop(Setup(), tmp_path, seed=3).begin(False)
    assert (tmp_path / "trajectory.zolog").read_bytes() == old
    assert equal(Loop(Setup(), tmp_path, seed=3).run().state(), Loop(Setup(), tmp_path / "whole").run().state())


def no_room(path: Path, trained: Any, writing: bool = True) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_base_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    log = Loop(Setup(), tmp_path).run((4, 1)).log.path
    base = tmp_path / str(read_log(log).segments[0].base)
    save_base(base, Loop(Setup(), tmp_path, seed=12).optimizer.residency.trained)
    with pytest.warns(ZOWarning, match="the weights are not those of that run after 0 steps"):
        Loop(Setup(), tmp_path, seed=13).run()


@torch.no_grad()
def clamped(loop: Loop) -> None:
    for weight in loop.net.parameters():
        weight.clamp_(-0.3, 0.3)


@torch.no_grad()
def shrunk(loop: Loop) -> None:
    loop.net[0].weight.mul_(0.99)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
@pytest.mark.parametrize("change", [clamped, shrunk])
def test_weights_that_change_between_micro_batches(
    change: Callable[[Loop], None], weights: str, dtype: torch.dtype, norm: bool, tmp_path: Path
) -> None:
    """As weight clipping in a hook of the host does, under accumulation."""
    setup, inside = Setup(weights, dtype=dtype, norm=norm, micro=3, steps=6), dict.fromkeys(range(6), change)
    whole = Loop(setup, tmp_path / "whole", inside=inside).run()
    log = read_log(whole.log.path)
    within = [segment for segment in log.segments if segment.within]
    assert within
    found = verify(load_base(log.path.parent / str(within[-1].base)), log)
    assert found.ok
    assert found.step == 6
    for cut in [(0, 1), (1, 4), (3, 0), (3, 5), (5, 1)]:
        folder = tmp_path / f"{cut[0]}.{cut[1]}"
        Loop(setup, folder, inside=inside).run(cut)
        again = Loop(setup, folder, inside=inside, seed=77).run()
        assert equal(again.state(), whole.state()), cut
