"""An export: small, the same fine-tune as its log, and refused if a single byte is another."""

from __future__ import annotations

import errno
import json
import math
import struct
import tracemalloc
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import mean_square, mlp, regression, same, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from trajectory_tools import Recorder, made_up_segment, made_up_steps, trained_of

from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.trajectory import (
    End,
    FineTune,
    Log,
    LogError,
    Mark,
    Settings,
    StepRecord,
    apply,
    export,
    load,
    read_log,
    replay,
    trained_fingerprint,
    undo,
    verify,
)
from zo_lightning.engine.trajectory import columns as layout
from zo_lightning.engine.trajectory.export import decode, encode


def log_of(steps: list[StepRecord], **changes: Any) -> Log:
    segment = made_up_segment(steps[0].step, len(steps[0].settings), **changes)
    return Log(Path("made-up"), [segment, *steps], end_step=steps[-1].step + 1)


def small_export() -> bytes:
    steps = made_up_steps(9, 4)
    steps[3] = replace(steps[3], values=(math.nan, 1.0), skipped=True)
    return encode(export_of(log_of(steps)))


def export_of(log: Log) -> FineTune:
    with TemporaryDirectory() as folder:
        return export(log, Path(folder) / "export")


# ---- size and contents


def test_an_export_of_20_000_steps_takes_33_bytes_a_step(tmp_path: Path) -> None:
    """One query, two groups, an lr that changes at every step."""
    steps = made_up_steps(20_000)
    export(log_of(steps), tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert size <= 40 * 20_000
    assert size <= 33 * 20_000
    constant = [replace(step, settings=steps[0].settings) for step in steps]
    export(log_of(constant), tmp_path / "constant")
    assert (tmp_path / "constant").stat().st_size <= 17 * 20_000
    assert load(tmp_path / "file").steps == tuple(steps)


def test_an_export_is_a_safetensors_file(tmp_path: Path) -> None:
    steps = made_up_steps(5, 2)
    export(log_of(steps), tmp_path / "file")
    columns = load_file(tmp_path / "file")
    assert columns["values"].tolist() == [list(step.values) for step in steps]
    assert columns["lr"].tolist() == [[group.lr for group in step.settings] for step in steps]
    assert columns["eps"].tolist() == [[1e-3, 1e-3]]
    assert columns["eps_at"].tolist() == [0]
    assert columns["skipped"].tolist() == [0]


number = st.floats(min_value=1e-300, max_value=1e300)
rows = st.lists(st.builds(Settings, number | st.just(0.0), number, number), min_size=2, max_size=2).map(tuple)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=12),
    choice=st.lists(rows, min_size=1, max_size=3),
    picks=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    first=st.integers(0, 1 << 40),
)
def test_what_is_exported_comes_back(values: Any, choice: Any, picks: list[int], first: int) -> None:
    steps = [
        StepRecord(first + i, pair, choice[picks[i] % len(choice)], not all(map(math.isfinite, pair)), 1 + picks[i], b"", bool(picks[i]))
        for i, pair in enumerate(values)
    ]
    tune = export_of(log_of(steps))
    again = decode(encode(tune))
    assert repr(again) == repr(tune)  # a NaN is not equal to itself
    assert repr(again.steps) == repr(tuple(replace(step, micro_batches=1, traces=False) for step in steps))
    assert repr(again.segment) == repr(made_up_segment(first))


# ---- the fine-tune


def tuned(tmp_path: Path, weights: str = "exact") -> tuple[torch.nn.Module, Path]:
    model = mlp(dtype=torch.float32)
    optimizer = ZOOptimizer(model, lr=0.05, weights=weights, estimator=SPSA(2))
    recorder = Recorder(optimizer, tmp_path / "log")
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        recorder.step(mean_square(model, regression(torch.float32)))
    recorder.writer.append(End(5, trained_fingerprint(trained_of(optimizer))))
    recorder.writer.close()
    return model, tmp_path / "log"


def test_applying_an_export_gives_the_bits_of_training(tmp_path: Path) -> None:
    model, log = tuned(tmp_path)
    tune = export(log, tmp_path / "export")
    assert tune.segment.base is None
    again = mlp(dtype=torch.float32)
    assert tune.result == trained_fingerprint(trained_of(ZOOptimizer(model, lr=1.0)))
    assert apply(again, tmp_path / "export") == 5
    assert same(snapshot(again), snapshot(model))
    assert apply(again, tmp_path / "export") == 5  # it is applied already
    assert same(snapshot(again), snapshot(model))
    with pytest.raises(ValueError, match="in none of the states"):
        apply(mlp(dtype=torch.float32, seed=1), tmp_path / "export")
    assert export(log, tmp_path / "part", 3).steps == tune.steps[:3]
    assert load(tmp_path / "part").result == ""
    part = mlp(dtype=torch.float32)
    assert apply(part, tmp_path / "part") == 3
    assert not same(snapshot(part), snapshot(model))


