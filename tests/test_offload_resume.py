"""A killed run goes on from the folder of `Offload(folder)`: each parcel from its own stamp, to the weights of the uninterrupted run."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from keeper_tools import Loop, Setup, equal

from zo_lightning.engine import SPSA
from zo_lightning.engine.masks import Mask, Sensitive
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.offload.disk import DiskTier, Slot
from zo_lightning.engine.offload.due import Due
from zo_lightning.engine.offload.mapped import PAGE
from zo_lightning.engine.offload.stamps import Moment, Stamp, decode
from zo_lightning.engine.residency import Offload, Offloaded
from zo_lightning.engine.trajectory import read_log, writer
from zo_lightning.engine.trajectory.log import Entry, History, scan

pytestmark = pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning")
KILLED = 6
"""Steps of the run that is killed; all of them are in the log, and the last update is not in the weights."""


def residency_of(loop: Loop) -> Offloaded:
    residency = loop.optimizer.residency
    assert isinstance(residency, Offloaded)
    return residency


class Run:
    """A run that is killed, and continued."""

    def __init__(self, tmp_path: Path, setup: Setup | None = None, **options: Any) -> None:
        self.folder, self.tier = tmp_path / "run", tmp_path / "tier"
        self.setup = (setup or Setup()).but(weights=Offload(str(self.tier)))
        self.options = options
        self.exact = Loop((setup or Setup()).but(weights="exact"), tmp_path / "whole").run()

    def killed(self, steps: int = KILLED, partly: bool = False, **between: Any) -> Loop:
        """A process dies after so many steps: nothing is flushed. `partly`: one parcel already has the last update."""
        loop = Loop(self.setup, self.folder, **between).begin(**self.options)
        loop.windows(stop=steps)
        if partly:
            residency = residency_of(loop)
            with residency._used(list(residency.parcels)[:1]):
                pass
        self.die(loop)
        return loop

    def die(self, loop: Loop) -> None:
        """What was being written comes to its end, or fails, in a thread that would otherwise go on with closed files."""
        loop.close()
        with suppress(OSError):
            residency_of(loop)._place.settle()
        residency_of(loop).tier.close()

    def again(self, seed: int = 1, resume: Any = "auto", **between: Any) -> Loop:
        """The script is started again; another seed is a model with other weights."""
        loop = Loop(self.setup, self.folder, seed=seed, **between).begin(resume, **self.options)
        loop.windows()
        return loop.end()

    def slots(self) -> dict[str, tuple[Path, Stamp]]:
        """By parcel the newest slot."""
        found: dict[str, tuple[Path, Stamp]] = {}
        for path in sorted(self.tier.glob("slot-*.bin")):
            stamp = decode(path.read_bytes()[-PAGE:])
            if stamp is not None and (stamp.parcel not in found or found[stamp.parcel][1].moment.step < stamp.moment.step):
                found[stamp.parcel] = path, stamp
        return found

    def spoil(self, path: Path, at: int = 5) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parcels that were taken from their slots."""
    found: list[str] = []
    take = DiskTier.take

    def noted(self: DiskTier, parcel: Any, slot: Slot) -> None:
        found.append(parcel.name)
        take(self, parcel, slot)

    monkeypatch.setattr(DiskTier, "take", noted)
    return found


SETUPS: dict[str, Setup] = {
    "plain": Setup(),
    "bfloat16": Setup(dtype=torch.bfloat16),
    "float16, accumulated": Setup(dtype=torch.float16, micro=3),
    "queries, groups, a schedule": Setup(estimator=SPSA(2), groups=True, schedule=True),
    "infinite windows": Setup(micro=2, infinite=(3, 5)),
    "gaussian": Setup(options={"noise": "gaussian"}),
    "small weights": Setup(options={"mask": Mask("small_weights", 0.3, refresh=2)}),
    "lists": Setup(options={"mask": Mask("small_weights", 0.05, refresh=4)}, dtype=torch.bfloat16),
    "large weights, kept": Setup(options={"mask": Mask("large_weights", 0.3)}),
    "lots": Setup(options={"mask": Mask("random", 0.3, refresh=2)}),
    "bits": Setup(options={"mask": Mask("principal_weights", 0.3, refresh=4, exclude=["*bias"])}),
    "blocks": Setup(options={"mask": Mask("half_layers", refresh=2)}),
    "measured": Setup(options={"mask": Mask(Sensitive(steps=2), 0.3)}),
}


