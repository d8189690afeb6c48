"""The log's file: what is written comes back, a torn end is cut off, any other damage is told with its place."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectory_tools import F, made_up_segment, made_up_steps, small_log, written

from zo_lightning.engine.trajectory import (
    Checkpoint,
    End,
    LogError,
    LogWriter,
    Mark,
    Segment,
    Settings,
    StepRecord,
    read_log,
)
from zo_lightning.engine.trajectory.frames import MAGIC
from zo_lightning.engine.trajectory.records import Record

# ---- what is written comes back

finite = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
groups = st.builds(Settings, finite, finite.filter(bool), finite)


@st.composite
def histories(draw: st.DrawFn) -> list[Record]:
    """A segment or two with steps, marks and checkpoints in an order that can be."""
    records: list[Record] = []
    step = draw(st.integers(0, 1 << 40))
    for _ in range(draw(st.integers(1, 2))):
        number, points = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        residency = draw(st.sampled_from(["exact", "inplace"]))
        records.append(made_up_segment(step, number, residency=residency, seed=draw(st.integers(0, (1 << 64) - 1))))
        every = [tuple(draw(groups) for _ in range(number)) for _ in range(2)]
        for _ in range(draw(st.integers(0, 4))):
            values = tuple(draw(st.lists(st.floats(), min_size=points, max_size=points)))
            skipped = not all(map(math.isfinite, values))
            moves = b"" if residency == "exact" else bytes(draw(st.lists(st.sampled_from([0, 254, 255])))) + b"\xff"
            step_settings = draw(st.sampled_from(every))
            batches = draw(st.integers(1, 1 << 31))
            records.append(StepRecord(step, values, step_settings, skipped, batches, moves, draw(st.booleans())))
            step += 1
        records += draw(st.lists(st.sampled_from([Mark(step, F), Checkpoint(step, "päth", "lightning"), End(step, F)]), max_size=2))
    return records


@settings(max_examples=100, deadline=None)
@given(records=histories())
def test_what_is_written_comes_back(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    written(path, records)
    log = read_log(path)
    assert repr(log.records) == repr(records)  # a NaN is not equal to itself
    assert log.torn_bytes == 0
    last = [record for record in records if isinstance(record, (StepRecord, Segment, End))][-1]
    assert log.end == (last if isinstance(last, End) else None)


def test_a_log_knows_its_parts(tmp_path: Path) -> None:
    records = small_log()
    path = tmp_path / "log"
    written(path, records)
    log = read_log(path)
    assert log.records == records
    assert log.segments == records[:1]
    assert [step.step for step in log.steps] == [0, 1, 2]
    assert log.checkpoints == [records[4]]
    assert log.end == records[-1]
    assert log.end_step == 3
    only = read_log(path, keep=lambda record: isinstance(record, Mark))
    assert (only.records, only.end_step, only.end) == ([records[3]], 3, records[-1])
    with LogWriter.open(path) as writer:
        writer.append(made_up_steps(1, 3)[0])
    assert read_log(path).end is None


def test_a_reopened_log_has_the_bytes_of_one_that_never_was_closed(tmp_path: Path) -> None:
    records = small_log()
    whole = written(tmp_path / "whole", records)
    for cut in range(1, len(records)):
        path = tmp_path / f"{cut}"
        written(path, records[:cut])
        with LogWriter.open(path) as writer:
            for record in records[cut:]:
                writer.append(record)
        assert path.read_bytes() == whole


def test_a_step_of_one_query_takes_fifty_bytes(tmp_path: Path) -> None:
    sizes = [len(written(tmp_path / f"{count}", [made_up_segment(), *made_up_steps(count)])) for count in (10, 110)]
    assert (sizes[1] - sizes[0]) / 100 <= 64  # lr of two groups changes at every step
    constant = [replace(step, settings=made_up_steps(1)[0].settings) for step in made_up_steps(110)]
    assert (len(written(tmp_path / "constant", [made_up_segment(), *constant])) - sizes[0]) / 100 <= 43


# ---- a torn end


def test_a_torn_last_record_is_cut_off_wherever_it_tears(tmp_path: Path) -> None:
    records = small_log()
    whole, before = written(tmp_path / "whole", records), written(tmp_path / "before", records[:-1])
    path = tmp_path / "torn"
    for size in range(len(before), len(whole)):
        for torn in (whole[:size], whole[:size] + bytes(len(whole) - size), whole[:size] + bytes(5000)):
            if torn == whole:
                continue
            path.write_bytes(torn)
            log = read_log(path)
            assert log.records == records[:-1]
            assert log.torn_bytes == len(torn) - len(before)
        with LogWriter.open(path) as writer:
            assert writer.torn_bytes == len(torn) - len(before)
            writer.append(records[-1])
        assert path.read_bytes() == whole


def test_a_log_that_is_torn_in_its_first_record_is_none(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = written(path, [made_up_segment()])
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(LogError, match=r"not a step log|is damaged at byte 10 .record 0.|is a step log of version"):
            read_log(path)


# ---- damage


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path) -> None:
    """Every bit of every byte: an error with its place, or the last record is gone and said to be; never other contents."""
    records = small_log()
    whole, before = written(tmp_path / "whole", records), written(tmp_path / "before", records[:-1])
    path, told = tmp_path / "damaged", list[tuple[int, str]]()
    for place in range(len(whole)):
        for flip in (1, 0x10, 0x80, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                log = read_log(path)
            except LogError as error:
                told.append((place, str(error)))
            else:
                assert place >= len(before)
                assert (log.records, log.torn_bytes) == (records[:-1], len(whole) - len(before))
    assert all(str(path) in message for _, message in told)
    assert all("is damaged at byte" in message for place, message in told if place >= len(MAGIC))


def test_damage_is_told_with_its_place_and_what_to_do(tmp_path: Path) -> None:
    records = small_log()
    path = tmp_path / "log"
    begin = len(written(tmp_path / "before", records[:2]))
    data = bytearray(written(path, records))
    data[begin + 20] ^= 1
    path.write_bytes(data)
    message = rf"log is damaged at byte {begin} \(record 2\): .*checksum.*up to step 1, is intact.*truncate -s {begin} "
    with pytest.raises(LogError, match=message):
        read_log(path)
    with pytest.raises(LogError, match=message):
        LogWriter.open(path)
    assert path.read_bytes() == data
    with path.open("r+b") as file:
        file.truncate(begin)
    assert read_log(path).records == records[:2]  # the advice works


def test_a_damaged_length_in_the_middle_is_no_torn_end(tmp_path: Path) -> None:
    """Although its record would reach beyond the end of the file, as a torn one does."""
    records = small_log()
    begin = len(written(tmp_path / "before", records[:2]))
    data = bytearray(written(tmp_path / "log", records))
    for length in (1 << 12, 1 << 20, 1 << 31):
        struct.pack_into("<I", data, begin + 2, length)
        (tmp_path / "log").write_bytes(data)
        with pytest.raises(LogError, match="head of a record is damaged"):
            read_log(tmp_path / "log")


def test_records_that_were_moved_repeated_or_left_out_are_noticed(tmp_path: Path) -> None:
    records = small_log()
    ends = [len(MAGIC)] + [len(written(tmp_path / f"{n}", records[:n])) for n in range(1, len(records) + 1)]
    whole = (tmp_path / f"{len(records)}").read_bytes()
    parts = [whole[a:b] for a, b in pairwise(ends)]
    for i in range(1, len(parts) - 1):
        orders = (parts[:i] + parts[i + 1 :], [*parts[: i + 1], *parts[i:]], [*parts[:i], parts[i + 1], parts[i], *parts[i + 2 :]])
        for order in orders:
            (tmp_path / "log").write_bytes(MAGIC + b"".join(order))
            with pytest.raises(LogError, match="damaged at byte"):
                read_log(tmp_path / "log")
