"""What the networks share: weight layout on loading, and small layers.

Upstream checkpoints hold PyTorch layouts (channels first) and weight-normed
convolutions as pairs. Attribute names here equal the checkpoint's keys, so loading is
``fold_weight_norm`` then ``to_channels_last`` then a strict ``load_weights``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

LRELU_SLOPE = 0.1

# Where torch's weight axes go in MLX's channels-last layout.
_TRANSPOSES: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Conv1d: (0, 2, 1),
    nn.ConvTranspose1d: (1, 2, 0),
    nn.Conv2d: (0, 2, 3, 1),
    nn.ConvTranspose2d: (1, 2, 3, 0),
}


def fold_weight_norm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replace every weight-norm pair (g, v) by the weight ``g * v / ||v||``.

    Both spellings are read: ``X.weight_g``/``X.weight_v`` and
    ``X.parametrizations.weight.original0``/``original1``. The norm runs over the axes
    on which g has length 1: all but the first in RVC, all but the last in HuBERT's
    positional convolution. Folding is done in float32, before any transpose.

    Args:
        tensors: checkpoint tensors by name, any float dtype, torch layout.

    Returns:
        The same mapping with pairs folded, every float tensor as float32: the given one
        itself where it is so, and may be read-only.

    Raises:
        ValueError: a pair is incomplete.
    """
    spellings = (
        (".weight_g", ".weight_v"),
        (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    )
    folded: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        for g_suffix, v_suffix in spellings:
            if name.endswith(g_suffix):
                stem = name.removesuffix(g_suffix)
                folded[f"{stem}.weight"] = _fold(tensors, stem, g_suffix, v_suffix)
                break
            if name.endswith(v_suffix):
                if name.removesuffix(v_suffix) + g_suffix not in tensors:
                    raise ValueError(f"{name} has no {g_suffix} beside it")
                break
        else:
            is_float = np.issubdtype(value.dtype, np.floating)
            folded[name] = _as_float32(value) if is_float else value
    return folded


def _as_float32(value: np.ndarray) -> np.ndarray:
    """``value`` itself if it is aligned, contiguous float32, else a copy.

    To copy a whole network takes as long as to read it.
    """
    return np.require(value, np.float32, ["ALIGNED", "C_CONTIGUOUS"])


def _fold(
    tensors: Mapping[str, np.ndarray], stem: str, g_suffix: str, v_suffix: str
) -> np.ndarray:
    if stem + v_suffix not in tensors:
        raise ValueError(f"{stem}{g_suffix} has no {v_suffix} beside it")
    g, v = (_as_float32(tensors[stem + suffix]) for suffix in (g_suffix, v_suffix))
    axes = tuple(axis for axis in range(v.ndim) if g.shape[axis] == 1)
    return v * (g / np.sqrt(np.square(v).sum(axes, keepdims=True)))


def to_channels_last(
    model: nn.Module, tensors: Mapping[str, np.ndarray]
) -> dict[str, mx.array]:
    """Move convolution weights from torch's layout to MLX's, by layer type.

    Args:
        model: the network that will load the weights.
        tensors: weight-norm-free tensors by name, torch layout.

    Returns:
        Tensors as ``mx.array``, ready for a strict ``load_weights``.
    """
    arrays = {name: mx.array(value) for name, value in tensors.items()}
    for path, module in model.named_modules():
        axes = _TRANSPOSES.get(type(module))
        name = f"{path}.weight"
        if axes and name in arrays and arrays[name].ndim == len(axes):
            arrays[name] = mx.contiguous(arrays[name].transpose(axes))
    return arrays


def to_torch_axes(layer: nn.Module) -> tuple[int, ...]:
    """Order of a weight's axes that turns MLX's layout into torch's, () for no change."""
    axes = _TRANSPOSES.get(type(layer), ())
    return tuple(axes.index(i) for i in range(len(axes)))


def load_strictly(model: nn.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Load torch-layout tensors into ``model``, every one of them, and evaluate.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; all are named.
    """
    folded = fold_weight_norm(tensors)
    model.load_weights(list(to_channels_last(model, folded).items()), strict=True)
    model.eval()
    mx.eval(model.parameters())


def fold_batch_norm(network: nn.Module) -> None:
    """Put every batch norm that follows a convolution in a list into its weights.

    For inference only: the norms become identities.
    """
    for module in network.modules():
        for layers in module.values():
            if isinstance(layers, list):
                for i, (conv, norm) in enumerate(itertools.pairwise(layers)):
                    if isinstance(norm, nn.BatchNorm) and "weight" in conv:
                        scale = norm.weight * mx.rsqrt(norm.running_var + norm.eps)
                        conv.weight = conv.weight * scale[:, None, None, None]
                        conv.bias = norm.bias - norm.running_mean * scale
                        layers[i + 1] = nn.Identity()


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, weights named as in RVC (gamma, beta)."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.gamma = mx.ones((channels,))
        self.beta = mx.zeros((channels,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise ``[..., C]`` over its last axis."""
        return mx.fast.layer_norm(x, self.gamma, self.beta, self._eps)


def leaky_relu(x: mx.array, slope: float = LRELU_SLOPE) -> mx.array:
    """Leaky rectifier; written as one maximum, which every back end fuses."""
    return mx.maximum(x, slope * x)


def gated(x: mx.array) -> mx.array:
    """``[..., 2 C]`` to ``[..., C]``: the tangent of one half times the gate of the other."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.tanh(a) * mx.sigmoid(b)


class ResBlock(nn.Module):
    """HiFi-GAN residual block: dilated convolution, plain convolution, add; per dilation.

    Input and output ``[B, L, C]``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: tuple[int, ...],
        slope: float = LRELU_SLOPE,
    ):
        super().__init__()
        self.convs1 = [
            nn.Conv1d(
                channels,
                channels,
                kernel_size,
                padding=dilation * (kernel_size - 1) // 2,
                dilation=dilation,
            )
            for dilation in dilations
        ]
        self.convs2 = [
            nn.Conv1d(channels, channels, kernel_size, padding=(kernel_size - 1) // 2)
            for _ in dilations
        ]
        self._slope = slope

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the block to ``[B, L, C]``."""
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(leaky_relu(dilated(leaky_relu(x, self._slope)), self._slope))
        return x
