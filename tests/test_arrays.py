"""Arrays on the host and on a device."""

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx.arrays import (
    neighbours,
    one_ahead,
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
    assert isinstance(together([x, y]), type(x))
    mixed = together([np.array([[1, 2]]), mx.array([[3, 4]])])
    assert isinstance(mixed, mx.array)
    assert mixed.tolist() == [[1, 2], [3, 4]]


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
