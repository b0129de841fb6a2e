"""The noise of one conversion: the same however the work is cut."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx.noise import DeviceNoise, Noise


@pytest.mark.parametrize(
    "cuts", [(0, 1, 2, 200), (0, 63, 64, 65, 200), (0, 128, 200), (0, 150, 151, 200)]
)
@pytest.mark.parametrize(("per_frame", "channels"), [(1, 192), (7, 1), (3, 9)])
@pytest.mark.parametrize("kind", [Noise, DeviceNoise])
def test_parts_make_up_the_whole(cuts, per_frame, channels, kind):
    noise = kind(3)
    whole = noise.normal("source", 2, 0, 200, per_frame, channels)
    assert whole.shape == (200 * per_frame, channels)
    assert np.array(whole).dtype == np.float32
    parts = [
        noise.normal("source", 2, a, b, per_frame, channels)
        for a, b in itertools.pairwise(cuts)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_part_far_in_equals_the_whole_there():
    noise = Noise(0)
    whole = noise.normal("prior", 0, 0, 1000, 2, 3)
    np.testing.assert_array_equal(
        noise.normal("prior", 0, 937, 941, 2, 3), whole[2 * 937 : 2 * 941]
    )


def test_device_draws_each_block_by_its_own_key():
    noise = DeviceNoise(0)
    whole = np.array(noise.normal("prior", 0, 0, 1000, 1, 4))
    seeds = noise._seeds("prior", 0, 2)
    block = mx.random.normal((256, 4), key=mx.array(seeds.generate_state(2)))
    np.testing.assert_array_equal(whole[512:768], block)
    assert abs(whole.mean()) < 0.1
    assert abs(whole.std() - 1) < 0.1


def test_order_of_calls_does_not_matter():
    one, other = Noise(5), Noise(5)
    one.normal("prior", 0, 0, 100, 1, 4)
    one.uniform("phase", 0, 9)
    np.testing.assert_array_equal(
        one.normal("source", 1, 10, 20, 4, 1), other.normal("source", 1, 10, 20, 4, 1)
    )


@pytest.mark.parametrize("start", [0, 5, 64, 1000])
def test_no_frames(start):
    empty = Noise(0).normal("prior", 0, start, start, 3, 5)
    assert empty.shape == (0, 5)
    assert empty.dtype == np.float32


def test_values_are_standard_normal():
    values = Noise(0).normal("prior", 0, 0, 2000, 1, 192).ravel()
    n = len(values)
    assert abs(values.mean()) < 4 / np.sqrt(n)
    assert abs(values.std() - 1) < 4 / np.sqrt(2 * n)
    assert abs((values**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 4 * np.sqrt(0.22 / n)


def test_blocks_are_independent():
    blocks = Noise(0).normal("prior", 0, 0, 64 * 20, 1, 4).reshape(20, -1)
    correlation = np.corrcoef(blocks) - np.eye(20)
    assert np.abs(correlation).max() < 5 / np.sqrt(blocks.shape[1])


def test_everything_that_names_a_draw_changes_it():
    draws = [
        Noise(seed).normal(name, segment, 0, 64, 1, 8)
        for seed in (0, 1, 2**32)
        for name in ("prior", "source", "adain.0.0.0", "adain.0.0.2")
        for segment in (0, 1)
    ]
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.25


def test_segment_and_block_are_not_mixed_up():
    noise = Noise(0)
    second_block = noise.normal("prior", 0, 64, 128, 1, 4)
    second_segment = noise.normal("prior", 1, 0, 64, 1, 4)
    assert not np.array_equal(second_block, second_segment)


def test_uniform():
    values = Noise(0).uniform("phase", 0, 10_000)
    assert values.shape == (10_000,)
    assert values.dtype == np.float32
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02


def test_uniform_is_repeatable_and_named():
    noise = Noise(1)
    phase = noise.uniform("phase", 0, 9)
    np.testing.assert_array_equal(Noise(1).uniform("phase", 0, 9), phase)
    np.testing.assert_array_equal(noise.uniform("phase", 0, 4), phase[:4])
    for other in (
        Noise(2).uniform("phase", 0, 9),
        noise.uniform("phase", 1, 9),
        noise.uniform("other", 0, 9),
    ):
        assert not np.isin(other, phase).any()


def test_values_do_not_change_between_releases():
    # A change here changes every conversion with a seed: say so in the changelog.
    values = Noise(0).normal("prior", 0, 0, 1, 1, 3)[0]
    np.testing.assert_allclose(values, [0.7094175, -0.43391326, 1.6395684], rtol=1e-6)
    uniform = Noise(0).uniform("phase", 0, 3)
    np.testing.assert_allclose(
        uniform, [0.05911195, 0.95580184, 0.016088843], rtol=1e-6
    )
