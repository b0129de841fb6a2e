"""Arrays on the host and on a device."""

import numpy as np
import pytest

from rvc_mlx.arrays import one_ahead


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
