"""A model's own safetensors files as its weights: opened without being read."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

_NO_RESERVE = 0x4000
"""MAP_NORESERVE of Linux, for which the mmap of Python 3.11 has no name."""


class Source(NamedTuple):
    """Where the bytes of a tensor are, as long as it lies at `address`."""

    path: str
    offset: int
    address: int


def source_of(tensor: Tensor) -> Source | None:
    """The file of a tensor that `open_weights` gave and nobody has written to or replaced since."""
    found: Source | None = getattr(tensor, "_zo_source", None)
    return found if found is not None and found.address == tensor.data_ptr() and tensor._version == 0 else None


def open_weights(model: nn.Module, files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
    """Give a model that was built on the meta device its weights, from safetensors files that stay on disk.

    `files` is a file, several, or a folder with *.safetensors; names are those of `model.state_dict()`. Parameters become memory maps of
    the files, private ones: the files are never written, and may be larger than memory. Nothing is read until somebody uses a weight; with
    `weights=Offload()` that is a block at a time. Buffers are read. Tied weights are tied as the model says (`tie_weights`). What is
    written to such weights before the first step must be written to the parameter (under no_grad), not to its `.data`, where it is not
    seen.

    Raises ValueError where names, shapes or dtypes do not fit, or where a buffer is on the meta device (build the model with
    `accelerate.init_empty_weights()`, which leaves buffers where they are); OSError where a file can't be read.
    """
    entries = {name: entry for path in _paths(files) for name, entry in _entries(path).items()}
    meta = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if meta:
        raise ValueError(
            f"The buffer {meta[0]!r} is on the meta device, and no file has it. Build the model under accelerate.init_empty_weights(), "
            "which leaves buffers where they are."
        )
    maps: dict[Path, mmap.mmap] = {}
    for owner_name, owner in model.named_modules():
        for name, parameter in list(owner._parameters.items()):
            full = f"{owner_name}.{name}" if owner_name else name
            if parameter is not None and full in entries:
                owner._parameters[name] = _opened(full, parameter, entries.pop(full), maps)
    for name, buffer in model.named_buffers():
        if name in entries:
            with torch.no_grad():
                buffer.copy_(_opened(name, buffer, entries.pop(name), maps))
    if entries:
        raise ValueError(f"The files have {next(iter(entries))!r}, which the model has not; {len(entries)} names do not fit.")
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"The files do not have {missing[0]!r}; {len(missing)} weights are missing.")


def _paths(files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    if not isinstance(files, (str, os.PathLike)):
        return [Path(file) for file in files]
    path = Path(files)
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"There is no *.safetensors file in {path}.")
    return found


def _entries(path: Path) -> dict[str, tuple[Path, int, Mapping[str, Any]]]:
    """By name: the file, the place of the first byte, the header's entry."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"{path} is not a safetensors file.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is no table.")
    header.pop("__metadata__", None)
    return {name: (path, 8 + length, entry) for name, entry in header.items()}


def _mapped(path: Path) -> mmap.mmap:
    """A whole file, once; no room is reserved for what nobody writes, so that it may be larger than memory."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _opened(name: str, parameter: Tensor, entry: tuple[Path, int, Mapping[str, Any]], maps: dict[Path, mmap.mmap]) -> nn.Parameter:
    path, data, described = entry
    try:
        dtype, shape = _DTYPES.get(described["dtype"]), tuple(described["shape"])
        begin, end = described["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file: its entry {name!r} is {described!r}.") from error
    if dtype != parameter.dtype or shape != tuple(parameter.shape):
        raise ValueError(
            f"{path} has {name!r} as {described['dtype']} of shape {shape}; the model has {parameter.dtype} of {tuple(parameter.shape)}."
        )
    if data + end > path.stat().st_size:
        raise ValueError(f"{path} is cut off: it ends before {name!r} does.")
    if end - begin != parameter.nbytes:
        raise ValueError(f"{path} is not a safetensors file: {name!r} of shape {shape} has {end - begin} bytes there.")
    if not parameter.numel():
        return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=parameter.requires_grad)
    if path not in maps:
        maps[path] = _mapped(path)
    bytes_ = torch.frombuffer(memoryview(maps[path])[data + begin : data + end], dtype=torch.uint8)
    if bytes_.data_ptr() % dtype.itemsize:
        raise ValueError(f"{path}: {name!r} does not begin at a multiple of {dtype.itemsize} bytes. Save the file anew with safetensors.")
    opened = nn.Parameter(bytes_.view(dtype).view(shape), requires_grad=parameter.requires_grad)
    opened._zo_source = Source(str(path), data + begin, opened.data_ptr())  # type: ignore[attr-defined]
    return opened
