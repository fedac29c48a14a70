"""The lengths that a GGUF file declares, held against the file before a reader believes them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from lm_eval_aft.errors import AFTError
from lm_eval_aft.header_entry import MAX_HEADER, check_lengths

# A control vector has a handful of entries and a tensor per block. The gguf package makes Python objects
# of each element of an array, so that a small file could fill the memory.
_MOST = 10_000
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a scalar type
_STRING, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Walk the counts and entries of a GGUF file.

    Raises:
        AFTError: it declares more than it holds or than a control vector can have, or nests arrays.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            check_lengths(path, size, 0)
            _walk(_Scan(path, stream, size))
    except OSError as error:
        raise AFTError(f"{path} cannot be read: {error.strerror}.", "Check the path and rights.") from error


@dataclass
class _Scan:
    path: Path
    stream: BinaryIO
    size: int
    order: str = "<"

    def number(self, kind: str) -> int:
        data = self.stream.read(struct.calcsize(kind))
        if len(data) < struct.calcsize(kind):
            self.refuse("it ends in the middle of its header")
        return int(struct.unpack(self.order + kind, data)[0])

    def skip(self, length: int) -> None:
        if length > self.size - self.stream.tell():
            self.refuse(f"it declares {length:,} bytes where fewer are left")
        self.stream.seek(length, 1)

    def count(self, what: str) -> int:
        found = self.number("Q")
        if found > _MOST:
            self.refuse(f"it declares {found:,} {what}, more than any control vector has")
        return found

    def string(self) -> None:
        length = self.number("Q")
        if length > MAX_HEADER:
            self.refuse(f"it declares a text of {length:,} bytes")
        self.skip(length)

    def refuse(self, why: str) -> NoReturn:
        raise AFTError(f"{self.path} cannot be read as GGUF: {why}.", "Copy it again.")


def _walk(scan: _Scan) -> None:
    if scan.stream.read(4) != b"GGUF":
        scan.refuse("it does not begin with GGUF")
    version = scan.number("I")
    if version & 0xFFFF == 0:  # written on a machine of the other byte order
        scan.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        scan.refuse(f"it is of version {version}; 2 and 3 are known")
    scan.count("tensors")
    elements = 0
    for _ in range(scan.count("entries")):
        scan.string()
        kind = scan.number("I")
        if kind == _ARRAY:
            kind, length = scan.number("I"), scan.count("elements in one array")
            if kind == _ARRAY:
                scan.refuse("it holds arrays of arrays")
            elements += length
            if elements > _MOST:
                scan.refuse("its arrays are longer than any control vector's")
            _values(scan, kind, length)
        else:
            _values(scan, kind, 1)


def _values(scan: _Scan, kind: int, length: int) -> None:
    if kind == _STRING:
        for _ in range(length):
            scan.string()
    elif kind in _BYTES:
        scan.skip(_BYTES[kind] * length)
    else:
        scan.refuse(f"it holds a value of type {kind}, which is not known")
