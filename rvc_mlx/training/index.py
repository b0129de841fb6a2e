"""The retrieval index of a voice: its features, in cells, as faiss writes them.

Source: RVC ``train_index`` (classic WebUI), with its formula for the number of cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rvc_mlx.training.features import FEATURES, from_elsewhere
from rvc_mlx.training.files import write_bytes

MAX_ROWS = 200_000  # beyond, k-means centres stand for the features
CENTRES = 10_000
_ITERATIONS = 20
_ADDED_AT_ONCE = 8192
_FEWEST_PER_CELL = 39  # faiss's own minimum


def count_cells(rows: int) -> int:
    """Cells of an index of so many rows: 16 * sqrt(rows), at least 39 rows in each."""
    return max(1, min(int(16 * np.sqrt(rows)), rows // _FEWEST_PER_CELL))


def build_index(
    features: str | Path | np.ndarray,
    path: str | Path,
    version: str,
    *,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    centres: int = CENTRES,
) -> Path:
    """Build an index with faiss.

    Args:
        features: ``[n, C]`` float32, or the folder of a voice in training.
        path: the file to write; a folder gets the original's name for it, such as
            ``added_IVF512_Flat_nprobe_1_name_v2.index``.
        version: ``"v1"`` or ``"v2"``, for that name.
        seed: of the shuffle and of k-means.
        max_rows: beyond, k-means centres stand for the features.
        centres: of k-means.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: faiss is not installed.
        ValueError: no features, of different widths, or not finite.
        OSError: the features cannot be read or the file not written.
    """
    faiss = _faiss()
    name = "" if isinstance(features, np.ndarray) else Path(features).absolute().name
    rows = features if isinstance(features, np.ndarray) else read_features(features)
    rows = np.ascontiguousarray(rows, np.float32)
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise ValueError(
            f"features of shape {rows.shape}; expected [n, C] finite numbers, n >= 1"
        )
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    if len(rows) > max_rows:
        rows = _centres(faiss, rows, centres, seed)
    cells = count_cells(len(rows))
    index = faiss.index_factory(rows.shape[1], f"IVF{cells},Flat")
    index.cp.min_points_per_centroid = 1  # no advice about few points on stderr
    index.cp.seed = seed + 1  # faiss takes 0 as any
    index.nprobe = 1
    index.train(rows)
    for start in range(0, len(rows), _ADDED_AT_ONCE):
        index.add(rows[start : start + _ADDED_AT_ONCE])
    path = Path(path)
    if path.is_dir():
        title = f"_{name}" if name else ""
        path /= f"added_IVF{cells}_Flat_nprobe_1{title}_{version}.index"
    write_bytes(path, memoryview(faiss.serialize_index(index)))
    return path


def read_features(folder: str | Path) -> np.ndarray:
    """All features of a voice in training, by name: ``[n, C]`` float32.

    Of a run's folder those of its clips; what lies beside them (see ``filelist``) is
    somebody else's.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged, or they differ in width.
    """
    folder = Path(folder)
    if (folder / FEATURES).is_dir():
        folder /= FEATURES
    of_run = folder.name == FEATURES
    paths = sorted(
        path for path in folder.glob("*.npy") if not (of_run and from_elsewhere(path))
    )
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no features (.npy) in this folder; run the extraction first"
        )
    arrays: list[np.ndarray] = []
    for path in paths:
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: not a readable .npy file ({error})") from error
        if array.ndim != 2 or (arrays and array.shape[1] != arrays[0].shape[1]):
            raise ValueError(
                f"{path}: features of shape {array.shape}; expected [F, C] as wide as "
                f"the others; extract them all with one encoder"
            )
        arrays.append(array.astype(np.float32, copy=False))
    return np.concatenate(arrays)


def _centres(faiss: Any, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centres of k-means, ``[count, C]`` float32."""
    means = faiss.Kmeans(
        rows.shape[1],
        count,
        niter=_ITERATIONS,
        seed=seed + 1,
        min_points_per_centroid=1,  # no advice about few points on stderr
    )
    means.train(rows)
    return means.centroids


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ModuleNotFoundError(
            "building an index needs faiss; install it with: pip install "
            "'rvc-mlx[train]'"
        ) from error
    return faiss
