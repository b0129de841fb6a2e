"""The text encoder and the inverted flow on CUDA, in less than half the launches.

They are short, so what they cost is mostly that each operation has to be launched:

* One product makes q, k and v, and one kernel lays them out by heads, padded.
* Scores of relative positions, padding and softmax are one pass over a row of scores.
* Convolutions along time become one product over windows of frames, bias included; its
  library needs no plan for a new length, which a convolution's does.
* Flips of the flow's channels go into the weights of the couplings between them.

It serves whole sequences only, as a conversion has them: there is no mask, but what is behind
a sequence's own rows (``steady``) is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from rvc_mlx.arrays import zeros_behind
from rvc_mlx.cuda_kernel import CudaKernel, Grid
from rvc_mlx.elementwise import EACH_PACK, PACK, pack_grid
from rvc_mlx.fused_norm import added_norm
from rvc_mlx.models.synthesizer import Synthesizer
from rvc_mlx.models.vits import (
    RELATIVE_WINDOW,
    Encoder,
    RelativeAttention,
    ResidualCouplingFlow,
    ResidualCouplingLayer,
)
from rvc_mlx.steady import OwnRows, Rows, own_rows, told_kernel
from rvc_mlx.windows import linear, windows

_THREADS = 256  # that make a row of scores
_OFFSETS = 2 * RELATIVE_WINDOW + 1
_ROW_STEP = 16 * 1024  # bytes; a kernel is compiled for each multiple of it
# Bytes of a row of scores that a block keeps, as every card's can: two minutes. Of longer
# rows it makes each score three times.
_LONGEST_ROW = 48 * 1024

_PACKS = EACH_PACK + "const int channel = i % width;\n"
_HEADS = CudaKernel(
    "heads",
    ("qkv",),
    ("q", "k", "v"),
    _PACKS
    + r"""
const int padded = L + 2 * WINDOW, row = i / width;
const int t = row % padded - WINDOW, head = row / padded % heads;
const int batch = row / padded / heads;
Pack key, value;
#pragma unroll
for (int n = 0; n < PACK; n++) key.v[n] = value.v[n] = T(0.f);
if (t >= 0 && t < L) {
    const Pack* in = (const Pack*)qkv +
        ((size_t)(batch * L + t) * 3 * heads + head) * width + channel;
    ((Pack*)q)[((size_t)(batch * heads + head) * L + t) * width + channel] = in[0];
    key = in[heads * width];
    value = in[2 * heads * width];
}
((Pack*)k)[i] = key;
((Pack*)v)[i] = value;
""",
    (("packs", "int"), ("width", "int"), ("L", "int"), ("heads", "int")),
)
_SOFTMAX = CudaKernel(
    "relative_softmax",
    ("scores", "offsets", "own"),
    ("weights", "nearby"),
    r"""
extern __shared__ float row[];
__shared__ float partial[THREADS / 32];
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
const int N = L + 2 * WINDOW, near = blockIdx.x % L, last = limited ? own[0] : L;
const size_t first = (size_t)blockIdx.x * N;
const size_t first_offset = (size_t)blockIdx.x * (2 * WINDOW + 1);
const auto score = [&](int n) {
    float found = float(scores[first + n]);
    if (n < WINDOW || n >= last + WINDOW) found -= 1e4f;
    const int offset = n - near;
    if (offset >= 0 && offset <= 2 * WINDOW)
        found += float(offsets[first_offset + offset]);
    return found;
};