def test_what_an_export_can_not_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    steps, path = made_up_steps(4), tmp_path / "export"
    with pytest.raises(ValueError, match=r'weights="inplace".*Share the log itself'):
        export(log_of(steps, residency="inplace"), path)
    log = log_of(steps)
    log.records.insert(3, made_up_segment(2))
    with pytest.raises(ValueError, match=r"2 segments: at step 2 the weights were changed.*needs its own base.*to_step=2"):
        export(log, path)
    assert len(export(log, path, 2).steps) == 2
    for to_step in (0, 5):
        with pytest.raises(ValueError, match=rf"Invalid to_step: {to_step}\. .*0 to 4"):
            export(log_of(steps), tmp_path / "other", to_step)
    steps[2] = made_up_steps(1, 2, groups=3)[0]
    with pytest.raises(ValueError, match="number of parameter groups changes"):
        export(log_of(steps), tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "export"
    export(log_of(made_up_steps(3)), path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="export was not written: No space left on device"):
        export(log_of(made_up_steps(4)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


# ---- damage


def refused(data: bytes) -> bool:
    """With a ValueError, and no other exception."""
    try:
        decode(data)
    except ValueError:
        return True
    return False


def test_no_changed_byte_is_accepted(tmp_path: Path) -> None:
    whole = small_export()
    path = tmp_path / "export"
    path.write_bytes(whole)
    assert len(load(path).steps) == 9
    for place in range(len(whole)):
        for flip in (1, 0x20, 0xFF):
            assert refused(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
    for size in range(len(whole)):
        assert refused(whole[:size])
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with pytest.raises(LogError, match="contents do not match their digest"):
        load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(LogError, match=r"export is not an export of a step log, or is damaged: .*Get the file again"):
        load(path)


def forged(columns: dict[str, Any] | None = None, metadata: dict[str, str] | None = None, remove: str = "") -> bytes:
    """An export with other contents and a right digest."""
    everything, about = layout.decode(small_export())
    everything = {**everything, **(columns or {})}
    everything.pop(remove, None)
    about = {**about, **(metadata or {})}
    about.pop("digest", None)
    about.pop(remove, None)
    digest = blake2b(layout.encode(everything, about), digest_size=32, person=b"zo.export").hexdigest()
    return layout.encode(everything, {**about, "digest": digest})


SEGMENT = layout.decode(small_export())[1]["segment"]


@pytest.mark.parametrize(
    "data",
    [
        *(forged(remove=name) for name in ("values", "skipped", "lr", "eps", "eps_at", "weight_decay", "segment", "steps", "result")),
        forged({"more": np.zeros(3)}),
        forged({"skipped": np.zeros(1, np.uint8)}),
        forged({"skipped": np.zeros(2)}),
        forged({"skipped": np.array([0, 0], np.uint8)}),  # the step with NaN is not skipped
        forged({"skipped": np.array([8, 2], np.uint8)}),  # a bit beyond the last step
        forged({"values": np.zeros(18)}),
        forged({"values": np.zeros((0, 2))}),
        forged({"values": np.zeros((9, 0))}),
        forged({"values": np.zeros((9, 2), np.uint8)}),
        forged({"lr": np.full((8, 2), 0.1)}),
        forged({"lr": np.full((9, 1), 0.1)}),
        forged({"lr": np.full((9, 2), -0.1)}),
        forged({"lr": np.full((9, 2), math.nan)}),
        forged({"lr": np.full((9, 2), 0.1)}),  # runs would be smaller
        forged({"lr": np.zeros((0, 2))}),
        forged({"eps": np.zeros((1, 2))}),
        forged({"eps_at": np.array([1], np.uint32)}),
        forged({"eps_at": np.array([0, 1], np.uint32)}),
        forged({"eps_at": np.zeros((0,), np.uint32)}),
        forged({"eps_at": np.array([[0]], np.uint32)}),
        forged({"eps_at": np.zeros(1)}),
        forged({"eps": np.full((2, 2), 0.1), "eps_at": np.array([0, 9], np.uint32)}),
        forged({"eps": np.full((3, 2), 0.1), "eps_at": np.array([0, 5, 5], np.uint32)}),
        forged({"eps": np.full((2, 2), 0.1), "eps_at": np.array([0, 5], np.uint32)}),  # nothing changes at 5
        forged(metadata={"segment": SEGMENT.replace('"group":1', '"group":2')}),
        forged(metadata={"segment": SEGMENT.replace("exact", "inplace")}),
        forged(metadata={"segment": "[" * 100_000}),
        forged(metadata={"segment": "\xe9"}),
        forged(metadata={"steps": "08"}),
        forged(metadata={"result": "0"}),
        forged(metadata={"version": "2"}),
        forged(metadata={"more": ""}),
    ],
)
def test_a_forged_export_with_a_right_digest_is_a_value_error(data: bytes) -> None:
    assert refused(data)
    assert decode(forged()).segment == decode(small_export()).segment


def header(text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 1 << 63),
        header("[" * 100_000),
        header("{}"),
        header('{"__metadata__":{"a":1}}'),
        header('{"__metadata__":{},"a":1}'),
        header('{"__metadata__":{},"a":{"data_offsets":[0,8],"dtype":["F64"],"shape":[1]}}', bytes(8)),
        header('{"__metadata__":{},"a":{"data_offsets":[0,-8],"dtype":"F64","shape":[1]}}', bytes(8)),
        header('{"__metadata__":{},"a":{"data_offsets":[0,8],"dtype":"F64","shape":[true]}}', bytes(8)),
        header('{"__metadata__":{},"a":{"data_offsets":[0,8],"dtype":"F64","shape":[1e0]}}', bytes(8)),
        header('{"__metadata__":{},"a":{"data_offsets":[0,0],"dtype":"F64","shape":[0,1099511627775]}}'),
        header('{"__metadata__":{},"a":{"data_offsets":[0,8],"dtype":"F64","shape":[1099511627775,1099511627775]}}', bytes(8)),
        header('{"__metadata__":{},"a":{"data_offsets":[0,8],"dtype":"F64","shape":' + "[" * 50 + "]" * 50 + "}}", bytes(8)),
    ],
)
def test_a_header_that_can_not_be_is_a_log_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "export").write_bytes(data)
    with pytest.raises(LogError, match="is not an export"):
        load(tmp_path / "export")


def test_a_small_file_can_not_ask_for_much_memory() -> None:
    """Columns that share their bytes, and a wide row of settings that holds for many steps."""
    size = 1 << 16
    entries = {f"{i:04d}": {"data_offsets": [0, size], "dtype": "U8", "shape": [size]} for i in range(2000)}
    shared = header(json.dumps({"__metadata__": {}, **entries}), bytes(size))
    wide = {name: np.full((1, 2000), 0.1) for name in ("lr", "eps", "weight_decay")}
    at = {f"{name}_at": np.zeros(1, np.uint32) for name in wide}
    many = forged({"values": np.zeros((2000, 2)), "skipped": np.zeros(250, np.uint8), **wide, **at}, {"steps": "2000"})
    tracemalloc.start()
    with pytest.raises(ValueError, match="overlap"):
        decode(shared)
    assert len(decode(many).steps) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # 2,000 columns are 128 MB, 2,000 times 2,000 settings 96 MB


def test_a_mark_of_the_last_step_is_the_result(tmp_path: Path) -> None:
    log = log_of(made_up_steps(3))
    log.records += [Mark(3, "ab" * 32)]
    assert export(log, tmp_path / "a").result == "ab" * 32
    assert load(tmp_path / "a").result == "ab" * 32


def test_an_export_where_a_log_belongs_and_the_other_way_round(tmp_path: Path) -> None:
    model = mlp()
    recorder = Recorder(ZOOptimizer(model, lr=0.05), tmp_path / "log")
    recorder.step(mean_square(model, regression()))
    recorder.writer.close()
    export(tmp_path / "log", tmp_path / "shared")
    base, before = tmp_path / "log.base.safetensors", snapshot(model)
    message = r"shared is an export .*not the log itself. Give its path to `apply`.*or to `load`.*zo_lightning.engine.trajectory"
    for call in (read_log, lambda path: replay(model, path), lambda path: verify(model, path), lambda path: undo(model, path, 0, base)):
        with pytest.raises(LogError, match=message):
            call(tmp_path / "shared")
    with pytest.raises(LogError, match=r"base.safetensors is not a step log"):
        read_log(base)
    for call in (load, lambda path: apply(model, path)):
        with pytest.raises(LogError, match=r"log is a step log, not an export of one. Make its steps with `replay`"):
            call(tmp_path / "log")
    assert same(snapshot(model), before)
