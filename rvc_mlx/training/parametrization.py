"""Trainable parameters: weight-normed weights in two parts, upstream's names.

A trained network is a flat dict of ``mx.array`` in MLX's layout. Where upstream
normalises a weight, the dict holds ``X.weight_g`` and ``X.weight_v`` in place of
``X.weight = g * v / ||v||`` (Salimans & Kingma 2016), the norm over all axes on which g
has length 1: all but torch's first, which for a transposed convolution is its input
channel and lies last in MLX's layout.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from rvc_mlx.elementwise import on_cuda
from rvc_mlx.training.discriminators import Discriminator
from rvc_mlx.training.forward import training_network
from rvc_mlx.training.presets import TrainingConfig
from rvc_mlx.training.weight_norm import folding, piece_rows

Parameters = dict[str, mx.array]

_NORMED = re.compile(
    r"(flow\.flows\.\d+|enc_q)\.enc\.(in_layers|res_skip_layers|cond_layer)\b.*"
    r"|dec\.(ups|upsamples|resblocks|mrfs)\..*"
    r"|discriminators\..*"
)
_NORMED_IN_MRF = ("dec.conv_pre", "dec.conv_post")
_TRANSPOSED = re.compile(r"dec\.(ups|upsamples)\.")
_PERIOD = re.compile(r"discriminators\.[1-9]")
_SPELLINGS = (
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
)


_ALIGNED = 8  # values: 16 bytes in half precision, which products on a GPU rely on


class Packing:
    """Many arrays as one vector: an optimiser then runs a few kernels, not thousands.

    Each array starts at a multiple of ``_ALIGNED``; the values between are 0.

    Args:
        shapes: by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = dict(shapes)
        self._slots: list[tuple[str, int]] = []  # name, "" for a gap, and values
        for name, shape in shapes.items():
            size = math.prod(shape)
            self._slots.append((name, size))
            if gap := -size % _ALIGNED:
                self._slots.append(("", gap))
        ends = np.cumsum([size for _, size in self._slots]).tolist()
        self._starts, self._ends = [0, *ends[:-1]], ends[:-1]

    def pack(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """Arrays of these names as ``[n]``."""
        dtype = next(iter(arrays.values())).dtype
        return mx.concatenate(
            [
                arrays[name].reshape(-1) if name else mx.zeros((size,), dtype)
                for name, size in self._slots
            ]
        )

    def unpack(self, vector: mx.array) -> Parameters:
        """The arrays in a vector of ``pack``; they share its memory."""
        slots = zip(self._slots, mx.split(vector, self._ends), strict=True)
        return {
            name: part.reshape(self._shapes[name]) for (name, _), part in slots if name
        }

    def plain(self, vector: mx.array, exact: str, dtype: mx.Dtype) -> Parameters:
        """What ``folded`` gives for the arrays in a vector, on CUDA in one kernel.

        Args:
            vector: of ``pack``, float32.
            exact: what the names of weights start with that stay float32.
            dtype: of the others.
        """
        if not on_cuda():
            weights = folded(self.unpack(vector))
            return {
                name: value if name.startswith(exact) else value.astype(dtype)
                for name, value in weights.items()
            }
        plain = self._folding(vector)
        parts = self.unpack(plain.astype(dtype))
        if dtype != plain.dtype:
            float32 = self.unpack(plain).items()
            parts |= {k: v for k, v in float32 if k.startswith(exact)}
        return {
            _plain_name(name): value
            for name, value in parts.items()
            if not name.endswith(".weight_g")
        }

    def slope(self, vector: mx.array, of_plain: Mapping[str, mx.array]) -> mx.array:
        """Slope of a vector, of those of the weights that ``plain`` makes of it.

        To differentiate through ``plain`` would be the same, but not to trace: MLX takes
        seconds for one operation of a thousand results.

        Args:
            vector: of ``pack``, float32.
            of_plain: a slope for each of the weights, of any precision.

        Returns:
            ``[n]`` float32.
        """
        slopes = {name: value.astype(mx.float32) for name, value in of_plain.items()}
        if on_cuda():
            joined = self.pack(
                {
                    name: mx.zeros(shape)
                    if name.endswith(".weight_g")
                    else slopes[_plain_name(name)]
                    for name, shape in self._shapes.items()
                }
            )
            _, [slope] = mx.vjp(self._folding, [vector], [joined])
            return slope
        parts = self.unpack(vector)

        def weights(*arrays: mx.array) -> list[mx.array]:
            return list(folded(dict(zip(parts, arrays, strict=True))).values())

        plain = (_plain_name(n) for n in parts if not n.endswith(".weight_g"))
        wanted = [slopes[name] for name in plain]
        _, found = mx.vjp(weights, list(parts.values()), wanted)
        return self.pack(dict(zip(parts, found, strict=True)))

    @cached_property
    def _folding(self) -> Callable[..., mx.array]:
        return folding(self.rows())

    def rows(self) -> list[tuple[int, int, int, int]]:
        """The vector as ``weight_norm.folding`` wants to be told of it."""
        slots = list(zip(self._slots, self._starts, strict=True))
        starts = {name: start for (name, _), start in slots}
        rows = []
        for (name, size), start in slots:
            if name.endswith(".weight_v"):
                g_name = f"{name[:-1]}g"
                g, places = self._shapes[g_name], starts[g_name]
                count = math.prod(g)  # of norms; their axis is the first or the last
                first = g[0] == count
                step, along = (1, size // count) if first else (count, 1)
                rows += [
                    (start + i * along, size // count, step, places + i)
                    for i in range(count)
                ]
            elif not name.endswith(".weight_g"):
                rows += piece_rows(start, size)
        return rows


def _plain_name(name: str) -> str:
    return name.removesuffix("_v") if name.endswith(".weight_v") else name


def folded(parameters: Mapping[str, mx.array]) -> Parameters:
    """Plain weights ``X.weight`` of all pairs; other parameters as they are.

    Args:
        parameters: float32 by name.
    """
    plain = {}
    for name, value in parameters.items():
        if name.endswith(".weight_v"):
            plain[_plain_name(name)] = _folded(value, parameters[name[:-1] + "g"])
        elif not name.endswith(".weight_g"):
            plain[name] = value
    return plain


def _folded(v: mx.array, g: mx.array) -> mx.array:
    axes = [axis for axis in range(g.ndim) if g.shape[axis] == 1]
    if axes != list(range(1, g.ndim)):
        return v * (g / mx.sqrt(mx.sum(mx.square(v), axis=axes, keepdims=True)))
    # v / ||v|| is v by its root mean square by sqrt(n), which is one kernel each way.
    rows = v.reshape(len(v), -1)
    unit = mx.fast.rms_norm(rows, None, 0.0).reshape(v.shape)
    return unit * (g * rows.shape[1] ** -0.5)


def _to_mlx_axes(name: str, ndim: int) -> tuple[int, ...]:
    """Torch axis of each axis that a parameter has in MLX."""
    if ndim < 3 or name.endswith(("emb_rel_k", "emb_rel_v")):
        return tuple(range(ndim))
    return (1, 2, 0) if _TRANSPOSED.match(name) else (0, 2, 1)


def from_torch(tensors: Mapping[str, np.ndarray]) -> Parameters:
    """Parameters of a torch state dict.

    Args:
        tensors: by name, any float type, torch's layout; weight norm in either
            spelling (``weight_g`` or ``parametrizations.weight.original0``).

    Returns:
        float32 in MLX's layout. The ``(5, 1)`` kernels of period discriminators lose
        their last axis.
    """
    parameters = {}
    for name, tensor in tensors.items():
        for theirs, ours in _SPELLINGS:
            name = name.replace(theirs, ours)
        value = np.asarray(tensor, np.float32)
        if _PERIOD.match(name) and value.ndim == 4:
            value = value[..., 0]
        value = value.transpose(_to_mlx_axes(name, value.ndim))
        parameters[name] = mx.array(np.ascontiguousarray(value))
    return parameters


def to_torch(parameters: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    """The exact inverse of `from_torch`: float32 arrays in torch's layout."""
    tensors = {}
    for name, parameter in parameters.items():
        value = np.array(parameter)
        axes = np.argsort(_to_mlx_axes(name, value.ndim))
        value = np.ascontiguousarray(value.transpose(axes))
        if _PERIOD.match(name) and value.ndim == 3:
            value = value[..., None]
        tensors[name] = value
    return tensors


def _leaves(network: nn.Module) -> list[tuple[str, mx.array]]:
    leaves = tree_flatten(network.parameters())
    assert isinstance(leaves, list)
    return leaves


def plain_shapes(config: TrainingConfig) -> tuple[dict, dict]:
    """Shapes in MLX's layout of all folded weights: generator, discriminator."""
    networks = (training_network(config), Discriminator(config))
    first, second = (
        {name: array.shape for name, array in _leaves(network)} for network in networks
    )
    return first, second


def shapes(config: TrainingConfig) -> tuple[dict, dict]:
    """Shapes in MLX's layout of all parameters: generator, discriminator."""
    mrf = config.model.vocoder == "MRF HiFi-GAN"
    first, second = (_split(plain, mrf) for plain in plain_shapes(config))
    return first, second


def _split(plain: Mapping[str, tuple[int, ...]], mrf: bool) -> dict:
    result = {}
    for name, shape in plain.items():
        module = name.removesuffix(".weight")
        normed = _NORMED.fullmatch(module) or (mrf and module in _NORMED_IN_MRF)
        if not name.endswith(".weight") or not normed:
            result[name] = shape
            continue
        axis = len(shape) - 1 if _TRANSPOSED.match(name) else 0
        g_shape = [1] * len(shape)
        g_shape[axis] = shape[axis]
        result |= {f"{name}_g": tuple(g_shape), f"{name}_v": shape}
    return result


def require_same(what: str, given: Mapping, wanted: Mapping) -> None:
    """Compare what is known of parameters, by name.

    Args:
        what: whose they are, for the message.
        given: name to shape, or to anything that is to be equal.
        wanted: likewise.

    Raises:
        ValueError: they differ; every difference is named.
    """
    wrong = [f"{k}: missing" for k in wanted if k not in given]
    wrong += [f"{k}: unexpected" for k in given if k not in wanted]
    wrong += [
        f"{k}: {given[k]}, expected {wanted[k]}"
        for k in wanted
        if k in given and given[k] != wanted[k]
    ]
    if wrong:
        raise ValueError(
            f"the {what} does not fit the configuration: " + "; ".join(wrong)
        )


def initial(config: TrainingConfig, seed: int) -> tuple[Parameters, Parameters]:
    """Random parameters as upstream's are: torch's defaults, with these exceptions.

    The flow's last convolutions are 0, so that it starts as the identity; queries, keys
    and values are Xavier uniform; relative positions have deviation ``width ** -0.5``.
    Unlike upstream's, a single harmonic's weight before the tanh is 1: a random one is
    near 0 for some seeds, and the vocoder then learns to do without the pitch.

    Args:
        config: sizes.
        seed: 0 or more; each tensor has a stream of its own.

    Returns:
        Generator and discriminator.
    """
    first, second = (_draw_all(names, seed) for names in shapes(config))
    return first, second


def _draw_all(names: Mapping[str, tuple[int, ...]], seed: int) -> Parameters:
    values = {
        name: _draw(
            name, names, np.random.default_rng([seed, zlib.crc32(name.encode())])
        )
        for name in names
        if not name.endswith("weight_g")
    }
    for name in names:
        if name.endswith("weight_g"):
            v, shape = values[f"{name[:-1]}v"], names[name]
            axes = tuple(axis for axis, length in enumerate(shape) if length == 1)
            values[name] = np.sqrt(np.square(v).sum(axes, keepdims=True))
    return {name: mx.array(values[name].astype(np.float32)) for name in names}


_SOURCE = "dec.m_source.l_linear.weight"


def _draw(
    name: str, names: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> np.ndarray:
    shape = names[name]
    source = names.get(_SOURCE) == (1, 1) and name.startswith("dec.m_source.")
    if name.endswith("gamma") or (source and name == _SOURCE):
        return np.ones(shape)
    if (
        name.endswith("beta")
        or source
        or re.fullmatch(r"flow\.flows\.\d+\.post\..*", name)
    ):
        return np.zeros(shape)
    if "emb_rel" in name:
        return rng.standard_normal(shape) / np.sqrt(shape[-1])
    if name in ("emb_g.weight", "enc_p.emb_pitch.weight"):
        return rng.standard_normal(shape)
    if re.search(r"conv_[qkv]\.weight$", name):
        bound = np.sqrt(6 / (shape[0] + shape[-1]))
    else:
        stem = name.rsplit(".", 1)[0]
        weight = next(
            names[n] for n in (f"{stem}.weight", f"{stem}.weight_v") if n in names
        )
        # torch counts axis 1 of its layout: outputs, for a transposed convolution.
        fan_in = np.prod(weight[:-1] if _TRANSPOSED.match(name) else weight[1:])
        bound = 1 / np.sqrt(fan_in)
    return rng.uniform(-bound, bound, shape)
