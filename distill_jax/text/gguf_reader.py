"""Opens GGUF files quickly and safely, through the `gguf` package.

`gguf.GGUFReader` makes one numpy view per element of an array field: ten seconds for the 262,144 pieces, scores and
types of a Gemma 3 vocabulary. `FastGGUFReader` walks such a field once. The files are untrusted data: whatever is
wrong with one ends in a ValueError that names it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

_STRING_LENGTH = struct.Struct("<Q")


class FastGGUFReader(gguf.GGUFReader):
    """A `gguf.GGUFReader` whose array fields are read in one pass.

    Fields and tensors are used as those of the base class. Of an array of numbers `parts` holds one view of all values,
    of an array of strings one memoryview each, so `field.contents()` gives the same list; `contents(index)` for one
    element works on string arrays only.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        header: list[Any] = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        types = [GGUFValueType.ARRAY, item_type]
        start = orig_offs + 12
        if item_type in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[item_type], count)
            if len(values) != count:
                raise ValueError(f"an array of {count} numbers ends after {len(values)}")
            return 12 + values.nbytes, [*header, values], [2], types
        if item_type != GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        buffer = memoryview(self.data)  # type: ignore[arg-type]
        offset = start
        pieces: list[Any] = []
        for _ in range(count):
            (length,) = _STRING_LENGTH.unpack_from(buffer, offset)
            offset += 8 + length
            pieces.append(buffer[offset - length : offset])
        if offset > len(buffer):
            raise ValueError(f"an array of {count} strings runs past the end of the file")
        return offset - orig_offs, header + pieces, list(range(2, 2 + count)), types


def open_gguf(path: str | os.PathLike[str]) -> FastGGUFReader:
    """Opens a GGUF file: its fields, and its tensors as memory maps.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not GGUF, is truncated or malformed. The message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    try:
        return FastGGUFReader(path)
    # The base class reads past the end of a short file with whichever error numpy has at that place.
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        AttributeError,
        struct.error,
        MemoryError,
        RecursionError,  # arrays of arrays of arrays ...
    ) as error:
        raise ValueError(
            f"{path} is truncated or malformed ({type(error).__name__}: {error}); "
            f"it has {path.stat().st_size} bytes: compare its size and checksum with the source's, and fetch it again"
        ) from error


def gguf_value(reader: gguf.GGUFReader, key: str, expected: type | tuple[type, ...], path: object) -> Any:
    """The value of a field, None when there is none.

    Args:
      reader: an open file.
      key: name of the field, `tokenizer.ggml.tokens` for instance.
      expected: the Python type that a value has to have; for an array, that of its elements.
      path: the file, for the message.

    Raises:
      ValueError: the value has another type, or is not UTF-8.
    """
    field = reader.get_field(key)
    if field is None:
        return None
    try:
        value = field.contents()
    except UnicodeDecodeError as error:
        raise ValueError(f"field {key} of {path} is not valid UTF-8: {error}") from error
    sample = value[0] if isinstance(value, list) and value else value
    if value != [] and not isinstance(sample, expected):
        raise ValueError(f"field {key} of {path} holds {type(sample).__name__}, expected {expected}")
    return value
