"""Arrays on the host and on a device."""

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx.arrays import (
    Excerpt,
    neighbours,
    one_ahead,
    reflected,
    reflected_together,
    steady_length,
    together,
    zeros_behind,
)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, ["begin 0", "give 0"]),
        (3, ["begin 0", "begin 1", "give 0", "begin 2", "give 1", "give 2"]),
    ],
)
def test_one_ahead_gives_an_array_once_the_next_is_begun(count, expected):
    events = []

    def arrays():
        for i in range(count):
            events.append(f"begin {i}")
            yield np.array(i)

    for x in one_ahead(arrays()):
        events.append(f"give {x}")
    assert events == expected


@pytest.mark.parametrize(
    ("items", "most", "expected"),
    [
        ([], 9, []),
        ([3], 0, [[3]]),
        ([3, 3, 3], 0, [[3], [3], [3]]),
        ([3, 3, 3], 5, [[3], [3], [3]]),
        ([3, 3, 3], 6, [[3, 3], [3]]),
        ([3, 3, 3, 4, 4, 3], 9, [[3, 3, 3], [4, 4], [3]]),
        ([20, 3, 3], 9, [[20], [3, 3]]),
    ],
)
def test_equal_neighbours_go_together_as_far_as_they_may(items, most, expected):
    assert list(neighbours(items, lambda x: x, lambda x: x, most)) == expected


def test_a_full_run_is_given_before_the_next_item_is_made():
    made = []

    def items():
        for n in range(5):
            made.append(n)
            yield n

    runs = neighbours(items(), lambda _: 0, lambda _: 1, 2)
    assert next(runs) == [0, 1]
    assert made == [0, 1]


@pytest.mark.parametrize("kind", [np.array, mx.array])
def test_arrays_are_joined_or_repeated(kind):
    x, y = kind([[1.0, 2.0]]), kind([[3.0, 4.0]])
    assert together([x]) is x
    assert np.array(together([x, y])).tolist() == [[1, 2], [3, 4]]
    assert np.array(together([x, x, x])).tolist() == [[1, 2]] * 3
    two = together([x, y])
    assert np.array(together([two, x])).tolist() == [[1, 2], [3, 4], [1, 2]]
    assert np.array(together([two, two])).tolist() == [[1, 2], [3, 4]] * 2
    assert isinstance(together([x, y]), type(x))
    mixed = together([np.array([[1, 2]]), mx.array([[3, 4]])])
    assert isinstance(mixed, mx.array)
    assert mixed.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind", [np.array, mx.array])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("pads", [(4, 0), (0, 4), (1, 3), (0, 0)])
def test_the_last_axis_is_reflected(rng, kind, shape, pads):
    x = rng.standard_normal(shape).astype(np.float32)
    found = reflected(kind(x), *pads)
    expected = np.pad(x, [(0, 0)] * (x.ndim - 1) + [pads], mode="reflect")
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_reflected_is_not_copied():
    x = np.ones((2, 3))
    assert reflected(x, 0, 0) is x
    assert np.shares_memory(reflected_together([Excerpt(x[0])]), x)


@pytest.mark.parametrize("kind", [np.array, mx.array])
def test_excerpts_of_one_length_once_reflected_go_together(rng, kind, monkeypatch):
    shapes = [(7, 2, 1), (7, 2, 1), (7, 1, 2), (10, 0, 0), (8, 2, 0), (8, 2, 0)]
    made = [(rng.standard_normal(n).astype(np.float32), pads) for n, *pads in shapes]
    calls = []

    def watched(x, *pads):
        calls.append((len(x), *pads))
        return reflected(x, *pads)

    monkeypatch.setattr("rvc_mlx.arrays.reflected", watched)
    found = reflected_together([Excerpt(kind(x), *pads) for x, pads in made])
    expected = [np.pad(x, pads, mode="reflect") for x, pads in made]
    assert isinstance(found, type(kind([])))
    np.testing.assert_array_equal(found, expected)
    assert calls == [(2, 2, 1), (1, 1, 2), (1, 0, 0), (2, 2, 0)]


@pytest.mark.parametrize("least", [1, 32])
def test_steady_lengths_are_few_and_little_longer(least):
    found = [steady_length(n, least, 256) for n in range(1, 4097)]
    for n, length in enumerate(found, 1):
        assert n <= length < n + max(least, n / 8)
        assert length % least == 0
    assert len(set(found)) <= 8 * 12
    assert steady_length(9600, 32, 256) == 9728


def test_zeros_are_only_put_behind_what_is_too_short():
    x = mx.ones((2, 3, 4, 5))
    assert zeros_behind(x, 3) is x
    assert zeros_behind(x, 0) is x
    longer = zeros_behind(x, 5)
    assert longer.shape == (2, 5, 4, 5)
    assert mx.array_equal(longer[:, :3], x)
    assert not longer[:, 3:].any()
