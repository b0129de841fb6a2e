import struct
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx import device_index, retrieval
from rvc_mlx.device_index import DeviceIndex
from rvc_mlx.retrieval import read_index

FLT_MAX = np.finfo(np.float32).max


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def nearest_on_device(index, queries, *rest, **options):
    return DeviceIndex(index).nearest(mx.array(queries), *rest, **options)


def blend_on_device(features, index, rate):
    result = DeviceIndex(index).blend(mx.array(features), rate)
    return np.array(result)


@pytest.fixture(params=["host", "device"])
def search(request):
    """``nearest`` and ``blend`` of numpy arrays, where they are computed."""
    if request.param == "host":
        return SimpleNamespace(
            nearest=retrieval.nearest, blend=retrieval.blend_features, name="host"
        )
    return SimpleNamespace(
        nearest=nearest_on_device, blend=blend_on_device, name="device"
    )


@pytest.fixture
def shortened_products(monkeypatch):
    """MLX's matrix products, their factors cut to 11 bits, as a GPU may do it."""
    addmm = mx.addmm

    def short(x):
        return (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32)

    def shortened(c, a, b):
        return addmm(c, short(a), short(mx.contiguous(b)))

    monkeypatch.setattr(mx, "addmm", shortened)


def clustered(rng, n, width, centres=12, spread=0.3):
    middle = rng.standard_normal((centres, width))
    x = middle[rng.integers(0, centres, n)] + spread * rng.standard_normal((n, width))
    return x.astype(np.float32)


def faiss_index(vectors, nlist, nprobe=1):
    """An index trained as RVC does, the cells from the vectors themselves."""
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)
    quantizer = faiss.IndexFlatL2(vectors.shape[1])
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], nlist)
    index.cp.min_points_per_centroid = 1  # no warning for tiny cells
    index.cp.niter = 4
    index.train(vectors)
    index.nprobe = nprobe
    index.add(vectors)
    return index


def saved(index, path):
    import faiss

    faiss.write_index(index, str(path))
    return read_index(path)


def assert_same_search(got, expected):
    """Ids in the same order; distances to the rounding of a float32 sum."""
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[0].dtype == np.float32
    assert got[1].dtype == np.int64


@pytest.mark.parametrize("nprobe", [1, 4])
@pytest.mark.parametrize(
    ("n", "width", "nlist"),
    [(5, 4, 1), (30, 8, 3), (400, 16, 8), (3000, 64, 219), (2000, 256, 51)],
)
def test_search_gives_what_faiss_gives(search, rng, tmp_path, n, width, nlist, nprobe):
    vectors = clustered(rng, n, width)
    queries = clustered(rng, 150, width)
    queries[:20] = vectors[rng.integers(0, n, 20)]  # exact hits
    reference = faiss_index(vectors, nlist, nprobe)
    index = saved(reference, tmp_path / "added.index")
    assert len(index) == n
    assert index.width == width
    assert index.nprobe == min(nprobe, nlist)
    assert index.metric == 1
    assert index.centroids.shape == (nlist, width)
    assert sum(len(ids) for ids in index.list_ids) == n
    np.testing.assert_array_equal(index.vectors, reference.reconstruct_n(0, n))
    assert_same_search(search.nearest(index, queries), reference.search(queries, 8))
    assert_same_search(
        search.nearest(index, queries[:1], k=3), reference.search(queries[:1], 3)
    )


@pytest.mark.parametrize("block_bytes", [1 << 12, 1 << 26])
@pytest.mark.parametrize("queries", [1, 3, 200])
def test_exact_search_is_brute_force(
    search, rng, tmp_path, monkeypatch, queries, block_bytes
):
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(device_index, "_TABLE_BYTES", block_bytes)
    vectors, q = clustered(rng, 3000, 32), clustered(rng, queries, 32)
    index = saved(faiss_index(vectors, 60), tmp_path / "added.index")
    squared = ((q[:, None].astype(np.float64) - vectors) ** 2).sum(2)
    order = np.argsort(squared, 1)[:, :8]
    expected = np.take_along_axis(squared, order, 1), order
    assert_same_search(search.nearest(index, q, exact=True), expected)


