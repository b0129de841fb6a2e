"""The training step in PyTorch: discriminators, losses, one update of each network.

Source: RVC ``models.py`` (discriminators), ``losses.py``, ``mel_processing.py`` and the
training loop; Kong et al. 2020 (HiFi-GAN), Kim et al. 2021 (VITS).

Batches are padded, the networks of ``modules.py`` know no masks: items of the same
length run together at that length, which is what the masks stand for. Where every item
is full this is one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_reference.synthesizer import Synthesizer
from rvc_reference.weight_norm import WNConv1d

SLOPE = 0.1
PERIODS = {"v1": (2, 3, 5, 7, 11, 17), "v2": (2, 3, 5, 7, 11, 17, 23, 37)}


class WNConv2d(nn.Module):
    """Conv2d with kernels ``(k, 1)`` and weight norm over all axes but the first."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.padding = (stride, 1), (kernel // 2, 0)
        bound = (cin * kernel) ** -0.5
        self.bias = nn.Parameter(torch.empty(cout).uniform_(-bound, bound))
        shape = (cout, cin, kernel, 1)
        self.weight_v = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(self._norm().detach().clone())

    def _norm(self) -> Tensor:
        return self.weight_v.square().sum((1, 2, 3), keepdim=True).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, cin, L, p]`` to ``[B, cout, L', p]``."""
        weight = self.weight_v * (self.weight_g / self._norm())
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class _Stack(nn.Module):
    """Convolutions with leaky ReLUs, all outputs kept, and a last one without."""

    def _run(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            maps.append(x)
        return [*maps, self.conv_post(x)]


class DiscriminatorS(_Stack):
    """The waveform by strided, grouped convolutions; 4 input channels in each group."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [max(width // 2, 1), *(n * width for n in (2, 8, 32, 32, 32))]
        grouped = [
            WNConv1d(a, b, 41, stride=4, padding=20, groups=max(a // 4, 1))
            for a, b in pairwise(widths[:5])
        ]
        first = WNConv1d(1, widths[0], 15, padding=7)
        last = WNConv1d(widths[4], widths[5], 5, padding=2)
        self.convs = nn.ModuleList([first, *grouped, last])
        self.conv_post = WNConv1d(widths[5], 1, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``[B, 1, L]`` to feature maps, the output last."""
        return self._run(x)


class DiscriminatorP(_Stack):
    """Samples that are ``period`` apart, as an image of ``L / period`` rows."""

    def __init__(self, period: int, width: int = 32) -> None:
        super().__init__()
        self.period = period
        widths = [1, *(n * width for n in (1, 4, 16, 32, 32))]
        self.convs = nn.ModuleList(
            WNConv2d(widths[i], widths[i + 1], 5, 3 if i < 4 else 1) for i in range(5)
        )
        self.conv_post = WNConv2d(widths[5], 1, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``[B, 1, L]`` to feature maps, the output last."""
        if rest := -x.shape[-1] % self.period:
            x = F.pad(x, (0, rest), "reflect")
        return self._run(x.unflatten(-1, (-1, self.period)))


class Discriminator(nn.Module):
    """All of a version: ``"v1"`` or ``"v2"``; ``width`` is 32 in RVC."""

    def __init__(self, version: str = "v2", width: int = 32) -> None:
        super().__init__()
        members = [DiscriminatorS(width)]
        members += [DiscriminatorP(period, width) for period in PERIODS[version]]
        self.discriminators = nn.ModuleList(members)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        """Map ``[B, L]`` to each discriminator's feature maps."""
        return [judge(x[:, None]) for judge in self.discriminators]


@dataclass(frozen=True)
class MelConfig:
    """How spectra and mels of a training run are taken."""

    sample_rate: int
    n_fft: int
    hop: int
    win: int
    n_mels: int
    fmin: float = 0.0
    fmax: float | None = None
    epsilon: float = 1e-6
    floor: float = 1e-5


def spectrogram(wave: Tensor, mel: MelConfig) -> Tensor:
    """Map ``[B, L]`` to magnitudes ``[B, n_fft // 2 + 1, L // hop]``."""
    margin = (mel.n_fft - mel.hop) // 2
    padded = F.pad(wave[:, None], (margin, margin), "reflect")[:, 0]
    window = torch.hann_window(mel.win, device=wave.device)
    spectrum = torch.stft(
        padded,
        mel.n_fft,
        mel.hop,
        mel.win,
        window,
        center=False,
        return_complex=True,
    )
    return (spectrum.real.square() + spectrum.imag.square() + mel.epsilon).sqrt()


def mel_filters(mel: MelConfig) -> Tensor:
    """Slaney's filters ``[n_mels, n_fft // 2 + 1]`` float32, band by band."""

    def to_mel(hz: float) -> float:
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * log(hz / 1000) / log(6.4)

    def to_hz(m: Tensor) -> Tensor:
        return torch.where(m < 15, m * 200 / 3, 1000 * 6.4 ** ((m - 15) / 27))

    top = mel.fmax or mel.sample_rate / 2
    points = torch.linspace(
        to_mel(mel.fmin), to_mel(top), mel.n_mels + 2, dtype=torch.float64
    )
    edges = to_hz(points)
    bins = torch.arange(mel.n_fft // 2 + 1, dtype=torch.float64)
    bins = bins * mel.sample_rate / mel.n_fft
    rows = []
    for low, middle, high in edges.unfold(0, 3, 1):
        up, down = (bins - low) / (middle - low), (high - bins) / (high - middle)
        rows.append(torch.minimum(up, down).clamp(min=0) * 2 / (high - low))
    return torch.stack(rows).float()


def log_mel(spectra: Tensor, mel: MelConfig) -> Tensor:
    """Map magnitudes ``[B, bins, T]`` to the logarithm of mels ``[B, n_mels, T]``."""
    filters = mel_filters(mel).to(spectra.device)
    return torch.log((filters @ spectra).clamp(min=mel.floor))


def discriminator_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """Least squares, real to 1 and fake to 0."""
    return sum(
        (1 - r[-1]).square().mean() + f[-1].square().mean()
        for r, f in zip(real, fake, strict=True)
    )


def generator_losses(
    real: list[list[Tensor]], fake: list[list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Adversarial loss, and feature matching against detached real maps."""
    adversarial = sum((1 - maps[-1]).square().mean() for maps in fake)
    matching = 2 * sum(
        (r.detach() - f).abs().mean()
        for real_maps, fake_maps in zip(real, fake, strict=True)
        for r, f in zip(real_maps, fake_maps, strict=True)
    )
    return adversarial, matching


def cut(x: Tensor, starts: Tensor, length: int) -> Tensor:
    """Cut ``x[b, ..., starts[b] : starts[b] + length]`` out of each item."""
    pieces = zip(x, starts.tolist(), strict=True)
    return torch.stack([item[..., s : s + length] for item, s in pieces])


class TrainStep:
    """One update of the discriminator, then one of the generator, as RVC does it.

    Args:
        generator: a synthesizer with ``enc_q``.
        discriminator: of this module.
        mel: spectra of the mel loss.
        segment: frames that the vocoder decodes of each item.
        learning_rate: of both optimisers.

    After each call every parameter's ``grad`` holds the gradient that its update used.
    """

    def __init__(
        self,
        generator: Synthesizer,
        discriminator: Discriminator,
        mel: MelConfig,
        segment: int,
        learning_rate: float = 1e-4,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.mel, self.segment = mel, segment
        self.optimizers = [
            torch.optim.AdamW(
                network.parameters(), learning_rate, betas=(0.8, 0.99), eps=1e-9
            )
            for network in (discriminator, generator)
        ]

    def __call__(self, x: Mapping[str, Tensor]) -> dict[str, float]:
        """Update both networks.

        Args:
            x: ``phone`` [B, T, C], ``lengths`` [B], ``spec`` [B, T, bins], ``wave``
                [B, T * hop], ``sid`` [B], ``posterior`` noise [B, T, C], ``starts`` [B];
                with F0 also ``pitch`` and ``pitchf`` [B, T], ``source`` noise
                [B, samples, H] and ``phase`` [B, 1, H].

        Returns:
            The losses by the names that the MLX step uses.
        """
        hop, starts = self.mel.hop, x["starts"]
        g = self.generator.speaker(x["sid"])
        z, kl = self._latent(x, g)
        fake = self._decode(x, cut(z, starts, self.segment), g)
        real = cut(x["wave"], starts * hop, self.segment * hop)
        losses = {"loss_d": self._update_discriminator(real, fake.detach())}
        # As the original: the mel of the whole clip's spectrum, then cut.
        target = cut(log_mel(x["spec"].transpose(1, 2), self.mel), starts, self.segment)
        mel = F.l1_loss(target, log_mel(spectrogram(fake, self.mel), self.mel))
        adversarial, matching = generator_losses(
            self.discriminator(real), self.discriminator(fake)
        )
        total = adversarial + matching + 45 * mel + kl
        self._descend(self.optimizers[1], total, self.discriminator)
        parts = (adversarial, matching, mel, kl, total)
        names = ("loss_adv", "loss_fm", "loss_mel", "loss_kl", "loss_g")
        losses |= {n: p.item() for n, p in zip(names, parts, strict=True)}
        return losses

    def _update_discriminator(self, real: Tensor, fake: Tensor) -> float:
        loss = discriminator_loss(self.discriminator(real), self.discriminator(fake))
        self._descend(self.optimizers[0], loss)
        return loss.item()

    def _descend(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor,
        bystander: nn.Module | None = None,
    ) -> None:
        """Update; the bystander's gradients of this loss are thrown away."""
        kept = [p.grad for p in bystander.parameters()] if bystander else []
        for p in bystander.parameters() if bystander else ():
            p.grad = None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bystander:
            for p, grad in zip(bystander.parameters(), kept, strict=True):
                p.grad = grad

    def _latent(self, x: Mapping[str, Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior sample ``[B, C, T]``, zero beyond each item's end, and the KL loss."""
        lengths, T = x["lengths"], x["phone"].shape[1]
        z = [torch.empty(0)] * len(lengths)
        divergence = torch.zeros((), device=g.device)
        for n in sorted(set(lengths.tolist())):
            rows = (lengths == n).nonzero()[:, 0]
            own = {k: x[k][rows, :n] for k in ("phone", "spec", "posterior")}
            pitch = x["pitch"][rows, :n] if "pitch" in x else None
            part, kl = self._unpadded(own, pitch, g[rows][..., None])
            divergence = divergence + kl.sum()
            for row, sample in zip(rows.tolist(), part, strict=True):
                z[row] = F.pad(sample, (0, T - n))
        return torch.stack(z), divergence / lengths.sum()

    def _unpadded(
        self, x: Mapping[str, Tensor], pitch: Tensor | None, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Posterior sample and elements of the KL, ``[b, C, n]``."""
        m_p, logs_p = self.generator.enc_p(x["phone"], pitch)
        spec, noise = x["spec"].transpose(1, 2), x["posterior"].transpose(1, 2)
        z, _, logs_q = self.generator.enc_q(spec, g, noise)
        z_p = self.generator.flow(z, g)
        kl = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p) ** 2 * torch.exp(-2 * logs_p)
        return z, kl

    def _decode(self, x: Mapping[str, Tensor], z: Tensor, g: Tensor) -> Tensor:
        """Audio ``[B, samples]`` of the cut posterior sample (not of its flow)."""
        if "pitchf" not in x:
            return self.generator.decode(z.transpose(1, 2), None, g)
        f0 = cut(x["pitchf"], x["starts"], self.segment)
        return self.generator.decode(
            z.transpose(1, 2), f0, g, x["source"], x["phase"][:, 0]
        )
