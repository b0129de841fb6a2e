"""Reader of the index files that RVC trains with faiss: IVF-Flat, or plain Flat.

Little endian throughout. An inverted file ("IwFl") holds, in this order::

    fourcc, header    d int32, count int64, 2 x int64, trained uint8, metric int32
    nlist, nprobe     uint64 each
    coarse quantizer  fourcc "IxF2", header, uint64 count, float32 centroids
    direct map        type uint8, int64 vector, pairs of int64 where the type is 2
    inverted lists    "ilar", nlist, code size, "full" or "sprs" and the list sizes,
                      then for each list its codes (the vectors), then its ids

Source: faiss ``impl/index_read.cpp``, ``read_index`` and ``read_InvertedLists``.
"""

import os
import struct
from pathlib import Path

import numpy as np

from .feature_index import Index

_METRIC_L2 = 1
_FLAT = ("IxF2", "IxFl", "IxFI")
_INVERTED = ("IwFl", "IvFL", "IvFl")  # the last two: before inverted lists were objects
_MAX_WIDTH = 1 << 20
_KNOWN = {
    "IHN": "an HNSW graph",
    "IxM": "an id map",
    "IxP": "a product quantizer or a transformed index",
    "IwPQ": "an inverted file with product quantizer",
    "IvPQ": "an inverted file with product quantizer",
    "IwSq": "an inverted file with scalar quantizer",
    "IxSQ": "a scalar quantizer",
    "IwFd": "an inverted file without duplicates",
    "IBx": "a binary index",
    "ilod": "inverted lists on disk in another file",
    "il00": "no inverted lists",
}


