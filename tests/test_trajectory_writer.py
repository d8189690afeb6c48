"""Appending: what can't come next, full disks, folders that can't be written, two writers, forked processes."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trajectory_tools import F, made_up_segment, made_up_steps, written

from zo_lightning.engine.trajectory import (
    Checkpoint,
    End,
    LogWriter,
    Mark,
    StepRecord,
    read_log,
)
from zo_lightning.engine.trajectory.records import Record

# ---- what can't be appended


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (made_up_steps(1, 0)[0], "step 0 comes where step 1 is next"),
        (made_up_steps(1, 2)[0], "without gaps"),
        (made_up_segment(0), "begins at step 0, but"),
        (Mark(0, F), "Mark of step 0 comes where 1 steps"),
        (End(2, F), "End of step 2"),
        (Mark(1, "xyz"), "64 hexadecimal digits"),
        (replace(made_up_steps(1, 1)[0], values=(1.0, 2.0, 3.0)), "3 values, those before it have 2"),
        (replace(made_up_steps(1, 1)[0], values=(1.0, math.nan)), "not finite, and the step was not skipped"),
        (made_up_steps(1, 1, groups=1)[0], "settings of 1 groups"),
        (replace(made_up_steps(1, 1)[0], passes=b"\xff"), 'passes over weights that are perturbed with weights="exact"'),
        (replace(made_up_steps(1, 1)[0], passes=b"\x02"), "a point that the estimator does not have"),
        (replace(made_up_steps(1, 1)[0], passes=b"\xfe\x01", skipped=True), "ends away from the origin"),
    ],
)
def test_a_record_that_can_not_come_next_is_refused_and_nothing_is_written(record: Record, message: str, tmp_path: Path) -> None:
    before = written(tmp_path / "log", [made_up_segment(), *made_up_steps(1)])
    with LogWriter.open(tmp_path / "log") as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(record)
        assert (tmp_path / "log").read_bytes() == before
        writer.append(made_up_steps(1, 1)[0])
    assert len(read_log(tmp_path / "log").steps) == 2


# ---- disks and processes

posix = pytest.mark.skipif(os.name == "nt", reason="needs flock, fork and limits")


def failing(after: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """os.write writes `after` bytes and then finds the disk full, once."""
    plain, left = os.write, [after, True]

    def write(number: int, data: Any) -> int:
        if left[1] and len(data) > left[0]:
            if left[0]:
                done = plain(number, memoryview(data)[: left[0]])
                left[0] = 0
                return done
            left[1] = False
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(number, data)

    monkeypatch.setattr(os, "write", write)
    return monkeypatch.undo


@pytest.mark.parametrize("after", [0, 1, 7, 8, 30, 60])
def test_a_full_disk_leaves_a_valid_log_and_a_writer_that_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    records = [made_up_segment(), *made_up_steps(4)]
    expected = written(tmp_path / "expected", records)
    with LogWriter.create(path, made_up_segment()) as writer:
        writer.append(records[1])
        before = path.read_bytes()
        failing(after, monkeypatch)
        with pytest.raises(OSError, match=r"Step 1 was not written to the step log .*No space left on device.*Make room") as caught:
            writer.append(records[2])
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == before
        for record in records[2:]:
            writer.append(record)
    assert path.read_bytes() == expected


def test_what_could_not_be_taken_back_is_before_the_next_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    expected = written(tmp_path / "expected", [made_up_segment(), *made_up_steps(2)])
    with LogWriter.create(path, made_up_segment()) as writer:
        with monkeypatch.context() as patch:
            failing(20, patch)
            patch.setattr(os, "ftruncate", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
            with pytest.raises(OSError, match="Step 0 was not written"):
                writer.append(made_up_steps(1)[0])
        assert read_log(path).torn_bytes == 20
        for record in made_up_steps(2):
            writer.append(record)
    assert path.read_bytes() == expected


@posix
def test_a_limit_of_the_system_is_met_in_the_middle_of_a_record(tmp_path: Path) -> None:
    """A write that the kernel cuts short, as on a disk that fills up."""
    import resource

    path = tmp_path / "log"
    steps = made_up_steps(100)
    with LogWriter.create(path, made_up_segment()) as writer:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, hard))
        try:
            with pytest.raises(OSError, match=r"was not written to the step log .*File too large"):
                _append_all(writer, steps)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log = read_log(path)
        done = len(log.steps)
        assert 0 < done < 100
        assert (log.steps, log.torn_bytes) == (steps[:done], 0)
        for step in steps[done:]:
            writer.append(step)
    assert read_log(path).steps == steps


def _append_all(writer: LogWriter, steps: list[StepRecord]) -> None:
    for step in steps:
        writer.append(step)


def _die_inside_a_write(path: Path, after: int) -> None:
    plain = os.write

    def write(number: int, data: Any) -> int:
        plain(number, memoryview(data)[:after])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with LogWriter.open(path) as writer:
        writer.append(made_up_steps(1)[0])
        os.write = write
        writer.append(made_up_steps(2)[1])


@posix
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("after", [0, 3, 20, 60])
def test_a_process_that_is_killed_inside_a_write_loses_that_record_alone(after: int, tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, [made_up_segment()])
    child = multiprocessing.get_context("fork").Process(target=_die_inside_a_write, args=(path, after))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    log = read_log(path)
    assert (log.steps, log.torn_bytes) == (made_up_steps(1), after)
    with LogWriter.open(path) as writer:
        assert writer.torn_bytes == after
        writer.append(made_up_steps(2)[1])
    assert read_log(path).steps == made_up_steps(2)


@pytest.mark.parametrize(("policy", "expected"), [("step", [1] * 6 + [1]), (2, [0, 1, 0, 1, 0, 1, 1]), ("checkpoint", [0] * 6 + [1])])
def test_records_reach_the_disk_when_the_policy_says(
    policy: str | int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, plain = [0], os.fsync
    with LogWriter.create(tmp_path / "log", made_up_segment(), fsync=policy) as writer:
        monkeypatch.setattr(os, "fsync", lambda number: (counts.append(counts.pop() + 1), plain(number)))
        seen = []
        for record in [*made_up_steps(6), Checkpoint(6, "x", "hf")]:
            before = counts[0]
            writer.append(record)
            seen.append(counts[0] - before)
    assert seen == expected


def test_a_record_that_does_not_reach_the_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    with LogWriter.create(path, made_up_segment(), fsync="step") as writer:
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
            with pytest.raises(OSError, match=r"Step 0 was not written.*error"):
                writer.append(made_up_steps(1)[0])
        assert path.read_bytes() == before
        writer.append(made_up_steps(1)[0])
    assert len(read_log(path).steps) == 1


@pytest.mark.parametrize("policy", ["never", 0, True, 1.5])
def test_a_policy_that_does_not_exist_is_refused(policy: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Invalid fsync"):
        LogWriter.create(tmp_path / "log", made_up_segment(), fsync=policy)


def test_a_log_can_not_be_created_over_another_nor_in_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(tmp_path / "log", [made_up_segment(), *made_up_steps(1)])
    with pytest.raises(FileExistsError, match=r"There is a log already; go on with it"):
        LogWriter.create(tmp_path / "log", made_up_segment())
    assert (tmp_path / "log").read_bytes() == before
    with pytest.raises(OSError, match=r"could not be created: Not a directory"):
        LogWriter.create(tmp_path / "log" / "log", made_up_segment())
    with pytest.raises(OSError, match="could not be opened: No such file"):
        LogWriter.open(tmp_path / "none")
    failing(30, monkeypatch)
    with pytest.raises(OSError, match=r"could not be created: No space left"):
        LogWriter.create(tmp_path / "other", made_up_segment())
    assert [path.name for path in tmp_path.iterdir()] == ["log"]  # nothing is left behind


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions mean nothing to root, so the system call refuses."""
    plain = os.open

    def refused(path: Any, flags: int, *rest: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, flags, *rest)

    written(tmp_path / "log", [made_up_segment()])
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match=r"other could not be created: Permission denied.*a folder that can be written"):
        LogWriter.create(tmp_path / "other", made_up_segment())
    with pytest.raises(PermissionError, match=r"log could not be opened: Permission denied"):
        LogWriter.open(tmp_path / "log")


