"""The recurrent layer's GPU kernels: the check before use, grouping, layout, parity."""

import functools
import logging

import mlx.core as mx
import numpy as np
import pytest

from rvc_mlx import conv_kernel
from rvc_mlx import gru_kernel as module
from rvc_mlx.gru_kernel import (
    HIDDEN_SIZE,
    TOLERANCE,
    checked,
    cuda_gru,
    metal_gru,
    supports,
)
from rvc_mlx.models.rmvpe import GRU
from rvc_mlx.steady import OwnRows, telling

ON_GPU = mx.cuda.is_available() or mx.metal.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an MLX GPU")


def layer(hidden=8, inputs=16, dtype=mx.float32):
    """Input weights are multiples of 1/64: their products are exact in TF32 too."""
    rng = np.random.default_rng(3)
    gru = GRU(inputs, hidden)
    for name, weight in gru.parameters().items():
        values = rng.uniform(-0.1, 0.1, weight.shape)
        if name.startswith("weight_ih"):
            values = np.round(values * 64) / 64
        gru[name] = mx.array(values.astype(np.float32)).astype(dtype)
    return gru


def sequences(B, T, inputs=16):
    values = np.random.default_rng(4).integers(-8, 9, (B, T, inputs)) / 8
    return mx.array(values.astype(np.float32))


def stand_in(change):
    """A kernel that is the plain loop, its output changed."""

    def kernel(gru):
        return lambda x: change(gru(x))

    return kernel


def second_sequence_wrong(y):
    return mx.concatenate([y[:1], y[1:] * 1.01])


def raises_at_once(gru):
    raise RuntimeError(f"no such GPU for\n{gru.hidden_size} units.")


def raises_when_run(y):
    raise ValueError(f"threadgroup of {y.shape[0]} is too large")


WRONG = {
    "off": (stand_in(lambda y: y + 0.0312), "by 3.12e-02 at batch 1"),
    "second sequence": (stand_in(second_sequence_wrong), "at batch 2"),
    "one frame late": (stand_in(lambda y: mx.roll(y, 1, axis=1)), "differs"),
    "directions swapped": (stand_in(lambda y: mx.roll(y, 8, axis=2)), "differs"),
    "one NaN": (
        stand_in(lambda y: mx.where(mx.arange(16) == 3, float("nan"), y)),
        "not finite",
    ),
    "infinite": (stand_in(lambda y: y / 0.0), "not finite"),
    "shape": (stand_in(lambda y: y[0]), "shape"),
    "does not compile": (raises_at_once, "RuntimeError: no such GPU for 8 units."),
    "does not run": (stand_in(raises_when_run), "ValueError: threadgroup of 1"),
}


# The check ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("error", [0.0, 0.5 * TOLERANCE])
def test_a_right_kernel_is_taken_in_silence(caplog, dtype, error):
    gru = layer(dtype=dtype)
    built = []

    def kernel(given):
        built.append(given)
        return lambda x: given(x) + error

    step = checked(gru, kernel)
    assert step is not gru
    assert built[-1] is gru
    assert not caplog.records
    assert step(sequences(2, 3)).shape == (2, 3, 16)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kernel_gives_the_plain_loop_and_one_warning(caplog, case):
    kernel, reason = WRONG[case]
    gru = layer()
    with caplog.at_level(logging.INFO, "rvc_mlx"):
        assert checked(gru, kernel) is gru
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("rvc_mlx", logging.WARNING)
    message = record.getMessage()
    assert reason in message
    assert "plain loop is used instead" in message
    assert "75 times as long" in message


def test_the_check_runs_the_layers_own_recurrent_weights():
    gru = layer(dtype=mx.float16)
    seen = []

    def kernel(given):
        seen.append(given)
        return given

    checked(gru, kernel)
    probe, given = seen
    assert given is gru
    for name, weight in gru.parameters().items():
        assert probe[name].dtype == mx.float16
        if not name.startswith("weight_ih"):
            assert mx.array_equal(probe[name], weight)