def read_index(path: str | os.PathLike[str]) -> Index:
    """Open an index file of a voice.

    Args:
        path: ``added_*.index``, or a ``trained_*.index``, which holds no vectors yet.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is cut off, damaged, or another kind of index.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder was given; give one .index file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; copy the index again")
    cursor = _Cursor(path)
    kind = cursor.fourcc()
    if kind in _FLAT:
        return _read_flat(cursor)
    if kind in _INVERTED:
        return _read_inverted(cursor, kind)
    raise cursor.unsupported(kind)


class _Cursor:
    """Reads fields one after another and never beyond the end of the file."""

    def __init__(self, path: Path):
        self.path = path
        self.data = np.asarray(np.memmap(path, np.uint8, "r"))
        self.position = 0

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: a damaged index file ({what}); copy it again")

    def unsupported(self, kind: str) -> ValueError:
        name = next((v for k, v in _KNOWN.items() if kind.startswith(k)), None)
        given = f"{name} ({kind!r})" if name else f"it starts with {kind!r}"
        return ValueError(
            f"{self.path}: not an index that RVC writes: {given}; expected IVF-Flat or "
            "Flat with L2 distances, as RVC's index training makes"
        )

    def skip(self, size: int, what: str) -> int:
        """Step over ``size`` bytes and return where they start."""
        start = self.position
        if size < 0 or size > len(self.data) - start:
            raise ValueError(
                f"{self.path}: the index file is cut off or damaged: {what} needs "
                f"{size} bytes at {start} of {len(self.data)}; copy it again"
            )
        self.position += size
        return start

    def unpack(self, layout: str, what: str) -> tuple[int, ...]:
        """Return the fields of a packed little-endian layout."""
        start = self.skip(struct.calcsize("<" + layout), what)
        return struct.unpack("<" + layout, self.data[start : self.position].tobytes())

    def fourcc(self) -> str:
        """Return the four characters that name what follows."""
        start = self.skip(4, "a four-character code")
        return self.data[start : self.position].tobytes().decode("latin-1")

    def array(self, dtype: str, count: int, what: str) -> np.ndarray:
        """Return ``[count]`` numbers, copied."""
        start = self.skip(count * np.dtype(dtype).itemsize, what)
        return np.array(self.data[start : self.position]).view(dtype)

    def vector(self, dtype: str, what: str) -> np.ndarray:
        """Return an array that is stored behind its own length."""
        return self.array(dtype, self.unpack("Q", what)[0], what)

    def header(self) -> tuple[int, int]:
        """Return the width and the count of the header that every index has."""
        width, count, _, _, _, metric = self.unpack("iqqqBi", "the header")
        if not 0 < width <= _MAX_WIDTH or count < 0:
            raise self.damaged(f"{count} vectors of width {width}")
        if metric != _METRIC_L2:
            name = "inner product" if metric == 0 else f"metric {metric}"
            raise ValueError(
                f"{self.path}: this index measures {name}; expected L2 distances, as "
                "RVC's index training makes"
            )
        return width, count


def _read_flat(cursor: _Cursor) -> Index:
    """Read the rest of a flat index: one cell, ids in order, no centroids."""
    width, count = cursor.header()
    (length,) = cursor.unpack("Q", "the vectors")
    if length != count * width:
        raise cursor.damaged(f"{length} numbers for {count} vectors of width {width}")
    offset = cursor.skip(4 * length, "the vectors")
    return Index(
        path=cursor.path,
        width=width,
        centroids=np.empty((0, width), np.float32),
        nprobe=1,
        metric=_METRIC_L2,
        data=cursor.data,
        offsets=np.array([offset]),
        starts=np.array([0, count]),
        ids=np.arange(count),
    )


def _read_inverted(cursor: _Cursor, kind: str) -> Index:
    """Read the rest of an inverted file."""
    width, count = cursor.header()
    nlist, nprobe = cursor.unpack("QQ", "the number of cells")
    if not nlist or not nprobe:
        raise cursor.damaged(f"{nlist} cells, {nprobe} of them searched")
    centroids = _read_centroids(cursor, nlist, width)
    old_ids = None
    if kind != "IwFl":  # ids came first, list by list
        old_ids = [cursor.vector("<i8", f"the ids of cell {i}") for i in range(nlist)]
    _skip_direct_map(cursor)
    if old_ids is None:
        offsets, ids = _read_lists(cursor, nlist, width)
    else:
        offsets, ids = _read_old_lists(cursor, old_ids, width, kind), old_ids
    starts = np.concatenate(([0], np.cumsum([len(x) for x in ids])))
    joined = np.concatenate(ids)
    if len(joined) != count or not np.array_equal(np.sort(joined), np.arange(count)):
        raise cursor.damaged(
            f"{count} vectors promised, the lists hold {len(joined)}; their ids must "
            "be 0, 1, 2 ... once each"
        )
    return Index(
        path=cursor.path,
        width=width,
        centroids=centroids,
        nprobe=min(nprobe, nlist),
        metric=_METRIC_L2,
        data=cursor.data,
        offsets=np.array(offsets),
        starts=starts,
        ids=joined,
    )


def _read_centroids(cursor: _Cursor, nlist: int, width: int) -> np.ndarray:
    """Read the coarse quantizer, a flat index of nlist vectors."""
    kind = cursor.fourcc()
    if kind not in _FLAT:
        raise cursor.unsupported(kind)
    quantizer = _read_flat(cursor)
    if len(quantizer) != nlist or quantizer.width != width:
        raise cursor.damaged(
            f"{len(quantizer)} centroids of width {quantizer.width} for {nlist} cells "
            f"of width {width}"
        )
    return quantizer.rows(0, nlist)


def _skip_direct_map(cursor: _Cursor) -> None:
    """Step over the table from ids to places, which is not needed."""
    (kind,) = cursor.unpack("B", "the direct map")
    if kind > 2:
        raise cursor.damaged(f"direct map of type {kind}")
    for size in (8, 16) if kind == 2 else (8,):
        (length,) = cursor.unpack("Q", "the direct map")
        cursor.skip(size * length, "the direct map")


def _read_lists(
    cursor: _Cursor, nlist: int, width: int
) -> tuple[list[int], list[np.ndarray]]:
    """Return where the vectors of each cell lie, and their ids."""
    kind = cursor.fourcc()
    if kind != "ilar":
        raise cursor.unsupported(kind)
    lists, code_size = cursor.unpack("QQ", "the inverted lists")
    if lists != nlist or code_size != 4 * width:
        raise cursor.damaged(
            f"{lists} lists of {code_size}-byte vectors for {nlist} cells of width "
            f"{width}"
        )
    offsets, ids = [], []
    for cell, size in enumerate(_read_sizes(cursor, nlist)):
        offsets.append(cursor.skip(code_size * size, f"the vectors of cell {cell}"))
        ids.append(cursor.array("<i8", size, f"the ids of cell {cell}"))
    return offsets, ids


def _read_sizes(cursor: _Cursor, nlist: int) -> list[int]:
    """Return the number of vectors in each cell."""
    kind = cursor.fourcc()
    table = cursor.vector("<i8", "the list sizes")
    if kind == "full" and len(table) == nlist:
        sizes = table
    elif kind == "sprs" and len(table) % 2 == 0:
        cells, filled = table[::2], table[1::2]
        if len(cells) and not 0 <= cells.min() <= cells.max() < nlist:
            raise cursor.damaged(f"a list number outside 0..{nlist - 1}")
        sizes = np.zeros(nlist, np.int64)
        sizes[cells] = filled
    else:
        raise cursor.damaged(f"list sizes {kind!r} of length {len(table)}")
    if len(sizes) and sizes.min() < 0:
        raise cursor.damaged("a list of negative size")
    return sizes.tolist()


def _read_old_lists(
    cursor: _Cursor, ids: list[np.ndarray], width: int, kind: str
) -> list[int]:
    """Return where the vectors of each cell lie in the two older layouts."""
    unit = 1 if kind == "IvFL" else 4  # lengths count bytes, or floats
    offsets = []
    for cell, numbers in enumerate(ids):
        what = f"the vectors of cell {cell}"
        (length,) = cursor.unpack("Q", what)
        if length * unit != 4 * width * len(numbers):
            raise cursor.damaged(f"{length} units of vectors for {len(numbers)} ids")
        offsets.append(cursor.skip(length * unit, what))
    return offsets