float top = -3.4e38f;
for (int n = threadIdx.x; n < N; n += THREADS) {
    const float found = score(n);
    if (KEPT) row[n] = found;
    top = fmaxf(top, found);
}
#pragma unroll
for (int k = 16; k > 0; k /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
if (lane == 0) partial[warp] = top;
__syncthreads();
#pragma unroll
for (int k = 0; k < THREADS / 32; k++) top = fmaxf(top, partial[k]);
__syncthreads();

float sum = 0.f;
for (int n = threadIdx.x; n < N; n += THREADS) {
    const float weight = expf((KEPT ? row[n] : score(n)) - top);
    if (KEPT) row[n] = weight;
    sum += weight;
}
#pragma unroll
for (int k = 16; k > 0; k /= 2) sum += __shfl_xor_sync(~0u, sum, k);
if (lane == 0) partial[warp] = sum;
__syncthreads();
sum = 0.f;
#pragma unroll
for (int k = 0; k < THREADS / 32; k++) sum += partial[k];

for (int n = threadIdx.x; n < N; n += THREADS) {
    const T weight = T((KEPT ? row[n] : expf(score(n) - top)) / sum);
    weights[first + n] = weight;
    const int offset = n - near;
    if (offset >= 0 && offset <= 2 * WINDOW) nearby[first_offset + offset] = weight;
}
""",
    (("L", "int"), ("limited", "int")),
)
# A thread takes as many channels of both halves.
GATE = CudaKernel(
    "gate",
    ("x",),
    ("y",),
    _PACKS
    + r"""
const int first = i / width * 2 * width + channel, second = first + width;
const Pack a = ((const Pack*)x)[first], b = ((const Pack*)x)[second];
Pack out;
#pragma unroll
for (int n = 0; n < PACK; n++)
    out.v[n] = T(tanhf(float(a.v[n])) / (1.f + expf(-float(b.v[n]))));
((Pack*)y)[i] = out;
""",
    (("packs", "int"), ("width", "int")),
)
_ADD_HALVES = CudaKernel(
    "add_halves",
    ("x", "total", "made"),
    ("y", "sum"),
    _PACKS
    + r"""
const Pack* halves = (const Pack*)made + (size_t)(i / width) * 2 * width + channel;
const Pack residual = halves[0], skip = halves[width], in = ((const Pack*)x)[i];
Pack before, out, all = skip;
if (has_total) before = ((const Pack*)total)[i];
#pragma unroll
for (int n = 0; n < PACK; n++) {
    out.v[n] = T(float(in.v[n]) + float(residual.v[n]));
    if (has_total) all.v[n] = T(float(before.v[n]) + float(skip.v[n]));
}
((Pack*)y)[i] = out;
((Pack*)sum)[i] = all;
""",
    (("packs", "int"), ("width", "int"), ("has_total", "int")),
)


def quicken(network: Synthesizer) -> None:
    """Let a loaded voice's prior compute this way from now on, if its widths allow it."""
    encoder, flow = network.enc_p.encoder, network.flow
    if isinstance(encoder, Encoder) and _attends(encoder):
        network.enc_p.encoder = FusedEncoder(encoder)
    if isinstance(flow, ResidualCouplingFlow) and _flows(flow):
        network.flow = InvertedFlow(flow)


def rows_of_prior(network: Synthesizer) -> Rows | None:
    """How ``Synthesizer.prior`` takes longer inputs; None if it computes in another way."""
    if not isinstance(network.enc_p.encoder, FusedEncoder):
        return None
    if not isinstance(network.flow, InvertedFlow):
        return None

    def lengthened(arrays: Sequence[mx.array], rows: int) -> list[mx.array]:
        features, noise, speaker, *pitch = arrays
        longer = [zeros_behind(a, rows) for a in (features, noise, *pitch)]
        return [*longer[:2], speaker, *longer[2:]]

    return Rows(lambda features, *_: (features.shape[1],), lengthened)


def _attends(encoder: Encoder) -> bool:
    layers = encoder.attn_layers
    if not all(isinstance(layer, RelativeAttention) for layer in layers):
        return False
    widths = [layer.emb_rel_k.shape[-1] for layer in layers]
    widths += [layer.conv_1.weight.shape[0] for layer in encoder.ffn_layers]
    return all(width % PACK == 0 for width in widths)


def _flows(flow: ResidualCouplingFlow) -> bool:
    widths = (flow.flows[0].pre.weight.shape[0], flow.flows[0].post.weight.shape[0])
    return all(width % PACK == 0 for width in widths) and flow.NUM_FLOWS % 2 == 0


def split_heads(qkv: mx.array, heads: int, B: int) -> list[mx.array]:
    """``[B * T, 3 C]`` to q ``[B, H, T, D]`` and k and v ``[B, H, T + 2 w, D]``."""
    T, D = len(qkv) // B, qkv.shape[1] // 3 // heads
    long = (B, heads, T + 2 * RELATIVE_WINDOW, D)
    packs = B * heads * long[2] * D // PACK
    return _HEADS(
        [qkv],
        [((B, heads, T, D), qkv.dtype), (long, qkv.dtype), (long, qkv.dtype)],
        pack_grid(packs),
        scalars=[packs, D // PACK, T, heads],
        constants={"T": qkv.dtype, "PACK": PACK, "WINDOW": RELATIVE_WINDOW},
    )


def relative_softmax(
    scores: mx.array, offsets: mx.array, own: OwnRows | None = None
) -> list[mx.array]:
    """Weights of all keys, and of those near each query once more.

    Args:
        scores: ``[B, H, T, T + 2 w]``; the first and last ``w`` keys are padding.
        offsets: ``[B, H, T, 2 w + 1]``, added to the scores of keys -w to w away.
        own: keys behind these are padding, too.
    """
    T, keys = scores.shape[-2:]
    kept = 4 * keys <= _LONGEST_ROW
    memory = -(-4 * keys // _ROW_STEP) * _ROW_STEP if kept else 0
    sizes = {"WINDOW": RELATIVE_WINDOW, "THREADS": _THREADS, "KEPT": kept}
    return _SOFTMAX(
        [scores, offsets, told_kernel(own)],
        [(scores.shape, scores.dtype), (offsets.shape, scores.dtype)],
        Grid(scores.size // keys, _THREADS, shared_memory=memory),
        scalars=[T, own is not None],
        constants={"T": scores.dtype, **sizes},
    )


def gated(x: mx.array) -> mx.array:
    """``models.layers.gated``."""
    packs = x.size // (2 * PACK)
    (y,) = GATE(
        [x],
        [((*x.shape[:-1], x.shape[-1] // 2), x.dtype)],
        pack_grid(packs),
        scalars=[packs, x.shape[-1] // (2 * PACK)],
        constants={"T": x.dtype, "PACK": PACK},
    )
    return y


def add_halves(x: mx.array, total: mx.array | None, made: mx.array) -> list[mx.array]:
    """``x`` plus one half of ``made`` ``[..., 2 C]``, ``total`` plus the other."""
    packs = x.size // PACK
    return _ADD_HALVES(
        [x, x if total is None else total, made],
        [(x.shape, x.dtype), (x.shape, x.dtype)],
        pack_grid(packs),
        scalars=[packs, x.shape[-1] // PACK, total is not None],
        constants={"T": x.dtype, "PACK": PACK},
    )


class FusedAttention(nn.Module):
    """``RelativeAttention``."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        heads, C = layer._num_heads, layer.conv_q.weight.shape[0]
        scale = (heads / C) ** 0.5
        parts = (layer.conv_q, layer.conv_k, layer.conv_v)
        weights, biases = [p.weight[:, 0] for p in parts], [p.bias for p in parts]
        weight = mx.concatenate([scale * weights[0], *weights[1:]])
        self.qkv = weight.T, mx.concatenate([scale * biases[0], *biases[1:]])
        self.out = layer.conv_o.weight[:, 0].T, layer.conv_o.bias
        self.rel_k, self.rel_v = layer.emb_rel_k[0].T, layer.emb_rel_v[0]
        self._num_heads = heads

    def __call__(self, x: mx.array, recordings: int) -> mx.array:
        """``[B * T, C]`` of B recordings to ``[B * T, C]``."""
        q, k, v = split_heads(linear(x, self.qkv), self._num_heads, recordings)
        scores, offsets = q @ k.swapaxes(-1, -2), q @ self.rel_k
        weights, nearby = relative_softmax(scores, offsets, own_rows())
        y = mx.addmm(weights @ v, nearby, self.rel_v)
        return linear(y.swapaxes(1, 2).reshape(x.shape), self.out)


class FusedFFN(nn.Module):
    """``FFN``."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.first, self.second = map(_of_windows, (layer.conv_1, layer.conv_2))
        self._taps = layer.conv_1.weight.shape[1]

    def __call__(self, x: mx.array, recordings: int) -> mx.array:
        """``[B * T, C]`` of B recordings to ``[B * T, C]``."""
        for layer, slope in ((self.first, 1.0), (self.second, 0.0)):
            x = windows(
                x, self._taps, own=own_rows(), slope=slope, recordings=recordings
            )
            x = linear(x, layer)
        return x


class FusedEncoder(nn.Module):
    """``Encoder``."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.attn_layers = list(map(FusedAttention, encoder.attn_layers))
        self.ffn_layers = list(map(FusedFFN, encoder.ffn_layers))
        self.norm_layers_1 = encoder.norm_layers_1
        self.norm_layers_2 = encoder.norm_layers_2

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        """``[B, T, C]`` to ``[B, T, C]``."""
        _refuse(mask)
        rows, B = x.flatten(0, 1), len(x)
        layers = (
            *(self.attn_layers, self.norm_layers_1),
            *(self.ffn_layers, self.norm_layers_2),
        )
        for attend, norm_1, feed, norm_2 in zip(*layers, strict=True):
            made = attend(rows, B)
            rows = added_norm(rows, made, norm_1.gamma, norm_1.beta, norm_1._eps)
            made = feed(rows, B)
            rows = added_norm(rows, made, norm_2.gamma, norm_2.beta, norm_2._eps)
        return rows.reshape(x.shape)


class InvertedFlow(nn.Module):
    """``ResidualCouplingFlow`` with ``reverse``."""

    def __init__(self, flow: ResidualCouplingFlow):
        super().__init__()
        layers = [one for one in flow.flows if isinstance(one, ResidualCouplingLayer)]
        # Run backwards; in front of every second one channels are turned round.
        self.couplings = [
            _Shift(layer, turned=i % 2 == 0) for i, layer in enumerate(layers[::-1])
        ]

    def __call__(
        self,
        x: mx.array,
        g: mx.array,
        mask: mx.array | None = None,
        reverse: bool = False,
    ) -> mx.array:
        """``[B, T, C]`` and speaker ``[B, 1, gin]`` to ``[B, T, C]``."""
        _refuse(mask)
        if not reverse:
            raise ValueError("this flow runs backwards only; load the voice again")
        second, first = map(mx.contiguous, mx.split(x.flatten(0, 1), 2, axis=-1))
        for coupling in self.couplings:
            second = second - coupling(first, g[:, 0], len(x))
            first, second = second, first
        return mx.concatenate([second, first], axis=-1).reshape(x.shape)


class _Shift(nn.Module):
    """What a ``ResidualCouplingLayer`` takes off one half, from the other half."""

    def __init__(self, layer: ResidualCouplingLayer, turned: bool):
        super().__init__()
        wn, order = layer.enc, slice(None, None, -1 if turned else 1)
        self.pre = mx.contiguous(layer.pre.weight[:, 0, order]).T, layer.pre.bias
        self.post = (
            mx.contiguous(layer.post.weight[order, 0]).T,
            mx.contiguous(layer.post.bias[order]),
        )
        inner = mx.concatenate([one.bias for one in wn.in_layers])
        self.condition = wn.cond_layer.weight[:, 0].T, wn.cond_layer.bias + inner
        self.in_weights = [_of_windows(one)[0] for one in wn.in_layers]
        self.res_skip = [(one.weight[:, 0].T, one.bias) for one in wn.res_skip_layers]
        self._taps = wn.in_layers[0].weight.shape[1]

    def __call__(self, x: mx.array, g: mx.array, recordings: int) -> mx.array:
        """``[B * T, C / 2]`` and speakers ``[B, gin]``, or one for all, to ``[B * T, C / 2]``."""
        x = linear(x, self.pre)
        conditions = mx.split(linear(g, self.condition), len(self.in_weights), axis=-1)
        total: mx.array | None = None
        for weight, condition, res_skip in zip(
            self.in_weights, conditions, self.res_skip, strict=True
        ):
            seen = windows(x, self._taps, own=own_rows(), recordings=recordings)
            if len(g) == 1:  # as a bias, it costs no launch
                inner = mx.addmm(condition.flatten(), seen, weight)
            else:
                each = (seen @ weight).reshape(recordings, -1, weight.shape[1])
                inner = (each + condition[:, None]).flatten(0, 1)
            made = linear(gated(inner), res_skip)
            if made.shape[-1] == x.shape[-1]:  # the last
                total = made if total is None else total + made
            else:
                x, total = add_halves(x, total, made)
        assert total is not None
        return linear(total, self.post)


def _of_windows(layer: nn.Module) -> tuple[mx.array, mx.array]:
    """Weight ``[taps * C_in, C_out]`` of a convolution's windows, and bias."""
    return layer.weight.flatten(1).T, layer.bias


def _refuse(mask: mx.array | None) -> None:
    if mask is not None:
        raise ValueError("there is no mask here; it serves whole sequences")
