"""The content encoder's attention on CUDA: its own source on the processor, and on a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_on_processor import as_on_processor, bits, needs_compiler, results

from rvc_mlx import attention_kernel, conv_kernel
from rvc_mlx.attention_kernel import self_attention
from rvc_mlx.steady import OwnRows

needs_gpu = pytest.mark.skipif(
    not conv_kernel.supports(32, 3, mx.float32), reason="needs a CUDA GPU like an H100"
)
HALVES = [mx.float16, mx.bfloat16]

_MAIN = r"""
void kernel(const T* qkv, const int* own, T* y, int frames, int heads, int limited,
            float scale) {
%s
}
int main(int, char** arguments) {
    lazy = *arguments[1] == '1';
    auto n = read_array<int>("numbers");
    auto qkv = read_array<T>("qkv");
    std::vector<T> y(qkv.size() / 3, T(NAN));
    body = [&] {
        kernel(qkv.data(), &n[6], y.data(), n[2], n[3], n[4], __int_as_float(n[5]));
    };
    for (unsigned b = 0; b < (unsigned)n[0]; b++)
        for (unsigned i = 0; i < (unsigned)n[1]; i++) {
            blockIdx = {i, b, 0};
            run_block(32 * WARPS, SHARED_MEMORY);
        }
    FILE* file = fopen("y", "wb");
    fwrite(y.data(), sizeof(T), y.size(), file);
    fclose(file);
}
"""


def operands(rng, B, F, heads, dtype):
    """Queries and keys that make a few keys count, and unlike values."""
    qkv = rng.standard_normal((B, F, 3, heads, 64)) * np.array([2, 2, 1])[:, None, None]
    qkv[:, :, 2] += np.arange(64) / 16
    return mx.array(qkv.reshape(B, F, -1).astype(np.float32)).astype(dtype)


def expected(qkv, heads, own=None):
    B, F, width = qkv.shape
    parts = np.array(qkv.astype(mx.float32), np.float64).reshape(B, F, 3, heads, -1)
    q, k, v = parts.transpose(2, 0, 3, 1, 4)
    scores = (q @ k.swapaxes(-1, -2) / 8)[..., :own]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    y = weights / weights.sum(axis=-1, keepdims=True) @ v[..., :own, :]
    return y.transpose(0, 2, 1, 3).reshape(B, F, width // 3)


def worst(y, qkv, heads, own=None):
    y = np.array(y.astype(mx.float32))
    return np.abs(y - expected(qkv, heads, own)).max()


def own_rows(own, rows):
    return None if own is None else OwnRows(mx.array([own]), rows)


def tolerance(dtype):
    return 4e-2 if dtype == mx.bfloat16 else 5e-3  # of values up to 8


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "own"),
    [
        *(((1, 1, 1), None), ((2, 64, 1), None), ((1, 65, 2), None)),
        *(((1, 200, 1), None), ((1, 200, 1), 100), ((2, 70, 1), 64), ((1, 70, 1), 1)),
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_source_attends(tmp_path, rng, monkeypatch, shape, own, dtype):
    launched = []

    def launch(inputs, outputs, grid, *, scalars, constants):
        launched.append((grid, scalars, constants))
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(attention_kernel, "_KERNEL", launch)
    with mx.stream(mx.cpu):
        qkv = operands(rng, *shape, dtype)
        self_attention(qkv.flatten(0, 1), shape[2], own_rows(own, shape[1]), shape[0])
        ((grid, (frames, heads, limited, scale), constants),) = launched
        bits(qkv).tofile(tmp_path / "qkv")
        exact = int(np.float32(scale).view(np.int32))
        numbers = [grid.rows, grid.blocks, frames, heads, limited, exact, own or 0]
        np.array(numbers, np.int32).tofile(tmp_path / "numbers")
        assert grid.threads == 32 * constants["WARPS"]
        constants |= {"SHARED_MEMORY": grid.shared_memory}
        main = _MAIN % as_on_processor(attention_kernel._SOURCE)
        for y in results(tmp_path, constants, main, dtype):
            y = y.reshape(*qkv.shape[:2], -1)
            assert worst(y, qkv, shape[2], own) < tolerance(dtype)


def test_what_it_does_not_serve_is_refused():
    for x, recordings in (
        (mx.zeros((5, 192)), 1),
        (mx.zeros((5, 200), mx.float16), 1),
        (mx.zeros((0, 192), mx.float16), 1),
        (mx.zeros((5, 192), mx.float16), 2),
    ):
        with pytest.raises(ValueError, match="the kernel wants float16 or bfloat16"):
            self_attention(x, 1, recordings=recordings)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 63, 2), (2, 64, 12), (1, 129, 12), (1, 1599, 12)]
)
@pytest.mark.parametrize("part", [1.0, 0.7, 0.01])
def test_attention_equals_numpy(rng, shape, dtype, part):
    qkv, heads = operands(rng, *shape, dtype), shape[2]
    own = None if part == 1 else max(int(part * shape[1]), 1)
    rows, told = qkv.flatten(0, 1), own_rows(own, shape[1])
    y = self_attention(rows, heads, told, shape[0]).reshape(*shape[:2], -1)
    assert worst(y, qkv, heads, own) < tolerance(dtype)
