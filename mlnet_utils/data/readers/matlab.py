"""Reader of MATLAB's files of versions 5 to 7, without code that a damaged file could crash.

scipy's reader trusts the numbers in a file: some damaged copies end the process. Here each part is
cut out of the bytes that are there, so that an exception is the worst that comes of any file.
Format: MathWorks, "MAT-File Format", chapter 1.
"""

import math
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# Types of elements, and classes of matrices.
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
           13: "u8"}  # fmt: skip
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
MATRIX, COMPRESSED = 14, 15
CELL, STRUCT, OBJECT, CHAR, SPARSE = 1, 2, 3, 4, 5
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8",
           15: "u8"}  # fmt: skip
LOGICAL, COMPLEX = 0x0200, 0x0800  # bits of a matrix's flags
LARGEST = 1 << 31  # bytes of a variable, as MATLAB itself limits these versions


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a file, as arrays of MATLAB's shape, sparse ones too.

    Cells are arrays of objects, structs are arrays of objects with the fields as attributes, and
    texts are arrays of a string for each row. Raises Exception: many types for a damaged file or
    another kind of file, see ``runtime.reading``.
    """
    content, variables = memoryview(path.read_bytes()), {}
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    if order is None or content[124:126] not in (b"\0\1", b"\1\0"):
        raise ValueError("no MATLAB file of version 5 to 7: `save -v7` writes one")
    content = content[128:]
    while content:
        kind, part, content = _element(content, order)
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            part = memoryview(unpacker.decompress(part, LARGEST))
            if not unpacker.eof:  # the checksum stands there
                raise ValueError("a variable is cut off or too large")
            kind, part, _ = _element(part, order)
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where a variable should be")
        name, value = _matrix(part, order)
        if name:  # MATLAB's own variables have none
            variables[name] = value
    return variables


def _element(content: memoryview, order: str) -> tuple[int, memoryview, memoryview]:
    """Type and content of the first element, and the bytes after it."""
    kind, size = struct.unpack_from(f"{order}II", content)
    if kind >> 16:  # a small one: type, size and content share 8 bytes
        kind, size, start, after = kind & 0xFFFF, kind >> 16, 4, 8
    else:
        start, after = 8, 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)
    if start + size > len(content) or start + size > after:
        raise ValueError(f"it ends within an element of {size} bytes")
    return kind, content[start : start + size], content[after:]


def _numbers(content: memoryview, order: str) -> tuple[np.ndarray, memoryview]:
    """The numbers in the first element, and the bytes after it."""
    kind, part, rest = _element(content, order)
    return np.frombuffer(part, order + NUMBERS[kind]), rest


def _matrix(content: memoryview, order: str) -> tuple[str, Any]:
    """Name and value of a matrix."""
    if not content:
        return "", np.zeros((0, 0))
    # Their elements first, at once for speed, are numbers of 4 bytes: the flags, and the shape.
    *head, flags, _, sizes, size = struct.unpack_from(f"{order}6I", content)
    shape = struct.unpack_from(f"{order}{size // 4}i", content, 24)
    _, name, content = _element(content[24 + -(-size // 8) * 8 :], order)
    kind, count = flags & 0xFF, math.prod(shape)
    if head != [6, 8] or sizes not in (5, 6) or len(shape) < 2 or min(shape) < 0:
        raise ValueError("a matrix without flags or shape")
    if count > LARGEST:
        raise ValueError(f"a matrix of {shape} numbers is too large")
    if kind in (CELL, STRUCT, OBJECT):
        values = _objects(content, order, kind, count)
    elif kind == CHAR:
        text = np.array(list(_characters(content, order)))
        rows = text.reshape(shape[0], -1, order="F") if count else ()
        return _text(name), np.array(["".join(row) for row in rows])
    elif kind == SPARSE:
        values = _dense(content, order, shape, logical=bool(flags & LOGICAL))
    else:
        values, content = _numbers(content, order)
        values = values.astype(CLASSES[kind], copy=False)
        if flags & COMPLEX:
            values = values + 1j * _numbers(content, order)[0]
    return _text(name), values.reshape(shape, order="F")


def _objects(content: memoryview, order: str, kind: int, count: int) -> np.ndarray:
    """(count,) contents of cells, or structs."""
    fields = [""]
    if kind != CELL:
        if kind == OBJECT:
            _, _, content = _element(content, order)  # its class
        (length,), content = _numbers(content, order)
        _, names, content = _element(content, order)
        fields = [_text(names[at : at + length]) for at in range(0, len(names), length)]
    if count * len(fields) > len(content):
        raise ValueError(f"{count} cells or structs in {len(content)} bytes")
    found = np.empty(count, object)
    for place in range(count):
        values = {}
        for field in fields:
            matrix, part, content = _element(content, order)
            if matrix != MATRIX:
                raise ValueError(f"an element of type {matrix} where a matrix should be")
            values[field] = _matrix(part, order)[1]
        found[place] = values[""] if kind == CELL else SimpleNamespace(**values)
    return found


def _dense(content: memoryview, order: str, shape: tuple[int, ...], logical: bool) -> np.ndarray:
    """The numbers of a sparse matrix, with the zeros between them."""
    rows, content = _numbers(content, order)
    ends, content = _numbers(content, order)
    kind, part, _ = _element(content, order)
    columns = np.repeat(np.arange(shape[1]), np.diff(ends))
    # MATLAB calls bytes of a logical matrix float64.
    found = np.frombuffer(part, "u1" if logical else order + NUMBERS[kind])
    values = np.zeros(shape)
    values[rows[: len(columns)], columns] = found[: len(columns)]
    return values


def _characters(content: memoryview, order: str) -> str:
    kind, part, _ = _element(content, order)
    coding = TEXTS[kind]
    if coding in ("utf-16", "utf-32"):
        coding += "-le" if order == "<" else "-be"
    return bytes(part).decode(coding)


def _text(name: memoryview) -> str:
    return bytes(name).partition(b"\0")[0].decode()
