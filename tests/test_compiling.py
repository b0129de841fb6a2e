"""Graphs that are built once: what they give, when they are built, how many are kept."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx import compiling
from rvc_mlx.compiling import Replayed


@pytest.fixture(autouse=True)
def _on_cpu():
    with mx.stream(mx.cpu):
        yield


class Counted:
    """A function, and the shapes that it was asked for in Python."""

    def __init__(self):
        self.shapes = []

    def __call__(self, x, y):
        self.shapes.append((x.shape, x.dtype))
        return mx.exp(x) @ y - 1


def arrays(rng, n, dtype=mx.float32):
    x, y = rng.standard_normal((n, 3)), rng.standard_normal((3, 2))
    return mx.array(x.astype(np.float32)).astype(dtype), mx.array(y, mx.float32)


def check(replayed, x, y):
    expected = mx.exp(x) @ y - 1
    np.testing.assert_allclose(replayed(x, y), expected, rtol=1e-6)


def test_a_graph_is_kept_from_the_second_call_with_a_shape(rng):
    counted = Counted()
    replayed = Replayed(counted)
    for n in (4, 4, 4, 5, 4, 5, 5, 4):
        check(replayed, *arrays(rng, n))
    assert [shape[0] for shape, _ in counted.shapes] == [4, 4, 5, 5]
    for _ in range(3):
        check(replayed, *arrays(rng, 4, mx.float16))
    assert counted.shapes[4:] == 2 * [((4, 3), mx.float16)]


def test_a_graph_is_kept_at_once_if_asked(rng):
    counted = Counted()
    replayed = Replayed(counted, at_once=True)
    for n in (4, 5, 5, 4, 4, 6, 6):  # but for the very first, which is built as ever
        check(replayed, *arrays(rng, n))
    assert [shape[0] for shape, _ in counted.shapes] == [4, 5, 4, 6]

    def work():
        with mx.stream(mx.cpu):
            check(replayed, *arrays(rng, 7))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    assert list(replayed._graphs.values())[-1] is None


def test_the_newest_graphs_are_kept(rng):
    counted = Counted()
    replayed = Replayed(counted, kept=2)
    for n in (1, 1, 2, 2, 1, 3, 3, 1, 2):  # 3 takes the place of 2, and 2 that of 3
        check(replayed, *arrays(rng, n))
    assert [shape[0] for shape, _ in counted.shapes] == [1, 1, 2, 2, 3, 3, 2]
    assert len(replayed._graphs) == 2


def test_each_thread_has_graphs_of_its_own(rng):
    counted = Counted()
    replayed = Replayed(counted)
    given = arrays(rng, 4)
    mx.eval(given)
    for _ in range(3):
        check(replayed, *given)

    def work():
        with mx.stream(mx.cpu):
            for _ in range(3):
                check(replayed, *given)

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()
    assert len(counted.shapes) == 6


def test_what_a_function_holds_is_computed_once(rng, tmp_path):
    """Not again in each replay: the graph must not hold how it came about."""
    held = mx.array(rng.standard_normal((64, 64)).astype(np.float32))
    held = mx.linalg.inv(held + 64 * mx.eye(64), stream=mx.cpu)  # not computed yet
    replayed = Replayed(lambda x: x @ held)
    x = mx.ones((2, 64))
    for _ in range(3):
        mx.eval(replayed(x))
    [graph] = replayed._graphs.values()
    mx.export_to_dot(str(tmp_path / "graph.dot"), graph(x))
    text = (tmp_path / "graph.dot").read_text()
    assert "Matmul" in text
    assert "Inverse" not in text


def test_nothing_is_fused_and_the_mode_is_put_back(rng, monkeypatch):
    modes = []
    switch = compiling._switch()
    monkeypatch.setattr(
        compiling, "_switch", lambda: lambda mode: (modes.append(mode), switch(mode))
    )
    replayed = Replayed(Counted())
    for _ in range(4):
        check(replayed, *arrays(rng, 4))
    assert modes == [compiling._NO_FUSE, compiling._ENABLED]
    # A trace within a trace leaves the mode to the outer one.
    inner = compiling.compiled(lambda x: x + 1, "traced")
    outer = compiling.compiled(lambda x: inner(x) * 2, "traced")
    modes.clear()
    assert outer(mx.array(3)).item() == 8
    assert modes == [compiling._NO_FUSE, compiling._NO_FUSE, compiling._ENABLED]


def test_who_disables_compilation_is_heard(rng, monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    switch = compiling._switch()
    monkeypatch.setattr(compiling, "_switch", lambda: pytest.fail("switched"))
    with compiling._unfused():
        pass
    assert switch


def test_a_failing_function_is_asked_again(rng):
    def refuse(x, y):
        if len(x) == 3:
            raise ValueError("three are too many")
        return x @ y

    replayed = Replayed(refuse)
    x, y = arrays(rng, 3)
    for _ in range(3):  # the first failure makes no second call of it
        with pytest.raises(ValueError, match="too many"):
            replayed(x, y)
    np.testing.assert_allclose(replayed(x[:2], y), x[:2] @ y, rtol=1e-6)