@pytest.mark.parametrize("given", [True, False], ids=["the same weights", "other weights, no base"])
@pytest.mark.parametrize("kind", SETUPS)
def test_a_run_goes_on_from_its_stamps(kind: str, given: bool, tmp_path: Path, taken: list[str]) -> None:
    run = Run(tmp_path, SETUPS[kind], save_base=given)
    run.killed(partly=True)
    again = run.again(seed=1 if given else 7)
    assert equal(again.state(), run.exact.state())
    assert len(taken) == 2
    assert again.log.recalled == KILLED


def test_nothing_is_written_or_read_while_steps_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.killed(partly=True)
    stamps = {name: stamp.moment.step for name, (_, stamp) in run.slots().items()}
    assert sorted(stamps.values()) == [KILLED - 1, KILLED]
    loop = Loop(run.setup, run.folder, seed=7).begin()
    before = {path: path.read_bytes() for path in run.tier.glob("slot-*.bin")}
    loop.windows(stop=KILLED)
    assert residency_of(loop).traffic.read == 0
    assert before == {path: path.read_bytes() for path in run.tier.glob("slot-*.bin")}
    due = {parcel.name: [one.moment.step for one in some] for parcel, some in residency_of(loop)._due.items()}
    assert due == {name: [KILLED] for name, step in stamps.items() if step < KILLED}
    loop.windows(KILLED)
    assert residency_of(loop)._ahead is None
    assert equal(loop.end().state(), run.exact.state())


def test_a_run_that_is_killed_again_and_again(tmp_path: Path, taken: list[str]) -> None:
    run = Run(tmp_path, Setup(options={"mask": Mask("small_weights", 0.3, refresh=2)}), save_base=False)
    run.killed(1, partly=True)
    for steps, partly in ((3, True), (3, False), (4, False), (8, True)):
        loop = Loop(run.setup, run.folder, seed=steps).begin(save_base=False)
        loop.windows(stop=steps)
        if partly:
            with residency_of(loop)._used(list(residency_of(loop).parcels)[-1:]):
                pass
        run.die(loop)
    assert equal(run.again(seed=9).state(), run.exact.state())
    assert len(taken) == 10


# ---- somebody reads the weights of steps that are made again


def evaluated(seen: list[float]) -> Callable[[Loop], None]:
    def look(loop: Loop) -> None:
        with torch.no_grad():
            seen.append(float(loop.net.eval()(torch.ones(3, 4, dtype=loop.setup.dtype)).sum()))
            loop.net.train()

    return look


def saved(seen: list[Any]) -> Callable[[Loop], None]:
    return lambda loop: seen.append({name: tensor.clone() for name, tensor in loop.net.state_dict().items()})


@pytest.mark.parametrize("read", [evaluated, saved])
@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize("kind", ["plain", "bfloat16", "small weights", "measured"])
def test_weights_of_those_steps(kind: str, seed: int, read: Any, tmp_path: Path, taken: list[str]) -> None:
    """They are made from the weights that the run began with, given or of the base file."""
    run = Run(tmp_path, SETUPS[kind])
    expected: list[Any] = []
    Loop(run.setup.but(weights="exact"), tmp_path / "other", between=dict.fromkeys((0, 2, 4, 7), read(expected))).run()
    run.killed(partly=True)
    found: list[Any] = []
    again = run.again(seed, between=dict.fromkeys((2, 4, 7), read(found)))
    assert equal(found, expected[1:])
    assert equal(again.state(), run.exact.state())
    assert len(taken) == 2


def test_they_are_gone_without_a_base(tmp_path: Path) -> None:
    run = Run(tmp_path, save_base=False)
    run.killed()
    loop = Loop(run.setup, run.folder, seed=7, between={3: evaluated([])}).begin(save_base=False)
    with pytest.raises(ValueError, match=r"Something reads the weights while the steps from 0 on are made again .*of later steps"):
        loop.windows()
    run.die(loop)
    assert equal(run.again(seed=8).state(), run.exact.state())


