"""Reads the header of a GGUF file: key-value metadata and the table of tensors.

Block sizes are those of the `gguf` package, but the header is walked here. The package makes several numpy
views for each entry of the vocabulary (10 s for Gemma's 262,144), and a file that was cut short reaches the
user as an error about shapes. Every read here is checked against the size of the file.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table. shape: rows first, as numpy has it; offset and size: bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A checked header: key-value metadata (arrays as lists or numpy arrays) and the tensor table."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def read(self, name: str) -> np.ndarray:
        """f32 values of a tensor; the file is memory-mapped, so only this tensor's bytes are touched."""
        tensor = self.tensors[name]
        data = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.size,))
        rows = np.asarray(data).reshape(math.prod(tensor.shape[:-1]), -1)
        return dequantize(rows, tensor.kind).reshape(tensor.shape)


class _Cursor:
    """Reads little-endian values in order; reading past the end names the file and its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = np.memmap(path, np.uint8, "r").data if path.stat().st_size else memoryview(b"")
        self.at = 0

    def take(self, count: int, what: str) -> memoryview:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError(
                f"{self.path} is truncated or damaged: {what} needs {count} bytes at offset {self.at}, but "
                f"the file has {len(self.data)} bytes; fetch it again"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.integer("Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is damaged: {what} is not UTF-8 ({error})") from None

    def value(self, kind: int, what: str) -> Any:
        """A Python value, or an array as a list of strings or a numpy array."""
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            item, count = self.integer("I", what), self.integer("Q", what)
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
            if item != _STRING:
                raise ValueError(
                    f"{self.path}: {what} is an array of value type {item}, which is not supported"
                )
            return [self.value(item, what) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path} is damaged: {what} has the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        scalar = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0]
        # The shortest decimal of a float32: 1e-6, not 9.999999974752427e-07.
        return float(str(scalar)) if scalar.dtype == np.float32 else scalar.item()


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads and checks the header of a GGUF file; no weight is read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not GGUF, another version, an unknown block format, or a file shorter than its tensor table
        says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    cursor = _Cursor(path)
    if bytes(cursor.data[:4]) != MAGIC:
        raise ValueError(
            f"{path} is not a GGUF file: it starts with {bytes(cursor.data[:4])!r}, expected {MAGIC!r}"
        )
    cursor.take(4, "magic")
    version = cursor.integer("I", "version")
    if version not in VERSIONS:
        raise ValueError(
            f"{path}: GGUF version {version} is not supported; expected little-endian {VERSIONS}"
        )
    tensor_count, value_count = cursor.integer("Q", "tensor count"), cursor.integer("Q", "metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text("a metadata key")
        metadata[key] = cursor.value(cursor.integer("I", f"metadata {key!r}"), f"metadata {key!r}")
    table = []
    for _ in range(tensor_count):
        name = cursor.text("a tensor name")
        rank = cursor.integer("I", f"tensor {name!r}")
        shape = tuple(cursor.integer("Q", f"tensor {name!r}") for _ in range(rank))[::-1]
        table.append(
            (name, shape, cursor.integer("I", f"tensor {name!r}"), cursor.integer("Q", f"tensor {name!r}"))
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path} is damaged: general.alignment must be a positive number, got {alignment!r}")
    if len({entry[0] for entry in table}) < len(table):
        raise ValueError(f"{path} is damaged: its table names a tensor twice")
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _tensor(path, name, shape, kind, start + offset) for name, shape, kind, offset in table}
    end = max((tensor.offset + tensor.size for tensor in tensors.values()), default=0)
    if end > len(cursor.data):
        cut = sum(tensor.offset + tensor.size > len(cursor.data) for tensor in tensors.values())
        raise ValueError(
            f"{path} is truncated: its tensors end at byte {end}, but the file has {len(cursor.data)} bytes "
            f"({cut} of {len(tensors)} tensors are cut off); fetch it again"
        )
    return GGUFFile(path, metadata, tensors)


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    try:
        known = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise ValueError(
            f"{path}: tensor {name!r} has block format number {kind}, which the installed gguf package does not know"
        ) from None
    if not shape or shape[-1] % block:
        raise ValueError(
            f"{path} is damaged: tensor {name!r} of shape {shape} is not made of {known.name} blocks of {block}"
        )
    return GGUFTensor(name, shape, known, offset, math.prod(shape) // block * block_bytes)
