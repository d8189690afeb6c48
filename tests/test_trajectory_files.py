"""Fingerprints change with every bit and with nothing else; files are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from engine_models import LanguageModel, mlp, same, snapshot
from torch import Tensor, nn
from trajectory_tools import trained_of

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.trajectory import (
    LogError,
    Trajectory,
    fingerprint,
    frozen_fingerprint,
    load_base,
    save_base,
    trained_fingerprint,
    write_bytes,
)
from zo_lightning.engine.trajectory import atomic as atomic_module
from zo_lightning.engine.trajectory import weights as weights_module

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def table(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(5, 7).to(dtype), "b": torch.randn(()).to(dtype), "c": torch.zeros(0, 3, dtype=dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_changes_with_every_bit(dtype: torch.dtype) -> None:
    start = fingerprint(table(dtype))
    seen = {start}
    for bit in range(dtype.itemsize * 8):
        tensors = table(dtype)
        raw = tensors["a"].view(torch.uint8).view(-1)
        raw[17 * dtype.itemsize + bit // 8] ^= 1 << bit % 8
        seen.add(fingerprint(tensors))
    assert len(seen) == dtype.itemsize * 8 + 1
    assert fingerprint(table(dtype)) == start


def test_names_shapes_and_dtypes_are_in_a_fingerprint() -> None:
    a, b, c = table().values()
    tables: list[dict[str, Tensor]] = [
        {"a": a, "b": b, "c": c},
        {"a": a, "c": b, "b": c},
        {"a": a.view(7, 5), "b": b, "c": c},
        {"a": a.view(torch.int32), "b": b, "c": c},
        {"a": a, "b": b.view(1), "c": c},
        {"a": a, "b": b},
        {"a": a, "b": b, "c": c.view(3, 0)},
        {},
    ]
    assert len({fingerprint(tensors) for tensors in tables}) == len(tables)
    assert fingerprint({"c": c, "b": b, "a": a}) == fingerprint(tables[0])
    assert len(fingerprint({})) == 64


@pytest.mark.parametrize("piece", [1, 3, 7, 40, 1 << 22])
def test_strides_and_pieces_are_not(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[fingerprint.__module__]
    plain = {"x": torch.arange(210.0).view(5, 6, 7), "y": torch.arange(4.0)}
    strided = {"x": plain["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0), "y": torch.arange(8.0).view(4, 2).mul(0.5)[:, 0]}
    assert not strided["x"].is_contiguous()
    expected = fingerprint(plain)
    monkeypatch.setattr(module, "_PIECE", piece)
    assert fingerprint(plain) == expected
    assert fingerprint(strided) == expected


def test_the_same_model_has_the_same_fingerprints_inside_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    model = LanguageModel("tied")
    model.embed.weight.requires_grad_(False)
    optimizer, wrapped = ZOOptimizer(model, lr=1.0), ZOOptimizer(Wrapper(model), lr=1.0)
    assert trained_fingerprint(trained_of(optimizer)) == trained_fingerprint(trained_of(wrapped))
    assert frozen_fingerprint(model, trained_of(optimizer)) == frozen_fingerprint(Wrapper(model), trained_of(wrapped))


def test_frozen_weights_and_persistent_buffers_are_in_the_frozen_fingerprint_and_trained_ones_are_not() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    model[1].bias.requires_grad_(False)
    trained = trained_of(ZOOptimizer(model, lr=1.0))
    seen = [frozen_fingerprint(model, trained)]
    with torch.no_grad():
        model[1].weight.add_(1)
        model.scratch.add_(1)
        assert frozen_fingerprint(model, trained) == seen[0]
        for tensor in (model[1].bias, model[0].running_mean, model[0].num_batches_tracked):
            tensor.add_(1)
            seen.append(frozen_fingerprint(model, trained))
    assert len(set(seen)) == 4


# ---- files


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_written_as_a_whole_or_not_at_all(call: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    if there:
        write_bytes(path, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match=r"file was not written: No space left on device.*Make room"):
            write_bytes(path, b"after")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"] * there
    write_bytes(path, b"after")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"after"]


def test_an_interrupted_file_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_module.replacing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_file_and_folder_are_flushed_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(number: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file")
        fsync(number)

    def renamed(a: Any, b: Any) -> None:
        order.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_bytes(tmp_path / "file", b"x")
    assert order == ["file", "rename", "folder"]


def test_a_base_that_does_not_fit_is_told_with_the_reason_of_the_system(tmp_path: Path) -> None:
    """A limit that the kernel keeps, as a disk that is full."""
    resource = pytest.importorskip("resource")
    log, limits = Trajectory(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"safetensors was not written: File too large\. Make room, or choose a folder") as caught:
            log.begin(ZOOptimizer(mlp(), lr=1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert Path(caught.value.filename).parent == tmp_path / "run"
    assert str(caught.value).count("was not written") == 1
    assert list((tmp_path / "run").iterdir()) == []
    log.begin(ZOOptimizer(mlp(), lr=1.0))
    log.close(ZOOptimizer(mlp(), lr=1.0))


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def read_only(path: Any, flags: int, *args: Any, **given: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "read-only")
        return plain(path, flags, *args, **given)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"safetensors was not written: Read-only file system\. Make room, or choose a folder") as caught:
        Trajectory(tmp_path).begin(ZOOptimizer(mlp(), lr=1.0))
    assert caught.value.errno == errno.EROFS
    monkeypatch.undo()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=r"The folder .*file.* of the step log could not be made: .*\. Make room, or choose a folder"):
            Trajectory(folder).begin(ZOOptimizer(mlp(), lr=1.0))


def test_files_can_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_base(tmp_path / "base", trained_of(ZOOptimizer(mlp(), lr=1.0)))
        write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("base", "file")] == [0o640] * 2


def test_base_weights_of_every_dtype_and_stride_come_back(tmp_path: Path) -> None:
    module = nn.Module()
    for number, dtype in enumerate(DTYPES):
        module.register_parameter(f"w{number}", nn.Parameter(torch.randn(4, 6).to(dtype).t()))
    trained = trained_of(ZOOptimizer(module, lr=1.0))
    save_base(tmp_path / "base", trained)
    loaded = load_base(tmp_path / "base")
    assert same(loaded, snapshot(module))
    assert fingerprint(loaded) == trained_fingerprint(trained)
    for tensor in loaded.values():
        tensor.zero_()
    assert same(load_base(tmp_path / "base"), snapshot(module))  # the file is not what was changed


def test_a_base_that_is_none_or_can_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").write_bytes(b"\x08\0\0\0\0\0\0\0notJSON!")
    with pytest.raises(LogError, match="base is not a safetensors file"):
        load_base(tmp_path / "base")
    with pytest.raises(FileNotFoundError):
        load_base(tmp_path / "none")

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(weights_module, "save_file", full)
    trained = trained_of(ZOOptimizer(mlp(), lr=1.0))
    with pytest.raises(OSError, match=r"^[^\[]*new was not written: No space left on device\. Make room"):
        save_base(tmp_path / "new", trained)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