TRACES = {"buffers": Setup(norm=True), "idle windows": Setup(micro=2, idle=(1, 4), partly=(2,), infinite=(3,))}


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize("kind", TRACES)
def test_evaluations_that_leave_traces(kind: str, seed: int, tmp_path: Path) -> None:
    """The first evaluation of each step is made again, on the weights of that step."""
    run = Run(tmp_path, TRACES[kind])
    run.killed(partly=True)
    assert equal(run.again(seed).state(), run.exact.state())


def test_weights_that_something_else_changed(tmp_path: Path) -> None:
    def clamp(loop: Loop) -> None:
        with torch.no_grad(), loop.optimizer.settled():
            loop.net[0].weight.clamp_(-0.1, 0.1)

    run = Run(tmp_path)
    with pytest.warns(ZOWarning, match="changed by something else"):
        whole = Loop(run.setup.but(weights="exact"), tmp_path / "other", between={4: clamp}).run()
    run.killed(partly=True, between={4: clamp})
    assert equal(run.again(7, between={4: clamp}).state(), whole.state())


# ---- what can be wrong with the files


def test_a_slot_that_is_torn(tmp_path: Path, taken: list[str]) -> None:
    run = Run(tmp_path)
    run.killed()
    _, second = run.slots().values()
    for path in run.tier.glob("slot-*.bin"):
        if path != second[0]:
            run.spoil(path)
    with pytest.warns(ZOWarning, match=r"slots are torn or damaged: 1 of 2 parts of the weights are made again from those after 0 steps"):
        assert equal(run.again().state(), run.exact.state())
    assert taken == [second[1].parcel]


def test_an_older_slot_takes_its_place(tmp_path: Path, taken: list[str]) -> None:
    """The spare slot has what a parcel was before."""
    run = Run(tmp_path, save_base=False)
    run.killed()
    slots = [(path, decode(path.read_bytes()[-PAGE:])) for path in run.tier.glob("slot-*.bin")]
    assert len(slots) == 3
    twice = [stamp.parcel for _, stamp in slots if stamp is not None]
    parcel = next(name for name in twice if twice.count(name) == 2)
    path, stamp = run.slots()[parcel]
    run.spoil(path)
    assert run.slots()[parcel][1] == stamp
    assert equal(run.again(7).state(), run.exact.state())
    assert len(taken) == 2


def test_all_slots_are_torn_and_the_base_is_there(tmp_path: Path, taken: list[str]) -> None:
    run = Run(tmp_path)
    run.killed()
    for path in run.tier.glob("slot-*.bin"):
        run.spoil(path)
    assert equal(run.again(7).state(), run.exact.state())
    assert taken == []


DAMAGE: dict[str, Callable[[Run], object]] = {
    "torn": lambda run: [run.spoil(path) for path in run.tier.glob("slot-0000[12].bin")],
    "cut off": lambda run: [os.truncate(path, 100) for path in run.tier.glob("slot-0000[12].bin")],
    "no tensors that stay in memory": lambda run: [path.unlink() for path in run.tier.glob("resident-*")],
    "others that stay in memory": lambda run: [run.spoil(path, -1) for path in run.tier.glob("resident-*")],
    "tensors of a later step": lambda run: _later(run),
    "which run is not known": lambda run: (run.tier / "run.json").write_text("{"),
    "a record of the log is lost": lambda run: os.truncate(run.folder / "trajectory.zolog", _before_last(run, 2)),
}


def _later(run: Run) -> None:
    words = json.loads((run.tier / "run.json").read_text())
    step = 3
    words.update(step=step, log=read_log(run.folder / "trajectory.zolog").moments[step])
    (run.tier / "run.json").write_text(json.dumps(words))


def _before_last(run: Run, count: int) -> int:
    """The size of the log without its last steps."""
    ends = [entry.end for entry in scan(run.folder / "trajectory.zolog", History()) if isinstance(entry, Entry)]
    return ends[-1 - count]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_without_a_base_is_an_error(kind: str, tmp_path: Path) -> None:
    """And no other weights; with the weights that the run began with it goes on all the same."""
    run = Run(tmp_path, save_base=False)
    run.killed()
    DAMAGE[kind](run)
    with pytest.raises(ValueError, match=r"has its weights in .*can't go on from there|the weights are not those of that run") as error:
        Loop(run.setup, run.folder, seed=7).begin(resume=True, save_base=False)
    del error
    gc.collect()
    with pytest.warns(ZOWarning):
        assert equal(run.again(1).state(), run.exact.state())