def test_a_closed_log_takes_nothing(tmp_path: Path) -> None:
    writer = LogWriter.create(tmp_path / "log", made_up_segment())
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match=r"log is closed\. Open it again"):
        writer.append(made_up_steps(1)[0])


@posix
def test_two_writers_can_not_append_to_one_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with LogWriter.create(path, made_up_segment()) as writer:
        with pytest.raises(BlockingIOError, match="Another run appends to this step log"):
            LogWriter.open(path)
        code = f"from zo_lightning.engine.trajectory import LogWriter; LogWriter.open({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr
        writer.append(made_up_steps(1)[0])
    with LogWriter.open(path) as writer:
        writer.append(made_up_steps(2)[1])
    assert len(read_log(path).steps) == 2


def _wait(event: Any) -> None:
    event.wait(60)


@posix
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_worker_that_lives_on_does_not_hold_the_log(tmp_path: Path) -> None:
    """As the workers of a data loader do for a moment when their run is killed."""
    path = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    event = context.Event()
    writer = LogWriter.create(path, made_up_segment())
    child = context.Process(target=_wait, args=(event,))
    child.start()
    try:
        os.close(writer._number)  # what the end of a killed process does, without the unlocking of `close`
        writer._number = -1
        for _ in range(200):
            try:
                LogWriter.open(path).close()
                break
            except BlockingIOError:  # the child has not closed its copy yet
                child.join(0.05)
        else:
            pytest.fail("The child holds the lock.")
    finally:
        event.set()
        child.join()