def test_search_survives_a_large_common_offset(search, rng, tmp_path):
    """|q|^2 - 2 q.r + |r|^2 alone would drown in rounding here."""
    vectors = clustered(rng, 1500, 16) + np.float32(500)
    queries = clustered(rng, 300, 16) + np.float32(500)
    reference = faiss_index(vectors, 4)
    index = saved(reference, tmp_path / "added.index")
    _, ids = search.nearest(index, queries, exact=True)
    squared = ((queries[:, None].astype(np.float64) - vectors) ** 2).sum(2)
    np.testing.assert_array_equal(ids, np.argsort(squared, 1)[:, :8])


def test_many_queries_in_several_blocks(search, rng, tmp_path, monkeypatch):
    vectors, queries = clustered(rng, 500, 8), clustered(rng, 100, 8)
    index = saved(faiss_index(vectors, 5), tmp_path / "added.index")
    whole = search.nearest(index, queries)
    monkeypatch.setattr(retrieval, "_QUERY_BLOCK", 7)
    monkeypatch.setattr(device_index, "_TABLE_BYTES", 7 * 4 * 500)
    assert_same_search(search.nearest(index, queries), whole)


def test_a_device_is_given_no_more_rows_than_its_sort_takes(rng, tmp_path, monkeypatch):
    vectors, queries = clustered(rng, 50, 8), clustered(rng, 20, 8)
    index = saved(faiss_index(vectors, 5), tmp_path / "added.index")
    whole = nearest_on_device(index, queries)
    parts = DeviceIndex(index)._parts(200_000, 8)
    lengths = [part.stop - part.start for part in parts]
    assert sum(lengths) == 200_000
    assert max(lengths) < 1 << 16
    monkeypatch.setattr(device_index, "_MOST_QUERIES", 7)
    assert_same_search(nearest_on_device(index, queries), whole)


@pytest.mark.usefixtures("shortened_products")
@pytest.mark.parametrize("offset", [0, 100])
def test_products_of_few_bits_are_enough(rng, tmp_path, offset):
    vectors = clustered(rng, 4000, 256, centres=3, spread=0.02) + np.float32(offset)
    queries = clustered(rng, 40, 256, centres=3, spread=0.02) + np.float32(offset)
    queries[:20] = vectors[:20] + np.float32(0.001)
    reference = faiss_index(vectors, 70)
    index = saved(reference, tmp_path / "added.index")
    squared = ((queries[:, None].astype(np.float64) - vectors) ** 2).sum(2)
    _, ids = nearest_on_device(index, queries, exact=True)
    np.testing.assert_array_equal(ids, np.argsort(squared, 1)[:, :8])
    _, expected = retrieval.nearest(index, queries)
    np.testing.assert_array_equal(nearest_on_device(index, queries)[1], expected)


def test_wide_tables_find_the_smallest_on_the_device(rng):
    table = rng.random((40, 64 * 40)).astype(np.float32)
    table[4, -20:] = -1
    columns = np.array(device_index._smallest(mx.array(table), 16))
    got = np.sort(np.take_along_axis(table, columns, 1), 1)
    np.testing.assert_array_equal(got, np.sort(table, 1)[:, :16])


def test_wide_tables_find_the_smallest(rng):
    table = rng.random((40, 64 * 40 + 13)).astype(np.float32)
    table[3] = 0.5  # all equal
    table[4, -20:] = -1
    got = np.sort(np.take_along_axis(table, retrieval._smallest(table, 16), 1), 1)
    np.testing.assert_array_equal(got, np.sort(table, 1)[:, :16])


def test_flat_index_is_searched_exactly(search, rng, tmp_path):
    faiss = pytest.importorskip("faiss")
    vectors, queries = clustered(rng, 300, 16), clustered(rng, 50, 16)
    reference = faiss.IndexFlatL2(16)
    reference.add(vectors)
    index = saved(reference, tmp_path / "flat.index")
    np.testing.assert_array_equal(index.vectors, vectors)
    assert_same_search(search.nearest(index, queries), reference.search(queries, 8))


def test_trained_files_hold_no_vectors(search, rng, tmp_path):
    faiss = pytest.importorskip("faiss")
    reference = faiss_index(clustered(rng, 400, 8), 8)
    reference.reset()
    path = tmp_path / "trained.index"
    index = saved(reference, path)
    assert b"sprs" in path.read_bytes()
    assert len(index) == 0
    assert index.vectors.shape == (0, 8)
    distances, ids = search.nearest(index, np.zeros((3, 8), np.float32))
    assert (ids == -1).all()
    assert (distances == FLT_MAX).all()
    with pytest.raises(ValueError, match="added_"):
        search.blend(np.zeros((3, 8), np.float32), index, 0.5)
    empty = saved(faiss.IndexFlatL2(8), path)
    assert (search.nearest(empty, np.zeros((3, 8), np.float32))[1] == -1).all()