def test_a_run_without_any_weights_is_not_begun_anew_by_itself(tmp_path: Path) -> None:
    """What is left of the old one would be written over."""
    run = Run(tmp_path, save_base=False)
    run.killed()
    for path in run.tier.glob("slot-*.bin"):
        run.spoil(path)
    before = {path.name: path.read_bytes() for path in run.tier.iterdir()}
    loop = Loop(run.setup, run.folder, seed=7)
    with pytest.raises(ValueError, match=r"has its weights in .*can't go on from there: .*begin anew with resume=False"):
        loop.begin(save_base=False)
    assert before == {path.name: path.read_bytes() for path in run.tier.iterdir()}
    run.die(loop)
    with pytest.warns(ZOWarning):
        assert equal(run.again(1).state(), run.exact.state())


FOLDERS: dict[str, tuple[Callable[[Run], object], str]] = {
    "another model": (lambda run: _edit(run, lambda d: d["parcels"][0]["tensors"][0].update(name="x")), r"'0.weight' is missing there"),
    "another shape": (lambda run: _edit(run, lambda d: d["parcels"][0]["tensors"][0].update(shape=[8, 9])), r"of shape \(8, 9\) there"),
    "another dtype": (lambda run: _edit(run, lambda d: d["parcels"][0]["tensors"][0].update(dtype="float16")), "is float16 of shape"),
    "another version": (lambda run: _edit(run, lambda d: d.update(version=77)), "its files are of version 77"),
    "no list": (lambda run: _edit(run, lambda d: d.update(parcels=3)), "does not describe weights"),
    "no JSON": (lambda run: (run.tier / "tier.json").write_text("{"), "does not describe weights"),
}


def _edit(run: Run, change: Callable[[dict[str, Any]], object]) -> None:
    path = run.tier / "tier.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_model(kind: str, tmp_path: Path) -> None:
    change, message = FOLDERS[kind]
    run = Run(tmp_path)
    run.killed()
    change(run)
    before = {path: path.read_bytes() for path in run.tier.iterdir()}
    for _ in range(2):  # and the lock is not left behind
        with pytest.raises(ValueError, match=message + r".*Give this run another folder, or remove that one"):
            Loop(run.setup, run.folder)
    assert before == {path: path.read_bytes() for path in run.tier.iterdir()}


def test_the_log_of_another_run(tmp_path: Path, taken: list[str]) -> None:
    """Its stamps are of places that this log does not have."""
    run, other = Run(tmp_path), Run(tmp_path / "b", Setup(options={"seed": 6}))
    run.killed()
    other.killed()
    other.tier = run.tier
    other.setup = other.setup.but(weights=Offload(str(run.tier)))
    assert equal(other.again().state(), other.exact.state())
    assert taken == []


def test_another_mask(tmp_path: Path) -> None:
    """What the log says of masks is compared, not taken."""
    run = Run(tmp_path, SETUPS["large weights, kept"])
    run.killed()
    run.setup = run.setup.but(options={"mask": Mask("large_weights", 0.5)})
    with pytest.raises(ValueError, match="the mask is not the one that the run in"):
        run.again()


# ---- a new run in an old folder


def test_a_run_without_a_log_begins_anew(tmp_path: Path, taken: list[str]) -> None:
    run = Run(tmp_path)
    run.killed()
    loop = Loop(run.setup, run.folder)
    loop.windows()
    assert equal(loop.state(), run.exact.state())
    assert taken == []
    assert not residency_of(loop).tier.undecided
    residency_of(loop).tier.close()
    assert equal(run.again(7).state(), run.exact.state())  # whose slots it has written over
    assert taken == []


def test_a_run_that_wants_to_begin_anew_does(tmp_path: Path, taken: list[str]) -> None:
    run = Run(tmp_path)
    run.killed()
    assert equal(run.again(resume=False).state(), run.exact.state())
    assert taken == []


