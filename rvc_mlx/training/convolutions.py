"""Ways to compute a 1-D convolution; which is fastest depends on the back end.

The results are the same, forward and backward; a layer keeps its name and weights.
On CUDA, MLX tells the slope of a weight from a plain convolution by the third axis of
its arrays: the width, in two dimensions, but the channels, in one. In one dimension
cuDNN is therefore asked for an output of a few samples by a kernel as long as the
signal. ``"batched"`` takes that slope as one batched matrix product instead. On the CPU,
MLX computes a dilated convolution number by number; ``"tapped"`` makes it a matrix
product for each tap, over views of the signal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

_PLAIN = ("native", "batched", "unfolded", "tapped")
_GROUPED = ("native", "unfolded", "windowed")
Product = Callable[[mx.array, mx.array], mx.array]  # of a signal and a weight


@dataclass(frozen=True)
class Convolutions:
    """How the training networks' convolutions are computed.

    Attributes:
        generator: ``"native"`` (the back end's), ``"batched"`` (the same, with the
            weights' slopes as one batched matrix product), ``"unfolded"`` (one matrix
            product) or ``"tapped"`` (a matrix product per tap).
        plain: likewise, for the discriminators' convolutions without groups.
        grouped: for those with groups: ``"native"``, ``"unfolded"`` (one matrix product
            for each group) or ``"windowed"`` (the same with fewer and larger copies).

    Raises:
        ValueError: a way is unknown.
    """

    generator: str = "native"
    plain: str = "native"
    grouped: str = "native"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("generator", _PLAIN),
            ("plain", _PLAIN),
            ("grouped", _GROUPED),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} convolutions {getattr(self, name)!r} are unknown; "
                    f"expected one of {allowed}"
                )

    @classmethod
    def fitting(cls) -> Convolutions:
        """The quickest way on MLX's device."""
        if mx.default_device().type == mx.DeviceType.gpu:
            return cls("batched", "batched", "windowed")
        return cls("tapped", "tapped", "unfolded")


