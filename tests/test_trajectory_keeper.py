"""A plain loop that is cut off and begun again with other weights ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_tools import Loop, Setup, equal

from zo_lightning.engine import SPSA, Coordinatewise, ForwardGradient, Momentum, RankSGD, Safeguard
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.trajectory import load_base, read_log, replay

CUT_OFF = pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning")
CHANGED = pytest.mark.filterwarnings(r"ignore:Before step \d+ the trained weights were changed:zo_lightning.engine.messages.ZOWarning")
pytestmark = [CUT_OFF]

KINDS = {
    "plain": Setup(),
    "copy": Setup("copy"),
    "inplace": Setup("inplace"),
    "three queries": Setup(estimator=SPSA(3), micro=2),
    "ranks of three queries": Setup(estimator=SPSA(3, fitness="ranks")),
    "three queries in place": Setup("inplace", estimator=SPSA(3), micro=2),
    "accumulation": Setup(micro=3, schedule=True),
    "idle windows": Setup(idle=(0, 3, 4), micro=2, steps=11),
    "idle windows in place": Setup("inplace", idle=(2, 3), steps=11),
    "losses that are missing": Setup(partly=(1, 4, 5), micro=2),
    "infinite losses": Setup(infinite=(1, 4, 5), options={"max_nonfinite": 4}),
    "infinite losses in place": Setup("inplace", infinite=(1, 4, 5)),
    "groups and a schedule": Setup(groups=True, schedule=True),
    "halving": Setup(options={"safeguard": Safeguard(window=2, tolerance=1e-9, action="halve"), "lr": 0.5}, steps=12),
    "normalization": Setup(norm=True, micro=2),
    "normalization in place": Setup("inplace", norm=True, idle=(4,)),
    "normalization and accumulation in place": Setup("inplace", norm=True, micro=3, partly=(2, 5), estimator=SPSA(2)),
    "line search": Setup(estimator=RankSGD(3, search=2), micro=2, infinite=(4,), options={"lr": 5e-4}),
    "line search in place": Setup("inplace", estimator=RankSGD(3, search=2), micro=2, norm=True, idle=(3,), options={"lr": 5e-4}),
    "derivatives": Setup(estimator=ForwardGradient(2), micro=2, norm=True, infinite=(4,)),
    "coordinates of a mask": Setup(
        estimator=Coordinatewise(), micro=2, norm=True, infinite=(4,), options={"mask": Mask("random", 0.1, refresh=3)}
    ),
    "coordinates in place": Setup("inplace", estimator=Coordinatewise(central=True), idle=(3,)),
    "derivatives in place": Setup("inplace", estimator=ForwardGradient(2), idle=(3,)),
    "momentum": Setup(micro=2, infinite=(4,), options={"update": Momentum(0.8, window=3)}),
    "momentum in place": Setup("inplace", idle=(2,), options={"update": Momentum(0.8, window=3)}),
    "sign": Setup(groups=True, schedule=True, options={"update": "sign", "lr": 1e-3}),
    "adam": Setup(micro=2, infinite=(4,), options={"update": "adam", "lr": 1e-3}),
    "gaussian and a clip": Setup(options={"noise": "gaussian", "clip": 0.5}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def reference(setup: Setup, tmp_path: Path) -> Loop:
    """The run without a cut."""
    return Loop(setup, tmp_path / "whole").run()


@pytest.mark.filterwarnings("ignore:The run diverges:zo_lightning.engine.messages.ZOWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_cut_off_ends_as_the_whole_one(kind: str, dtype: str, tmp_path: Path) -> None:
    setup = KINDS[kind].but(dtype=DTYPES[dtype])
    whole = reference(setup, tmp_path)
    for cut in ((0, 1), (5, 0), (6, 1), (setup.steps - 1, 1)):
        folder = tmp_path / f"{cut[0]}.{cut[1]}"
        Loop(setup, folder).run(cut)
        again = Loop(setup, folder, seed=77).run()
        assert equal(again.state(), whole.state()), cut
        assert again.log.behind == 0
        assert again.optimizer.report.values == whole.optimizer.report.values
        assert replay(load_base(folder / str(read_log(again.log.path).segments[0].base)), again.log.path) == again.optimizer.steps


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_a_run_that_is_cut_off_again_and_again(weights: str, tmp_path: Path) -> None:
    setup = Setup(weights, dtype=torch.bfloat16, micro=2, steps=12)
    whole = reference(setup, tmp_path)
    for attempt, cut in enumerate([(2, 1), (2, 3), (5, 0), (8, 2), (11, 3)]):
        Loop(setup, tmp_path / "run", seed=attempt + 1).run(cut)
    assert equal(Loop(setup, tmp_path / "run", seed=9).run().state(), whole.state())


def test_recalled_steps_make_no_forward_pass(tmp_path: Path) -> None:
    Loop(Setup(), tmp_path).run((6, 1))
    again = Loop(Setup(), tmp_path, seed=7).begin()
    assert again.log.behind == 6
    again.windows(stop=6)
    assert (again.calls, again.log.behind, again.log.recalled) == (0, 0, 6)
    assert again.optimizer.forward_passes == 12
    again.windows(6)
    assert again.calls in (6, 7)  # with a probe
    again.end()


def test_where_buffers_move_the_first_evaluation_is_made_again(tmp_path: Path) -> None:
    setup = Setup("copy", norm=True, micro=2)
    Loop(setup, tmp_path).run((6, 1))
    again = Loop(setup, tmp_path, seed=7).begin()
    again.windows(stop=6)
    assert again.calls == 12
    again.close()


@pytest.mark.parametrize(("traces", "calls"), [(True, 6), (False, 0)])
def test_traces_can_be_said_to_be_there_or_not(traces: bool, calls: int, tmp_path: Path) -> None:
    setup = Setup("copy", norm=not traces)
    Loop(setup, tmp_path).run((6, 1), traces=traces)
    again = Loop(setup, tmp_path, seed=7).begin()
    again.windows(stop=6)
    assert again.calls == calls
    again.close()


def test_the_end_is_noted_where_every_step_was_recalled(tmp_path: Path) -> None:
    loop = Loop(Setup(), tmp_path).begin()
    loop.windows()
    loop.close()
    assert Loop(Setup(), tmp_path, seed=7).run().log.recalled == 9
    assert read_log(tmp_path / "trajectory.zolog").end is not None


def test_a_checkpoint_after_the_last_recalled_step_is_noted(tmp_path: Path) -> None:
    Loop(Setup(), tmp_path).run((4, 1))
    again = Loop(Setup(), tmp_path, seed=7).begin()
    again.windows(stop=4)
    again.log.mark(again.optimizer)
    again.log.checkpoint(again.optimizer, str(tmp_path / "checkpoint-4"), "hf")
    again.close()
    assert [(c.step, c.path) for c in read_log(again.log.path).checkpoints] == [(4, "checkpoint-4")]


# ---- begin anew or not


def logs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.zolog"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"lr": 0.5}}, r"step 0 was made with .*lr=0.01.* and would be with .*lr=0.5"),
        ({"options": {"eps": 0.5}}, r"step 0 was made with .*eps=0.01.* and would be with .*eps=0.5"),
        ({"options": {"weight_decay": 0.5}}, r"step 0 was made with .*decay=0.01"),
        ({"options": {"seed": 6}}, r"seed differs \(5 there, 6 now\)"),
        ({"options": {"noise": "gaussian"}}, r"noise differs \(rademacher there, gaussian now\)"),
        ({"options": {"clip": 1.0}}, r"rule differs"),
        ({"estimator": SPSA(2)}, r"estimator differs .*'queries': 1.*'queries': 2"),
        ({"dtype": torch.bfloat16}, r"parameters differs"),
        ({"norm": True}, r"parameters differs"),
        ({"groups": True}, r"parameters differs"),
        ({"weights": "inplace"}, r"weights='exact' there and are with 'inplace' now"),
    ],
)
def test_a_run_with_other_settings_begins_anew_and_says_what_differs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    Loop(Setup(), tmp_path).run((4, 1))
    before = (tmp_path / "trajectory.zolog").read_bytes()
    other = Setup().but(**changes)
    with pytest.raises(ValueError, match=rf"resume=True, but the run in .* can't be continued: .*{message}"):
        Loop(other, tmp_path).begin(True)
    assert (tmp_path / "trajectory.zolog").read_bytes() == before
    with pytest.warns(ZOWarning, match=rf"A new step log begins in .*{message}"):
        loop = Loop(other, tmp_path).run()
    assert (tmp_path / "trajectory-001.zolog").read_bytes() == before
    assert equal(loop.state(), reference(other, tmp_path).state())


def test_copies_and_exact_weights_continue_each_other(tmp_path: Path) -> None:
    Loop(Setup("copy"), tmp_path / "run").run((4, 1))
    assert equal(Loop(Setup("exact"), tmp_path / "run", seed=8).run().state(), reference(Setup(), tmp_path).state())


def test_a_finished_run_is_not_continued_by_itself(tmp_path: Path) -> None:
    Loop(Setup(), tmp_path).run()
    with pytest.warns(ZOWarning, match="the old one is kept, because the run of the old one ended by itself after 9 steps"):
        again = Loop(Setup(), tmp_path, seed=3).run()
    assert (again.log.recalled, logs(tmp_path)) == (0, ["trajectory-001.zolog", "trajectory.zolog"])
    assert again.calls > 0


@pytest.mark.parametrize("steps", [9, 12])
def test_a_finished_run_is_continued_where_that_is_asked_for(steps: int, tmp_path: Path) -> None:
    Loop(Setup(), tmp_path).run()
    again = Loop(Setup(steps=steps), tmp_path, seed=3).run(resume=True)
    assert (again.log.recalled, logs(tmp_path)) == (9, ["trajectory.zolog"])
    assert equal(again.state(), reference(Setup(steps=steps), tmp_path / "other").state())
    end = read_log(again.log.path).end
    assert end is not None
    assert end.step == steps
    assert replay(load_base(next(tmp_path.glob("base-*"))), again.log.path) == steps


def test_a_finished_run_goes_on_from_its_end(tmp_path: Path) -> None:
    loop = Loop(Setup(), tmp_path).run()
    loop.begin(True).windows(9, 12)
    loop.end()
    assert logs(tmp_path) == ["trajectory.zolog"]
    assert equal(loop.state(), reference(Setup(steps=12), tmp_path / "other").state())
    assert replay(load_base(next(tmp_path.glob("base-*"))), loop.log.path) == 12


def test_false_always_begins_anew(tmp_path: Path) -> None:
    for count in range(3):
        Loop(Setup(), tmp_path).run((4, 1), resume=False)
        assert len(logs(tmp_path)) == count + 1


def test_false_does_not_read_the_old_log_and_true_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume=True.*there is no log in it.*resume='auto'"):
        Loop(Setup(), tmp_path).begin(True)
    assert not logs(tmp_path)
    (tmp_path / "trajectory.zolog").write_bytes(b"something else")
    Loop(Setup(), tmp_path).run(resume=False)
    assert (tmp_path / "trajectory-001.zolog").read_bytes() == b"something else"
    with pytest.raises(ValueError, match="Invalid resume: 'yes'"):
        Loop(Setup(), tmp_path).begin("yes")


@pytest.mark.parametrize("same", [True, False])
def test_without_a_base_the_script_makes_the_same_weights_or_a_new_log_begins(same: bool, tmp_path: Path) -> None:
    Loop(Setup(), tmp_path / "run").run((4, 1), save_base=False)
    assert not list((tmp_path / "run").glob("base-*"))
    again = Loop(Setup(), tmp_path / "run", seed=1 if same else 2)
    if same:
        assert equal(again.run(save_base=False).state(), reference(Setup(), tmp_path).state())
        return
    with pytest.warns(ZOWarning, match="the weights are not those of that run after 0 steps, and it has no file of them"):
        again.run(save_base=False)


def test_a_resume_from_a_checkpoint_recalls_what_came_after_it(tmp_path: Path) -> None:
    whole = reference(Setup(), tmp_path)
    loop = Loop(Setup(), tmp_path / "run").begin()
    loop.windows(stop=3)
    loop.log.mark(loop.optimizer)
    saved, weights = loop.optimizer.state_dict(), {k: v.clone() for k, v in loop.net.state_dict().items()}
    loop.windows(3, 6)
    loop.close()
    again = Loop(Setup(), tmp_path / "run", seed=4)
    again.net.load_state_dict(weights)
    again.optimizer.load_state_dict(saved)
    again.begin(True)
    assert again.log.behind == 3
    again.windows(3)
    assert equal(again.end().state(), whole.state())
    other = Loop(Setup(), tmp_path / "run", seed=4)
    other.optimizer.steps = 12
    with pytest.raises(ValueError, match="it holds the steps 0 to 9, and this run begins at step 12"):
        other.begin(True)


def test_a_log_after_a_checkpoint_without_a_mark_is_not_trusted(tmp_path: Path) -> None:
    Loop(Setup(), tmp_path).run((6, 1))
    other = Loop(Setup(), tmp_path, seed=4)
    other.optimizer.steps = 3
    with pytest.raises(ValueError, match="the weights are not those of that run after 3 steps"):
        other.begin(True)


@pytest.mark.parametrize("resume", ["auto", False])
def test_a_log_in_use_is_neither_continued_nor_set_aside(resume: bool | str, tmp_path: Path) -> None:
    loop = Loop(Setup(), tmp_path).begin()
    with pytest.raises(BlockingIOError, match="Another run appends to this step log") as caught:
        Loop(Setup(), tmp_path).begin(resume)
    assert caught.value.filename == str(loop.log.path)
    loop.windows()
    loop.end()
    assert logs(tmp_path) == ["trajectory.zolog"]


def test_a_torn_tail_is_cut_off_and_other_damage_is_an_error(tmp_path: Path) -> None:
    whole = reference(Setup(), tmp_path)
    path = Loop(Setup(), tmp_path / "run").run((6, 1)).log.path
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    again = Loop(Setup(), tmp_path / "run", seed=2).run()
    assert (again.log.recalled, equal(again.state(), whole.state())) == (5, True)
    path.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    with pytest.raises(ValueError, match="is damaged at byte"):
        Loop(Setup(), tmp_path / "run").begin()
