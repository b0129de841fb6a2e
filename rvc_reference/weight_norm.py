"""Weight-normed 1-D convolutions that keep the key names of public checkpoints.

PyTorch's own helper for the ``weight_g`` / ``weight_v`` spelling is deprecated and
its successor renames the tensors, so the two parameters are kept by hand here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WNConv1d(nn.Module):
    """Conv1d with ``W = g * v / ||v||``, the norm over all axes but ``norm_dim``.

    Args:
        cin: input channels.
        cout: output channels.
        kernel: taps.
        norm_dim: axis that keeps its own norm: 0 everywhere in RVC, 2 (one scalar
            per tap) in HuBERT's positional convolution.
        bias: whether there is a bias.
        options: ``stride``, ``padding``, ``dilation``, ``groups`` of ``F.conv1d``.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        *,
        norm_dim: int = 0,
        bias: bool = True,
        **options: int,
    ) -> None:
        super().__init__()
        self.options = options
        self.norm_dim = norm_dim
        shape = self._weight_shape(cin, cout, kernel)
        self.bias = nn.Parameter(torch.zeros(cout)) if bias else None
        bound = (shape[1] * kernel) ** -0.5
        self.weight_v = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(self._norm().detach().clone())
        self.register_buffer("fused", None, persistent=False)

    def _weight_shape(self, cin: int, cout: int, kernel: int) -> tuple[int, int, int]:
        return cout, cin // self.options.get("groups", 1), kernel

    def _norm(self) -> Tensor:
        axes = tuple(axis for axis in range(3) if axis != self.norm_dim)
        return torch.linalg.vector_norm(self.weight_v, dim=axes, keepdim=True)

    def weight(self) -> Tensor:
        """Give the effective weight, in the layout of ``weight_v``."""
        if self.fused is not None:
            return self.fused
        return self.weight_v * (self.weight_g / self._norm())

    def fuse(self) -> None:
        """Compute the effective weight once; ``state_dict`` stays as it was."""
        self.fused = None
        self.fused = self.weight().detach()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.fused = None  # new tensors make the stored product stale
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, cin, L]`` to ``[B, cout, L']``."""
        return F.conv1d(x, self.weight(), self.bias, **self.options)


class WNConvTranspose1d(WNConv1d):
    """ConvTranspose1d with weight norm; axis 0 of the weight is the *input* channel."""

    def _weight_shape(self, cin: int, cout: int, kernel: int) -> tuple[int, int, int]:
        return cin, cout, kernel

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, cin, L]`` to ``[B, cout, L']``."""
        return F.conv_transpose1d(x, self.weight(), self.bias, **self.options)


def fuse_weight_norm(module: nn.Module) -> None:
    """Fuse every weight-normed convolution below ``module`` for inference."""
    for child in module.modules():
        if isinstance(child, WNConv1d):
            child.fuse()
