"""Safetensors files, read without torch and numpy: what a header says, whether the file is whole, whether it has a NaN.

The format: eight bytes with the length of the header, the header (JSON: name to dtype, shape and place), the data.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_MAX_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors library itself reads."""
_LFS_POINTER = b"version https://git-lfs"
_CHUNK = 1 << 20

_BYTES_OF: Mapping[str, float] = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1, "F4": 0.5, "C64": 8},
}


class BrokenFileError(Exception):
    """A file is not what it should be; the message says how, without its name."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `start` and `end` are its place in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which is as long as its header says. Raises `BrokenFileError`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BrokenFileError("is not a regular file")
        with open(path, "rb") as file:
            return _header(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise BrokenFileError(f"can't be read: {error.strerror or error}") from error


def _header(file: BinaryIO, size: int) -> dict[str, Tensor]:
    start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise BrokenFileError("is a pointer of git-lfs, not the weights")
    if len(start) < 8:
        raise BrokenFileError(f"is cut off: {size} bytes")
    length = int.from_bytes(start[:8], "little")
    if length > min(_MAX_HEADER, size - 8):
        raise BrokenFileError(f"is cut off within its header, or no safetensors file: {size:,} bytes")
    file.seek(8)
    try:
        tensors = dict(_tensors(json.loads(file.read(length)), 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenFileError(f"has a header that can't be read: {error}") from error
    end = max((one.end for one in tensors.values()), default=8 + length)
    if end != size:
        raise BrokenFileError(f"has {size:,} bytes, by its header it should have {end:,}")
    return tensors


def _tensors(header: Mapping[str, Any], begin: int) -> Iterator[tuple[str, Tensor]]:
    for name, one in header.items():
        if name == "__metadata__":
            continue
        first, last = one["data_offsets"]
        tensor = Tensor(str(one["dtype"]), tuple(map(int, one["shape"])), begin + int(first), begin + int(last))
        width = _BYTES_OF.get(tensor.dtype)
        if width is not None and tensor.nbytes != math.ceil(math.prod(tensor.shape) * width):
            raise ValueError(f"{name} has {tensor.nbytes} bytes, which is not its shape {list(tensor.shape)}")
        yield name, tensor


def read_data(path: Path, tensor: Tensor, limit: int) -> bytes:
    """The first `limit` bytes of a tensor. Raises `OSError`."""
    with open(path, "rb") as file:
        file.seek(tensor.start)
        return file.read(min(limit, tensor.nbytes))


# -- NaN and infinity --------------------------------------------------------------------------------------------------


def not_finite(path: Path, tensors: Mapping[str, Tensor], limit: int) -> Iterator[str]:
    """The names of tensors that have a NaN or an infinity among their first `limit` bytes. Raises `OSError`.

    Looked at are F64, F32, F16, BF16, F8_E4M3 and F8_E5M2; other types can't be told, or have none.
    """
    with open(path, "rb") as file:
        for name, tensor in tensors.items():
            file.seek(tensor.start)
            if tensor.dtype in _EXPONENTS and any(
                _has_not_finite(chunk, tensor.dtype) for chunk in _chunks(file, min(limit, tensor.nbytes))
            ):
                yield name


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    left = size - size % 8 if size % 8 and size > 8 else size
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        left -= len(chunk)
        yield chunk


def _table(mask: int) -> bytes:
    """For `bytes.translate`: 1 where all bits of `mask` are set."""
    return bytes(byte & mask == mask for byte in range(256))


_EXPONENTS: Mapping[str, tuple[int, tuple[tuple[int, bytes], ...]]] = {
    "F64": (8, ((7, _table(0x7F)), (6, _table(0xF0)))),
    "F32": (4, ((3, _table(0x7F)), (2, _table(0x80)))),
    "BF16": (2, ((1, _table(0x7F)), (0, _table(0x80)))),
    "F16": (2, ((1, _table(0x7C)),)),
    "F8_E5M2": (1, ((0, _table(0x7C)),)),
    "F8_E4M3": (1, ((0, _table(0x7F)),)),
}
"""Bytes of a number, and the bytes of it (little-endian) in which its exponent is, with their bits.

A number is a NaN or an infinity where all bits of its exponent are set; in F8_E4M3, those of its mantissa as well.
"""


def _has_not_finite(data: bytes, dtype: str) -> bool:
    """Looks at all numbers at once, as one large integer: at the speed of memory, without numpy."""
    width, places = _EXPONENTS[dtype]
    marks = -1
    for place, table in places:
        marks &= int.from_bytes(data[place::width].translate(table), "little")
    return marks != 0
