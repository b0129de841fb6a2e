"""The directory of a zip file whose entries are stored as they are, without compression.

PyTorch and ``numpy.savez`` both write such zips, so every entry is a plain stretch of
the file that can be mapped instead of read::

    [local header][data.pkl] [local header][padding][data/0] ... [directory][end record]
                   ^ start, size of each entry                    ^ names, sizes, places

Nothing is unpacked here, so a compression bomb has nothing to blow up; entries that
overlap, repeat a name or point outside the file are refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

MAX_ENTRIES = 50_000
MAX_DIRECTORY_BYTES = 16 * 2**20
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Span:
    """A stretch of the file: ``start`` and ``size`` in bytes."""

    start: int
    size: int


def read_entries(data: memoryview) -> dict[str, Span]:
    """Where each entry of the zip lies.

    Args:
        data: the whole file, bytes.

    Returns:
        Entry name to the span of its content, in the order of the directory.

    Raises:
        ValueError: the zip is cut short, damaged, compressed, encrypted or larger than
            the limits, or two entries share a name or bytes.
    """
    count, start, size = _find_directory(data)
    if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise ValueError(
            f"the zip lists {count} entries in {size} bytes; at most {MAX_ENTRIES} "
            f"entries and {MAX_DIRECTORY_BYTES} bytes are read"
        )
    entries: dict[str, Span] = {}
    taken: list[tuple[int, int]] = []
    position, end = start, start + size
    for _ in range(count):
        name, header, content_size, position = _central_entry(data, position, end)
        if name in entries:
            raise ValueError(f"the zip holds two entries named {name!r}")
        span = _content_span(data, name, header, content_size, start)
        entries[name] = span
        taken.append((header, span.start + span.size))
    taken.sort()
    for (_, stop), (begin, _) in pairwise(taken):
        if begin < stop:
            raise ValueError("the zip holds entries that overlap")
    return entries


def _find_directory(data: memoryview) -> tuple[int, int, int]:
    """Number of entries, start and size in bytes of the directory."""
    tail_start = max(0, len(data) - _END.size - 0xFFFF)
    place = bytes(data[tail_start:]).rfind(b"PK\x05\x06")
    if place < 0 or tail_start + place + _END.size > len(data):
        raise ValueError(
            "the file starts like a zip but its end is missing, so it was cut short; "
            "download or copy it again"
        )
    place += tail_start
    _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(data, place)
    if count == 0xFFFF or size == 0xFFFFFFFF or start == 0xFFFFFFFF:
        disk, first_disk, here, count, size, start = _find_directory64(data, place)
    if disk or first_disk or here != count:
        raise ValueError("the zip is split over several files; join them first")
    if start + size > place:
        raise ValueError("the directory of the zip lies outside the file")
    return count, start, size


def _find_directory64(
    data: memoryview, end_place: int
) -> tuple[int, int, int, int, int, int]:
    """The same record in its 64-bit form, which large files need."""
    locator = end_place - _LOCATOR.size
    if locator < 0 or bytes(data[locator : locator + 4]) != b"PK\x06\x07":
        raise ValueError("the zip names a 64-bit directory that is not there")
    place = _LOCATOR.unpack_from(data, locator)[2]
    if place + _END64.size > locator or bytes(data[place : place + 4]) != b"PK\x06\x06":
        raise ValueError("the 64-bit directory of the zip lies outside the file")
    return _END64.unpack_from(data, place)[4:]


def _central_entry(
    data: memoryview, position: int, end: int
) -> tuple[str, int, int, int]:
    """Name, local header place, content size, place of the next directory record."""
    if position + _CENTRAL.size > end:
        raise ValueError("the directory of the zip is cut short")
    record = _CENTRAL.unpack_from(data, position)
    signature, flags, method = record[0], record[3], record[4]
    packed, size, n_name, n_extra, n_comment = record[8:13]
    header = record[16]
    names = position + _CENTRAL.size
    following = names + n_name + n_extra + n_comment
    if signature != b"PK\x01\x02" or following > end:
        raise ValueError("the directory of the zip is damaged")
    try:
        name = bytes(data[names : names + n_name]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("the zip holds an entry whose name is not UTF-8") from error
    extra = bytes(data[names + n_name : names + n_name + n_extra])
    size, packed, header = _widen(extra, size, packed, header)
    if flags & _ENCRYPTED:
        raise ValueError(f"the zip entry {name!r} is encrypted")
    if method != 0 or packed != size:
        raise ValueError(
            f"the zip entry {name!r} is compressed; torch.save and numpy.savez store "
            "entries as they are: save the file again with one of them"
        )
    return name, header, size, following


def _widen(extra: bytes, *fields: int) -> list[int]:
    """Size, packed size and place, each from the 64-bit extra record if it is full."""
    wide = b""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = extra[position + 4 : position + 4 + length]
        position += 4 + length
    values = []
    for field in fields:
        if field == 0xFFFFFFFF:
            if len(wide) < 8:
                raise ValueError("the directory of the zip lacks a 64-bit size")
            field, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        values.append(field)
    return values


def _content_span(
    data: memoryview, name: str, header: int, size: int, directory: int
) -> Span:
    """Where the content behind a local header lies."""
    if header + _LOCAL.size > directory:
        raise ValueError(f"the zip entry {name!r} lies outside the file")
    record = _LOCAL.unpack_from(data, header)
    n_name, n_extra = record[9], record[10]
    start = header + _LOCAL.size + n_name + n_extra
    if record[0] != b"PK\x03\x04" or start + size > directory:
        raise ValueError(f"the zip entry {name!r} lies outside the file")
    local_name = data[header + _LOCAL.size : header + _LOCAL.size + n_name]
    if bytes(local_name) != name.encode("utf-8"):
        raise ValueError(f"the zip entry {name!r} has another name at its content")
    return Span(start, size)