def test_looking_at_the_model_takes_nothing_away(tmp_path: Path, taken: list[str]) -> None:
    """A sanity check comes before the log is opened, and sees the weights that were given."""
    run = Run(tmp_path, save_base=False)
    run.killed()
    seen: list[float] = []
    loop = Loop(run.setup, run.folder, seed=7)
    evaluated(seen)(loop)
    with torch.no_grad():
        other = Loop(run.setup.but(weights="exact"), tmp_path / "x", seed=7)
        assert seen == [float(other.net.eval()(torch.ones(3, 4)).sum())]
    loop.begin(save_base=False)
    loop.windows()
    assert equal(loop.end().state(), run.exact.state())
    assert len(taken) == 2


def test_a_run_that_ended_goes_on(tmp_path: Path, taken: list[str]) -> None:
    run = Run(tmp_path, save_base=False)
    loop = Loop(run.setup, run.folder).run(save_base=False)
    residency_of(loop).tier.close()
    assert equal(run.again(7, resume=True).state(), run.exact.state())
    assert len(taken) == 2


# ---- a write that does not come to its end


@pytest.mark.parametrize("where", ["change", "stamp", "remap"])
def test_ctrl_c_in_the_middle_of_a_write_back(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, save_base=False)
    owner, name = {"change": (Due, "make"), "stamp": (Slot, "stamp"), "remap": (DiskTier, "_put")}[where]
    plain, calls = getattr(owner, name), iter(range(10**6))

    def interrupted(*given: Any, **more: Any) -> Any:
        if next(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return plain(*given, **more)

    loop = Loop(run.setup, run.folder).begin(save_base=False)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.windows()
    monkeypatch.undo()
    assert next(calls) > 7
    steps = loop.optimizer.steps
    assert steps < 9
    run.die(loop)
    assert equal(run.again(7).state(), run.exact.state())


@pytest.mark.parametrize("broken", ["os.pwrite", "os.pwritev"])
@pytest.mark.parametrize("goes_on", [False, True], ids=["started again", "in the same process"])
def test_a_disk_that_fails_in_mid_run(broken: str, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops with the weights of the last step, and with the log; it goes on when there is room again."""
    run = Run(tmp_path, save_base=False)
    loop = Loop(run.setup, run.folder).begin(save_base=False)
    loop.windows(stop=4)

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken.removeprefix("os."), full)
    with pytest.raises(OSError, match="No space left"):
        loop.windows(4)
    with pytest.raises(OSError, match="No space left"):
        loop.net.state_dict()  # never weights that lack an update
    monkeypatch.undo()
    steps = loop.optimizer.steps
    assert steps < 9
    assert read_log(run.folder / "trajectory.zolog").end_step == steps
    expected = Loop(run.setup.but(weights="exact", steps=steps), tmp_path / "before").run()
    if goes_on:
        assert equal(dict(loop.net.state_dict()), dict(expected.net.state_dict()))
        loop.optimizer.discard()
        loop.windows(steps)
        assert equal(loop.end().state()["tensors"], run.exact.state()["tensors"])
    else:
        run.die(loop)
        assert equal(run.again(7).state(), run.exact.state())


def test_a_log_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, save_base=False)
    loop = Loop(run.setup, run.folder).begin(save_base=False)
    loop.windows(stop=4)

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", full)
    with pytest.raises(OSError, match="Step 4 was not written to the step log"):
        loop.windows(4)
    monkeypatch.undo()
    assert equal(dict(loop.net.state_dict()), dict(Loop(run.setup.but(weights="exact", steps=4), tmp_path / "four").run().net.state_dict()))
    run.die(loop)
    assert equal(run.again(7).state(), run.exact.state())


def test_stamps_of_steps_that_no_log_has(tmp_path: Path, taken: list[str]) -> None:
    """The log was closed, and the loop went on: nothing of that is taken for the run of the log."""
    run = Run(tmp_path)
    loop = Loop(run.setup, run.folder).begin()
    loop.windows(stop=4)
    loop.close()
    loop.windows(4, 6)
    residency_of(loop).flush()
    residency_of(loop).tier.close()
    assert {stamp.moment for _, stamp in run.slots().values()} == {Moment(6)}
    assert equal(run.again(7).state(), run.exact.state())
