"""Columns of numbers as a safetensors file, in one fixed layout.

The layout is a part of the format here (a digest covers it), so it does not come from a library that may change it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from zo_lightning.engine.trajectory.encoding import canonical, parse

Columns = dict[str, np.ndarray[Any, Any]]

FORMAT = "zo-lightning fine-tune"
"""What the metadata of an export says that it is."""

_DTYPES: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "U32": np.dtype("<u4"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH = struct.Struct("<Q")


def encode(columns: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the wider dtypes first, then by name."""
    order = sorted(columns, key=lambda name: (-columns[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, at = [], 0
    for name in order:
        data = np.ascontiguousarray(columns[name]).tobytes()
        header[name] = {"dtype": _NAMES[columns[name].dtype], "shape": list(columns[name].shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = canonical(header)
    text += b" " * (-len(text) % 8)
    return b"".join([_LENGTH.pack(len(text)), text, *parts])


def decode(data: bytes) -> tuple[Columns, dict[str, str]]:
    """(columns, metadata), as views of `data`. Raises ValueError (and nothing else) for what can't be read.

    Spaces, the order of keys and the like are for the caller to compare with what `encode` writes.
    """
    if len(data) < _LENGTH.size:
        raise ValueError("it is too short")
    (length,) = _LENGTH.unpack_from(data)
    begin = _LENGTH.size + length
    if begin > len(data):
        raise ValueError("its header is longer than the file")
    header = parse(data[_LENGTH.size : begin].rstrip(b" "))
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is not that of a safetensors file with metadata")
    columns = {name: _column(entry, memoryview(data)[begin:]) for name, entry in header.items()}
    if sum(column.nbytes for column in columns.values()) != len(data) - begin:
        raise ValueError("its columns overlap, or leave gaps")
    return columns, metadata


def is_export(beginning: bytes) -> bool:
    """Whether a file that begins like this says that it is an export; whether it is a good one, `decode` finds out."""
    return beginning[_LENGTH.size :].startswith(b'{"__metadata__":{') and f'"format":"{FORMAT}"'.encode() in beginning


def _column(entry: Any, body: memoryview) -> np.ndarray[Any, Any]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a column is not described by dtype, shape and offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if dtype is None or not _sizes(shape) or len(shape) > 2 or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError("a column has a dtype, a shape or offsets that can't be")
    begin, end = offsets
    if not begin <= end <= len(body) or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("a column is larger than the file, or has another size than its shape")
    column: np.ndarray[Any, Any] = np.frombuffer(body[begin:end], dtype).reshape(shape)
    return column


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 40 for n in value)