def test_an_error_of_the_program_is_not_taken_for_the_kernels():
    with pytest.raises(AttributeError):
        checked(layer(), stand_in(lambda y: y.no_such_method()))


@pytest.mark.skipif(ON_GPU, reason="has an MLX GPU")
@pytest.mark.parametrize("kernel", [cuda_gru, metal_gru])
def test_without_a_gpu_the_kernels_fall_back(caplog, kernel):
    gru = layer(HIDDEN_SIZE)
    assert not supports(gru)
    assert checked(gru, kernel) is gru
    assert f"{kernel.__name__} on " in caplog.text


# Groups and layout --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("B", "sizes"), [(1, [1]), (8, [8]), (9, [8, 1]), (19, [8, 8, 3])]
)
def test_sequences_run_in_groups_that_fit(B, sizes):
    launched, results = [], []

    def scan(group, before):
        assert not results or before is results[-1]
        launched.append(group.shape[0])
        results.append(group + 1)
        return results[-1]

    x = mx.arange(B * 6).reshape(B, 3, 2)
    assert mx.array_equal(module._scan_in_groups(scan, x), x + 1)
    assert launched == sizes


def test_metal_weights_lie_four_columns_by_row():
    w_hh = np.arange(2 * 768 * 256, dtype=np.float32).reshape(2, 768, 256)
    packed = module._by_column(w_hh)
    assert packed.shape == (2, 64, 768, 4)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(packed[1, 5, 700], w_hh[1, 700, 20:24])


# On a GPU -----------------------------------------------------------------------------


@functools.lru_cache(1)
def reference(T):
    """Nine sequences through the plain loop in float32; a GPU's matmul has TF32."""
    with mx.stream(mx.cpu):
        return np.array(layer(HIDDEN_SIZE)(sequences(9, T)))


def gpu_step(dtype=mx.float32):
    kernel = metal_gru if mx.metal.is_available() else cuda_gru
    return kernel(layer(HIDDEN_SIZE, dtype=dtype))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 100, 3000])
@pytest.mark.parametrize("B", [1, 2, 9])
def test_the_kernel_equals_the_plain_loop(T, B):
    y = np.array(gpu_step()(sequences(9, T)[:B]))
    assert y.shape == (B, T, 2 * HIDDEN_SIZE)
    assert y.dtype == np.float32
    difference = np.abs(y - reference(T)[:B])
    # Sums of 256 terms in another order; the gates keep errors from growing with time.
    assert difference.max() <= 1e-5
    assert difference.mean() <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(
    not conv_kernel.supports(16, 3, mx.float16), reason="needs a CUDA GPU like an H100"
)
def test_a_sequence_ends_with_its_own_rows():
    x = mx.pad(sequences(9, 100)[:1], [(0, 0), (0, 60), (0, 0)], constant_values=1)
    with telling(OwnRows(mx.array([100]), 160)):
        y = np.array(gpu_step()(x))
    assert np.abs(y[:, :100] - reference(100)[:1]).max() <= 1e-5


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    # Weights and output rounded to the type; a float32 loop on such weights: a third.
    ("dtype", "tolerance"),
    [(mx.float16, 5e-4), (mx.bfloat16, 4e-3)],
)
def test_the_kernel_takes_and_gives_half_precision(dtype, tolerance):
    y = gpu_step(dtype)(sequences(9, 100)[:2].astype(dtype))
    assert y.dtype == dtype
    difference = np.abs(np.array(y.astype(mx.float32)) - reference(100)[:2])
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 5


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_gpus_kernel_passes_the_check(caplog, dtype):
    gru = layer(HIDDEN_SIZE, dtype=dtype)
    assert supports(gru)
    assert not supports(layer(8))
    assert checked(gru) is not gru
    assert not caplog.records
