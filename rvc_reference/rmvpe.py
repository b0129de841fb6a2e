"""RMVPE: F0 from a log-mel spectrogram by a deep U-Net and a bidirectional GRU.

Source: Wei et al. 2023 (RMVPE), model E2E(4, 1, (2, 2)) with the keys of ``rmvpe.pt``.
Longer than 300 lines because network and decoding are read as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE = 16000
HOP = 160
N_FFT = 1024
N_BINS = 360
CENTS = 20.0 * np.arange(N_BINS) + 1997.3794084376191
THRESHOLD = 0.03  # frames whose peak is not above this are unvoiced
BN_MOMENTUM = 0.01


@dataclass(frozen=True)
class RMVPEConfig:
    """Sizes; the defaults are those of the public file.

    ``levels`` also sets the frame count's divisor, ``2 ** levels``.
    """

    channels: int = 16
    levels: int = 5
    inter_layers: int = 4
    blocks: int = 4
    gru_hidden: int = 256
    n_mels: int = 128

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> RMVPEConfig:
        """Read the sizes off the tensors of a checkpoint."""

        def count(prefix: str) -> int:
            depth = prefix.count(".") + 1
            heads = {
                key.split(".")[depth] for key in state if key.startswith(prefix + ".")
            }
            return len(heads)

        return cls(
            channels=state["unet.encoder.layers.0.conv.0.conv.0.weight"].shape[0],
            levels=count("unet.encoder.layers"),
            inter_layers=count("unet.intermediate.layers"),
            blocks=count("unet.encoder.layers.0.conv"),
            gru_hidden=state["fc.0.gru.weight_hh_l0"].shape[1],
            n_mels=state["fc.0.gru.weight_ih_l0"].shape[1] // 3,
        )


def mel_filters(
    n_mels: int = 128, low: float = 30.0, high: float = 8000.0
) -> np.ndarray:
    """Give triangular filters ``[n_mels, 513]`` float32.

    HTK frequency scale with Slaney's area normalisation, as librosa's
    ``mel(htk=True)`` makes them.
    """
    top = 2595.0 * np.log10(1.0 + np.array([low, high]) / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(*top, n_mels + 2) / 2595.0) - 1.0)
    freqs = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    slopes = edges[:, None] - freqs
    widths = np.diff(edges)[:, None]
    triangles = np.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:])
    area = 2.0 / (edges[2:] - edges[:-2])
    return (np.maximum(0.0, triangles) * area[:, None]).astype(np.float32)


class MelSpectrogram(nn.Module):
    """Log-mel of a waveform: ``[B, N]`` at 16 kHz to ``[B, n_mels, N // 160 + 1]``.

    Computed in float64: upstream's float32 transform leaves rounding noise in bands
    without signal, which the logarithm turns into differences of 6e-3.
    """

    def __init__(self, n_mels: int = 128) -> None:
        super().__init__()
        window = torch.hann_window(N_FFT, dtype=torch.float64)
        self.register_buffer("window", window, persistent=False)
        filters = torch.from_numpy(mel_filters(n_mels)).double()
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """Give ``ln(max(mel, 1e-5))`` of the magnitude spectrum; needs ``N > 512``."""
        spectrum = torch.stft(
            audio.double(),
            N_FFT,
            HOP,
            window=self.window,
            center=True,
            return_complex=True,
        )
        mel = self.filters @ spectrum.abs()
        return torch.log(torch.clamp(mel, min=1e-5)).float()


class ConvBlockRes(nn.Module):
    """Two conv-BN-ReLU and a shortcut; nothing after the addition."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout, momentum=BN_MOMENTUM),
            nn.ReLU(),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout, momentum=BN_MOMENTUM),
            nn.ReLU(),
        )
        if cin != cout:
            self.shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, cin, T, M]`` to ``[B, cout, T, M]``."""
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return self.conv(x) + shortcut


def res_blocks(cin: int, cout: int, count: int) -> nn.ModuleList:
    """Give ``count`` blocks of which the first changes the width."""
    widths = [cin] + [cout] * (count - 1)
    return nn.ModuleList(ConvBlockRes(width, cout) for width in widths)


class Level(nn.Module):
    """The blocks of one resolution, under the key ``conv``."""

    def __init__(self, cin: int, cout: int, count: int) -> None:
        super().__init__()
        self.conv = res_blocks(cin, cout, count)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        for block in self.conv:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Levels with 2x2 mean pooling; gives the last output and the skips."""

    def __init__(self, config: RMVPEConfig) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1, momentum=BN_MOMENTUM)
        widths = [1] + [config.channels * 2**i for i in range(config.levels)]
        self.layers = nn.ModuleList(
            Level(a, b, config.blocks) for a, b in itertools.pairwise(widths)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map ``[B, 1, T, M]`` to the pooled output and the pre-pool skips."""
        x = self.bn(x)
        skips = []
        for layer in self.layers:
            x = layer(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        return x, skips


class Intermediate(nn.Module):
    """Levels without pooling at the lowest resolution."""

    def __init__(self, config: RMVPEConfig) -> None:
        super().__init__()
        wide = config.channels * 2**config.levels
        widths = [wide // 2] + [wide] * config.inter_layers
        self.layers = nn.ModuleList(
            Level(a, b, config.blocks) for a, b in itertools.pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the levels."""
        for layer in self.layers:
            x = layer(x)
        return x


class UpLevel(nn.Module):
    """Transposed convolution, concatenation with the skip, blocks."""

    def __init__(self, cin: int, cout: int, count: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.ConvTranspose2d(cin, cout, 3, 2, 1, output_padding=1, bias=False),
            nn.BatchNorm2d(cout, momentum=BN_MOMENTUM),
            nn.ReLU(),
        )
        self.conv2 = res_blocks(2 * cout, cout, count)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map ``[B, cin, T, M]`` to ``[B, cout, 2T, 2M]``."""
        x = torch.cat([self.conv1(x), skip], dim=1)
        for block in self.conv2:
            x = block(x)
        return x


class Decoder(nn.Module):
    """Up levels, taking the skips from the last one on."""

    def __init__(self, config: RMVPEConfig) -> None:
        super().__init__()
        widths = [config.channels * 2**i for i in range(config.levels, -1, -1)]
        self.layers = nn.ModuleList(
            UpLevel(a, b, config.blocks) for a, b in itertools.pairwise(widths)
        )

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the up levels."""
        for layer, skip in zip(self.layers, reversed(skips), strict=True):
            x = layer(x, skip)
        return x


class DeepUnet(nn.Module):
    """Encoder, intermediate, decoder."""

    def __init__(self, config: RMVPEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.intermediate = Intermediate(config)
        self.decoder = Decoder(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, 1, T, M]`` to ``[B, channels, T, M]``."""
        x, skips = self.encoder(x)
        return self.decoder(self.intermediate(x), skips)


class BiGRU(nn.Module):
    """One bidirectional GRU layer, under the key ``gru``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, width]`` to ``[B, T, 2 * hidden]``."""
        return self.gru(x)[0]


class RMVPE(nn.Module):
    """The salience network: log-mel ``[B, n_mels, T]`` to salience ``[B, T, 360]``."""

    def __init__(self, config: RMVPEConfig | None = None) -> None:
        super().__init__()
        self.config = config or RMVPEConfig()
        self.unet = DeepUnet(self.config)
        self.cnn = nn.Conv2d(self.config.channels, 3, 3, padding=1)
        self.fc = nn.Sequential(
            BiGRU(3 * self.config.n_mels, self.config.gru_hidden),
            nn.Linear(2 * self.config.gru_hidden, N_BINS),
            nn.Dropout(0.25),
            nn.Sigmoid(),
        )

    def forward(self, mel: Tensor) -> Tensor:
        """Give the salience in 0..1; T must be a multiple of ``2 ** levels``."""
        x = self.cnn(self.unet(mel.transpose(1, 2)[:, None]))
        return self.fc(x.transpose(1, 2).flatten(2))  # [B, T, 3 * n_mels], channel slow


def pad_frames(mel: Tensor, multiple: int, pad_mode: str) -> Tensor:
    """Pad ``[B, M, T]`` on the right to a multiple of frames.

    Args:
        mel: log-mel.
        multiple: divisor of the new frame count.
        pad_mode: "reflect", or "constant" for zeros in the log domain.

    Raises:
        ValueError: for another mode, or too few frames to reflect.
    """
    if pad_mode not in ("reflect", "constant"):
        raise ValueError(f"pad_mode is {pad_mode!r}; expected 'reflect' or 'constant'")
    frames = mel.shape[-1]
    extra = -frames % multiple
    if pad_mode == "reflect" and extra >= frames:
        raise ValueError(
            f"{frames} frames cannot be reflected by {extra}; use 'constant'"
        )
    return F.pad(mel, (0, extra), mode=pad_mode)


def decode(salience: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Give F0 in Hz ``[T]`` float64 of salience ``[T, 360]``; unvoiced frames are 0.

    The weighted mean of the cents of the nine bins around the peak.
    """
    peak = salience.argmax(axis=1)
    padded = np.pad(np.asarray(salience, np.float64), ((0, 0), (4, 4)))
    around = peak[:, None] + np.arange(9)
    weights = np.take_along_axis(padded, around, axis=1)
    cents = (weights * np.pad(CENTS, 4)[around]).sum(1) / np.maximum(
        weights.sum(1), 1e-300
    )
    voiced = salience.max(axis=1) > threshold
    return np.where(voiced, 10.0 * 2.0 ** (cents / 1200.0), 0.0)


@torch.inference_mode()
def estimate_f0(
    model: RMVPE,
    audio: np.ndarray,
    *,
    pad_mode: str = "reflect",
    threshold: float = THRESHOLD,
) -> np.ndarray:
    """Give F0 in Hz ``[N // 160 + 1]`` float64 of ``audio`` ``[N]`` at 16 kHz.

    The whole signal is one input of the network (no chunks).
    """
    mel = MelSpectrogram(model.config.n_mels)(
        torch.as_tensor(audio, dtype=torch.float32)[None]
    )
    padded = pad_frames(mel, 2**model.config.levels, pad_mode)
    salience = model(padded)[0, : mel.shape[-1]]
    return decode(salience.numpy(), threshold)