def test_few_filled_lists_are_stored_sparsely(search, rng, tmp_path):
    reference = faiss_index(clustered(rng, 400, 8), 40)
    reference.reset()
    few = clustered(rng, 5, 8, centres=1, spread=0.01)
    reference.add(few)
    index = saved(reference, tmp_path / "few.index")
    assert b"sprs" in (tmp_path / "few.index").read_bytes()
    np.testing.assert_array_equal(index.vectors, few)
    queries = clustered(rng, 50, 8)
    expected = reference.search(queries, 8)
    assert (expected[1] == -1).all(1).any()  # some meet an empty cell
    assert_same_search(search.nearest(index, queries), expected)


@pytest.mark.parametrize("kind", ["Array", "Hashtable"])
def test_direct_maps_are_skipped(rng, tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    vectors = clustered(rng, 100, 8)
    reference = faiss_index(vectors, 4)
    reference.set_direct_map_type(getattr(faiss.DirectMap, kind))
    index = saved(reference, tmp_path / "map.index")
    np.testing.assert_array_equal(index.vectors, vectors)


def old_layout(index, kind):
    """The bytes that faiss wrote before inverted lists were objects of their own."""
    import faiss

    def vector(array, unit):
        raw = np.ascontiguousarray(array).tobytes()
        return struct.pack("<Q", len(raw) // unit) + raw

    def header(count):
        return struct.pack("<iqqqBi", index.d, count, 1 << 20, 1 << 20, 1, 1)

    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    lists = [
        faiss.rev_swig_ptr(index.invlists.get_ids(i), index.get_list_size(i)).copy()
        for i in range(index.nlist)
    ]
    vectors = index.reconstruct_n(0, index.ntotal)
    out = kind + header(index.ntotal) + struct.pack("<QQ", index.nlist, index.nprobe)
    out += b"IxFl" + header(index.nlist) + vector(centroids, 4)
    out += b"".join(vector(ids, 8) for ids in lists)
    out += struct.pack("<BQ", 0, 0)
    unit = 1 if kind == b"IvFL" else 4
    return out + b"".join(vector(vectors[ids], unit) for ids in lists)


@pytest.mark.parametrize("kind", [b"IvFL", b"IvFl"])
def test_older_layouts_are_read(search, rng, tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    vectors = clustered(rng, 90, 8)
    reference = faiss_index(vectors, 4)
    reference.make_direct_map()
    path = tmp_path / "old.index"
    path.write_bytes(old_layout(reference, kind))
    queries = clustered(rng, 20, 8)
    index = read_index(path)
    np.testing.assert_array_equal(index.vectors, vectors)
    expected = faiss.read_index(str(path)).search(queries, 8)
    assert_same_search(search.nearest(index, queries), expected)


# Files that are refused


def good_bytes(rng, tmp_path):
    path = tmp_path / "good.index"
    saved(faiss_index(clustered(rng, 60, 4), 3), path)
    return path.read_bytes()


def test_every_cut_is_noticed(rng, tmp_path):
    whole = good_bytes(rng, tmp_path)
    path = tmp_path / "cut.index"
    for size in [*range(1, 300, 3), *range(300, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut off or damaged"):
            read_index(path)


@pytest.mark.parametrize("place", [4, 8, 37, 94])  # width, count, nlist, a length
def test_absurd_sizes_are_refused_before_memory_is_taken(rng, tmp_path, place):
    data = bytearray(good_bytes(rng, tmp_path))
    data[place : place + 8] = b"\xff\xff\xff\x3f\xff\xff\xff\x3f"
    path = tmp_path / "absurd.index"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_index(path)


def test_random_damage_never_crashes(search, rng, tmp_path):
    whole = good_bytes(rng, tmp_path)
    path = tmp_path / "damaged.index"
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, 220, 3):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            search.nearest(read_index(path), np.zeros((2, 4), np.float32))
        except ValueError as error:
            assert str(path) in str(error) or "features" in str(error)  # noqa: PT017


def test_other_kinds_of_index_are_named(tmp_path):
    faiss = pytest.importorskip("faiss")
    path = tmp_path / "other.index"
    for factory, metric, name in [
        ("HNSW8,Flat", faiss.METRIC_L2, "HNSW"),
        ("IDMap,Flat", faiss.METRIC_L2, "id map"),
        ("Flat", faiss.METRIC_INNER_PRODUCT, "inner product"),
        ("SQ8", faiss.METRIC_L2, "scalar quantizer"),
    ]:
        faiss.write_index(faiss.index_factory(8, factory, metric), str(path))
        with pytest.raises(ValueError, match=name):
            read_index(path)


def test_files_that_are_no_index_are_refused(tmp_path):
    path = tmp_path / "x.index"
    path.write_bytes(b"hello, this is text")
    with pytest.raises(ValueError, match="'hell'"):
        read_index(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        read_index(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_index(tmp_path / "missing.index")
    with pytest.raises(IsADirectoryError, match="folder"):
        read_index(tmp_path)


def test_numbers_that_are_not_finite_are_refused(search, rng, tmp_path):
    vectors = clustered(rng, 100, 8)
    vectors[40, 3] = np.nan
    faiss = pytest.importorskip("faiss")
    reference = faiss.IndexFlatL2(8)
    reference.add(vectors)
    index = saved(reference, tmp_path / "nan.index")
    with pytest.raises(ValueError, match="not finite"):
        search.nearest(index, vectors[:2])
    with pytest.raises(ValueError, match="not finite"):
        search.nearest(index, vectors[40:41])


def test_wrong_queries_are_refused(search, rng, tmp_path):
    index = saved(faiss_index(clustered(rng, 60, 4), 3), tmp_path / "a.index")
    with pytest.raises(ValueError, match="4 wide"):
        search.nearest(index, np.zeros((3, 8), np.float32))
    with pytest.raises(ValueError, match="neighbours"):
        search.nearest(index, np.zeros((3, 4), np.float32), k=0)
    assert search.nearest(index, np.zeros((0, 4), np.float32))[1].shape == (0, 8)


# Blending


def blended(features, distances, ids, vectors, rate):
    """The formula of the original, row by row in float64."""
    out = features.astype(np.float64)
    for t, (d, i) in enumerate(zip(distances, ids, strict=True)):
        weights = np.where(i >= 0, 1 / np.maximum(d.astype(np.float64), 1e-8) ** 2, 0)
        if weights.sum():
            mean = (weights / weights.sum()) @ vectors[i]
            out[t] = rate * mean + (1 - rate) * out[t]
    return out


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_blend_follows_the_formula(search, rng, tmp_path, rate):
    vectors, features = clustered(rng, 400, 16), clustered(rng, 60, 16)
    features[:5] = vectors[:5]
    reference = faiss_index(vectors, 8)
    index = saved(reference, tmp_path / "a.index")
    expected = blended(features, *reference.search(features, 8), vectors, rate)
    got = search.blend(features, index, rate)
    assert got.shape == (60, 16)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(got[:5], features[:5], atol=1e-5)  # exact hits


def test_blend_at_rate_zero_changes_nothing(search, rng, tmp_path):
    index = saved(faiss_index(clustered(rng, 60, 4), 3), tmp_path / "a.index")
    features = clustered(rng, 7, 4)
    unchanged = search.blend(features, index, 0)
    assert unchanged is features if search.name == "host" else True
    np.testing.assert_array_equal(unchanged, features)
    assert search.blend(features[:0], index, 0.5).shape == (0, 4)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="index rate"):
            search.blend(features, index, rate)


def test_rows_without_a_neighbour_keep_their_features(search, rng, tmp_path):
    reference = faiss_index(clustered(rng, 400, 8), 40)
    reference.reset()
    few = clustered(rng, 3, 8, centres=1, spread=0.01)
    reference.add(few)
    index = saved(reference, tmp_path / "few.index")
    features = np.concatenate([clustered(rng, 50, 8), few])
    distances, ids = reference.search(features, 8)
    alone = (ids == -1).all(1)
    assert alone.any()
    assert not alone.all()
    got = search.blend(features, index, 0.5)
    np.testing.assert_array_equal(got[alone], features[alone])
    np.testing.assert_allclose(
        got, blended(features, distances, ids, few, 0.5), atol=1e-6
    )