def unfolded_conv1d(
    x: mx.array,
    weight: mx.array,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> mx.array:
    """``mx.conv1d`` as a matrix product over copied windows.

    Windows are read in blocks of ``stride`` samples, so that a kernel of K taps costs
    only ``ceil(K / stride)`` contiguous copies, forward and backward.

    Args:
        x: ``[B, L, C]``.
        weight: ``[O, K, C / groups]``.
        stride: samples between windows.
        padding: zeros on each side.
        dilation: samples between taps; 1 unless ``stride`` is 1.
        groups: blocks of channels that do not mix.

    Returns:
        ``[B, (L + 2 * padding - dilation * (K - 1) - 1) // stride + 1, O]``.
    """
    outputs = len(weight)
    x, weight = in_blocks(x, weight, stride, padding, dilation)
    B, rows, C = x.shape[0], x.shape[1], x.shape[2] // stride
    taps = weight.shape[1]
    blocks = taps // stride
    n = rows - dilation * (blocks - 1)
    places = range(0, dilation * blocks, dilation)
    windows = mx.concatenate([x[:, k : k + n] for k in places], axis=-1)
    if groups == 1:
        y = windows.reshape(B * n, taps * C) @ weight.reshape(outputs, -1).T
        return y.reshape(B, n, outputs)
    windows = windows.reshape(B * n, taps, groups, C // groups)
    windows = windows.transpose(2, 0, 1, 3).reshape(groups, B * n, -1)
    y = windows @ weight.reshape(groups, outputs // groups, -1).swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(B, n, outputs)


def in_blocks(
    x: mx.array, weight: mx.array, stride: int, padding: int, dilation: int
) -> tuple[mx.array, mx.array]:
    """Signal and kernel in blocks of ``stride`` samples, where the stride is one block.

    Args:
        x: ``[B, L, C]``.
        weight: ``[O, K, C / groups]``.
        stride: samples between windows.
        padding: zeros on each side.
        dilation: samples between taps; 1 unless ``stride`` is 1.

    Returns:
        ``[B, rows, stride * C]``, padded, and the kernel with as many zero taps behind
        as make K a multiple of ``stride``.
    """
    B, L, C = x.shape
    K = weight.shape[1]
    n = (L + 2 * padding - dilation * (K - 1) - 1) // stride + 1
    blocks = -(-K // stride)
    rows = n + dilation * (blocks - 1)
    x = mx.pad(x, [(0, 0), (padding, max(0, rows * stride - L - padding)), (0, 0)])
    x = x[:, : rows * stride].reshape(B, rows, stride * C)
    return x, mx.pad(weight, [(0, 0), (0, blocks * stride - K), (0, 0)])


def tapped_conv1d(
    x: mx.array,
    weight: mx.array,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> mx.array:
    """``mx.conv1d`` as one matrix product for each tap; arguments as `unfolded_conv1d`'s.

    Raises:
        ValueError: there is more than one group.
    """
    if groups != 1:
        raise ValueError(f"{groups} groups given; a tapped convolution has one")
    x, weight = in_blocks(x, weight, stride, padding, dilation)
    return _tapped(dilation)(x, weight.reshape(len(weight), -1, x.shape[-1]))


@cache
def _tapped(dilation: int) -> Product:
    """Convolution of stride 1 without padding, ``[B, L, C]``, ``[O, K, C]`` to ``[B, n, O]``.

    All items stand behind one another as one signal, so that what a tap sees is a view
    of whole rows; the windows that cross the border of two items are cut off::

        signal  a a a a a a b b b b b b
        tap 0   [- - - - - - - - - -]
        tap 1     [- - - - - - - - - -]      the sum's rows: a a a a x x b b b b
        tap 2       [- - - - - - - - - -]
    """

    @mx.custom_function
    def product(x: mx.array, weight: mx.array) -> mx.array:
        B, L, _ = x.shape
        reach = dilation * (weight.shape[1] - 1)
        y = _sum_of_taps(x.flatten(0, 1), weight, dilation)
        y = mx.pad(y, [(0, reach), (0, 0)]).reshape(B, L, -1)
        return y[:, : L - reach]

    @product.vjp
    def slopes(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array]:
        del output
        x, weight = primals
        (B, L, C), K = x.shape, weight.shape[1]
        reach = dilation * (K - 1)
        padded = mx.pad(cotangent, [(0, 0), (reach, reach), (0, 0)])
        backwards = weight[:, ::-1].transpose(2, 1, 0)
        for_x = _sum_of_taps(padded.flatten(0, 1), backwards, dilation)
        for_x = mx.pad(for_x, [(0, reach), (0, 0)]).reshape(B, L + reach, C)[:, :L]
        n = B * L - reach
        rows = padded[:, reach:].flatten(0, 1)[:n]  # zero where windows cross a border
        signal = x.flatten(0, 1)
        taps = [rows.T @ signal[k * dilation : k * dilation + n] for k in range(K)]
        return for_x, mx.stack(taps, axis=1)

    return cast(Product, product)


def _sum_of_taps(signal: mx.array, weight: mx.array, dilation: int) -> mx.array:
    """``[N, C]`` and ``[O, K, C]`` to ``[N - dilation * (K - 1), O]``."""
    K = weight.shape[1]
    n = len(signal) - dilation * (K - 1)
    y = signal[:n] @ weight[:, 0].T
    for k in range(1, K):
        first = k * dilation
        y = mx.addmm(y, signal[first : first + n], weight[:, k].T)
    return y


def unfolded_conv_transpose1d(
    x: mx.array, weight: mx.array, stride: int, padding: int, output_padding: int
) -> mx.array:
    """``mx.conv_transpose1d`` as one matrix product and sums of its shifted parts.

    Args:
        x: ``[B, L, C]``.
        weight: ``[O, K, C]``.
        stride: samples of output per sample of input.
        padding: samples cut off on each side.
        output_padding: samples added at the end.

    Returns:
        ``[B, (L - 1) * stride + K - 2 * padding + output_padding, O]``.
    """
    B, L, C = x.shape
    outputs, K, _ = weight.shape
    wanted = (L - 1) * stride + K - 2 * padding + output_padding
    # Each input makes `reach` strides of output; the ones of neighbours overlap.
    reach = -(-K // stride)
    weight = mx.pad(weight, [(0, 0), (0, reach * stride - K), (0, 0)])
    weight = weight.transpose(2, 1, 0).reshape(C, -1)
    parts = (x.reshape(B * L, C) @ weight).reshape(B, L, reach, stride * outputs)
    y = mx.zeros((B, L + reach - 1, stride * outputs), x.dtype)
    for r in range(reach):
        y = y + mx.pad(parts[:, :, r], [(0, 0), (r, reach - 1 - r), (0, 0)])
    y = y.reshape(B, -1, outputs)
    y = mx.pad(y, [(0, 0), (0, max(0, padding + wanted - y.shape[1])), (0, 0)])
    return y[:, padding : padding + wanted]


def with_slope(native: Product, slope: Product) -> Product:
    """``native(x, weight)``, whose slope for the weight is computed another way.

    Args:
        native: a convolution.
        slope: of input and output's slope to the weight's.
    """

    @mx.custom_function
    def product(x: mx.array, weight: mx.array) -> mx.array:
        return native(x, weight)

    @product.vjp
    def slopes(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array]:
        del output
        x, weight = primals
        _, [for_x] = mx.vjp(lambda x: native(x, weight), [x], [cotangent])
        return for_x, slope(x, cotangent)

    return cast(Product, product)


def weight_slope(
    x: mx.array,
    cotangent: mx.array,
    taps: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> mx.array:
    """Slope of a convolution's weight: one product for all taps, over shifted views.

    Items stand behind one another in as many signals as keep a GPU busy; windows that
    cross the border of two items meet zeros of the cotangent.

    Args:
        x: the convolution's input ``[B, L, C]``.
        cotangent: slope of its output, ``[B, n, O]``.
        taps: K.
        stride: samples between windows.
        padding: zeros on each side.
        dilation: samples between taps; 1 unless ``stride`` is 1.

    Returns:
        ``[O, K, C]``.
    """
    (B, L, C), (_, n, outputs) = x.shape, cotangent.shape
    blocks = -(-taps // stride)
    reach = dilation * (blocks - 1)
    rows, width = n + reach, stride * C
    x = mx.pad(x, [(0, 0), (padding, max(0, rows * stride - L - padding)), (0, 0)])
    x = x[:, : rows * stride]
    signals = _signals(B, blocks * -(-outputs // 64) * -(-width // 64))
    if signals < B:
        cotangent = mx.pad(cotangent, [(0, 0), (0, reach), (0, 0)])
    length = B // signals * rows - reach
    left = cotangent.reshape(signals, 1, -1, outputs)[:, :, :length].swapaxes(2, 3)
    views = mx.as_strided(
        x,
        (signals, blocks, length, width),
        (B // signals * rows * width, dilation * width, width, 1),
    )
    if outputs == width == 1:
        # MLX's product of a matrix and a vector reads four numbers at once where the first
        # of a batch lies at a multiple of four, and on CUDA fails where the next does not.
        left, views = mx.contiguous(left), mx.contiguous(views)
    slope = (left @ views).sum(axis=0).swapaxes(0, 1)  # [O, blocks, stride * C]
    return slope.reshape(outputs, blocks * stride, C)[:, :taps]


_TILES = 264  # of 64 by 64 numbers that a large GPU computes at once


def _signals(items: int, tiles: int) -> int:
    """How many signals to make of the items: a divisor of their number."""
    wanted = max(1, _TILES // tiles)
    return next((n for n in range(wanted, items) if items % n == 0), items)


def batched_conv1d(
    x: mx.array,
    weight: mx.array,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> mx.array:
    """``mx.conv1d`` with the weight's slope of `weight_slope`; without groups.

    One tap is a matrix product, both ways.
    """
    if groups != 1:
        raise ValueError(f"{groups} groups given; a batched convolution has one")
    taps = weight.shape[1]
    if taps == stride == 1 and padding == 0:
        return pointwise_conv1d(x, weight)
    product = with_slope(
        lambda x, w: mx.conv1d(x, w, stride, padding, dilation),
        lambda x, back: weight_slope(x, back, taps, stride, padding, dilation),
    )
    return product(x, weight)


def pointwise_conv1d(x: mx.array, weight: mx.array) -> mx.array:
    """A convolution of one tap, as the matrix product that it is.

    Args:
        x: ``[B, L, C]``.
        weight: ``[O, 1, C]``.
    """
    y = x.flatten(0, 1) @ weight[:, 0].T
    return y.reshape(*x.shape[:2], -1)


def batched_conv_transpose1d(
    x: mx.array, weight: mx.array, stride: int, padding: int, output_padding: int
) -> mx.array:
    """``mx.conv_transpose1d`` likewise: its transpose is a convolution of the slope."""
    taps = weight.shape[1]

    def slope(x: mx.array, back: mx.array) -> mx.array:
        return weight_slope(back, x, taps, stride, padding).transpose(2, 1, 0)

    product = with_slope(
        lambda x, w: mx.conv_transpose1d(x, w, stride, padding, 1, output_padding),
        slope,
    )
    return product(x, weight)


def windowed_conv1d(
    x: mx.array,
    weight: mx.array,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> mx.array:
    """``mx.conv1d`` as one matrix product for each group; dilation 1.

    Args:
        x: ``[B, L, C]``.
        weight: ``[O, K, C / groups]``.
        stride: samples between windows.
        padding: zeros on each side.
        dilation: 1.
        groups: blocks of channels that do not mix.
    """
    if dilation != 1:
        raise ValueError(f"dilation {dilation} given; a windowed convolution has 1")
    outputs = len(weight)
    x, weight = in_blocks(x, weight, stride, padding, dilation)
    B, rows = x.shape[:2]
    x = mx.transpose(x.reshape(B, rows, stride, groups, -1), (3, 0, 1, 2, 4))
    weight = weight.reshape(groups, outputs // groups, -1)
    y = cast(mx.array, _windowed(x.reshape(groups, B, rows, -1), weight))
    return mx.transpose(y, (1, 2, 0, 3)).reshape(B, -1, outputs)


def _windows(x: mx.array, blocks: int) -> mx.array:
    """``[G, B, rows, S]`` to ``[G, B * n, blocks * S]``, one copy."""
    G, B, rows, S = x.shape
    n = rows - blocks + 1
    shape, strides = (G, B, n, blocks * S), (B * rows * S, rows * S, S, 1)
    return mx.as_strided(x, shape, strides).reshape(G, B * n, blocks * S)


def _sum_of_windows(windows: mx.array, S: int) -> mx.array:
    """The transpose of `_windows`: ``[G, B, n, blocks * S]`` to ``[G, B, rows, S]``."""
    G, B, n, width = windows.shape
    blocks = width // S
    around = blocks - 1
    windows = mx.pad(windows, [(0, 0), (0, 0), (around, around), (0, 0)])
    length = (n + 2 * around) * width
    places = mx.as_strided(
        windows,
        (G, B, n + around, blocks, S),
        (B * length, length, width, width - S, 1),
        around * S,
    )
    return places.sum(axis=3)


@mx.custom_function
def _windowed(x: mx.array, weight: mx.array) -> mx.array:
    """``[G, B, rows, S]`` and ``[G, o, blocks * S]`` to ``[G, B, n, o]``."""
    G, B, rows, S = x.shape
    n = rows - weight.shape[2] // S + 1
    y = _windows(x, weight.shape[2] // S) @ weight.swapaxes(1, 2)
    return y.reshape(G, B, n, -1)


@_windowed.vjp
def _windowed_slopes(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    del output
    x, weight = primals
    G, B, n, o = cotangent.shape
    rows = cotangent.reshape(G, B * n, o)
    for_weight = rows.swapaxes(1, 2) @ _windows(x, weight.shape[2] // x.shape[3])
    for_windows = (rows @ weight).reshape(G, B, n, -1)
    return _sum_of_windows(for_windows, x.shape[3]), for_weight


_WAYS: dict[str, Callable[..., mx.array]] = {
    "batched": batched_conv1d,
    "unfolded": unfolded_conv1d,
    "tapped": tapped_conv1d,
    "windowed": windowed_conv1d,
}
_TRANSPOSED_WAYS: dict[str, Callable[..., mx.array]] = {
    "batched": batched_conv_transpose1d,
    "unfolded": unfolded_conv_transpose1d,
    "tapped": unfolded_conv_transpose1d,
}


class Convolution(nn.Module):
    """A 1-D convolution, or its transpose, computed by another function.

    Args:
        layer: whose weights and settings it has.
        compute: of input, weight and settings.
        settings: after the weight.
    """

    def __init__(
        self,
        layer: nn.Module,
        compute: Callable[..., mx.array],
        settings: tuple[int, ...],
    ):
        super().__init__()
        self.weight = layer.weight
        if "bias" in layer:
            self.bias = layer.bias
        self.dilation = settings[2] if type(layer) is nn.Conv1d else 1
        self._compute = lambda x, weight: compute(x, weight, *settings)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, C]`` to ``[B, L', O]``."""
        y = self._compute(x, self.weight)
        return y + self.bias if "bias" in self else y


def reformulate(network: nn.Module, plain: str, grouped: str) -> None:
    """Compute all 1-D convolutions of a network another way.

    Args:
        network: its layers are replaced; weights are to be bound afterwards.
        plain: for convolutions without groups, see `Convolutions`.
        grouped: for those with groups.
    """

    def replaced(layer: nn.Module) -> nn.Module:
        if type(layer) is nn.ConvTranspose1d and plain in _TRANSPOSED_WAYS:
            given = (layer.stride, layer.padding, layer.output_padding)
            return Convolution(layer, _TRANSPOSED_WAYS[plain], given)
        if type(layer) is nn.Conv1d:
            way = plain if layer.groups == 1 else grouped
            settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return Convolution(layer, _WAYS[way], settings) if way in _WAYS else layer
        return layer

    leaves = network.leaf_modules()
    network.update_modules(tree_map(replaced, leaves, is_leaf=nn.Module.is_module))
