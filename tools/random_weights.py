"""Seeded random networks whose activations have the scale of trained ones.

Plain random weights make useless test models: depth lets activations vanish or
explode, and features hardly move in time. Here one forward pass sets each layer's
scale while it runs (layer by layer, because a hook hands the rescaled output on).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy import signal
from torch import Tensor, nn

from rvc_reference.contentvec import ContentVec, ContentVecConfig
from rvc_reference.noise import SeededNoise
from rvc_reference.refinegan import RefineGAN
from rvc_reference.rmvpe import (
    CENTS,
    HOP,
    RMVPE,
    MelSpectrogram,
    RMVPEConfig,
    pad_frames,
)
from rvc_reference.synthesizer import Synthesizer
from rvc_reference.weight_norm import WNConv1d

SAMPLE_RATE = 16000


class Speech(NamedTuple):
    """Speech-like test audio.

    Attributes:
        audio: ``[N]`` float32 at 16 kHz, peak 0.6.
        f0: ``[N // 160 + 1]`` in Hz, 0 where there is no voice.
    """

    audio: np.ndarray
    f0: np.ndarray


def synthetic_speech(seconds: float, seed: int) -> Speech:
    """Make syllables of a buzzing voice, hisses between them, and pauses.

    The voice is a harmonic sum through three random resonances; the pauses hold
    noise 60 dB below the peak, as recordings do.
    """
    rng = np.random.default_rng(seed)
    total = int(seconds * SAMPLE_RATE)
    audio = rng.standard_normal(total) * 3e-4
    hertz = np.zeros(total)
    register = 100.0 * 2 ** rng.uniform(0, 2)
    place = int(rng.uniform(0.05, 0.2) * SAMPLE_RATE)
    while place < total:
        length = int(rng.uniform(0.1, 0.45) * SAMPLE_RATE)
        kind = rng.choice(["voice", "hiss", "pause"], p=[0.62, 0.2, 0.18])
        stop = min(place + length, total)
        if kind == "voice":
            if rng.random() < 0.2:  # another speaker
                register = 100.0 * 2 ** rng.uniform(0, 2)
            glide = register * 2 ** np.linspace(*rng.normal(0, 0.2, 2), length)
            audio[place:stop] += _syllable(glide, rng)[: stop - place]
            hertz[place:stop] = glide[: stop - place]
        elif kind == "hiss":
            hiss = np.diff(rng.standard_normal(length + 1)) * np.hanning(length) * 0.05
            audio[place:stop] += hiss[: stop - place]
        place = stop
    f0 = np.pad(hertz, (0, 1))[np.minimum(np.arange(total // HOP + 1) * HOP, total)]
    return Speech((0.6 * audio / np.abs(audio).max()).astype(np.float32), f0)


def _syllable(glide: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    phase = 2 * np.pi * np.cumsum(glide) / SAMPLE_RATE
    harmonics = np.arange(1, int(6000 / glide.max()) + 1)
    wave = sum(np.sin(k * phase + rng.uniform(0, 6)) / k**0.7 for k in harmonics)
    for low, high in ((250, 800), (900, 2300), (2400, 3500)):
        centre = rng.uniform(low, high)
        wave = wave + 1.5 * signal.lfilter(
            *signal.iirpeak(centre, 6, fs=SAMPLE_RATE), wave
        )
    return wave * signal.windows.tukey(len(wave), 0.3) * rng.uniform(0.1, 0.3)


def _scale(module: nn.Module, factor: Tensor | float) -> None:
    """Multiply what ``module`` puts out; a tensor scales each output channel."""
    weight = module.weight_g if isinstance(module, WNConv1d) else module.weight
    shape = (-1,) + (1,) * (weight.ndim - 1)
    weight.data.mul_(factor.reshape(shape) if isinstance(factor, Tensor) else factor)
    if module.bias is not None:
        module.bias.data.mul_(factor)


@contextmanager
def calibrated(model: nn.Module, targets: dict[str, float]) -> Iterator[None]:
    """Rescale layers during one forward pass inside the block.

    Args:
        model: the network.
        targets: pattern of a module name (whole match) to the rms of its output.
    """
    handles = []
    for name, module in model.named_modules():
        wanted = [
            rms for pattern, rms in targets.items() if re.fullmatch(pattern, name)
        ]
        if wanted:
            handles.append(module.register_forward_hook(_rescale_to(wanted[0])))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _rescale_to(rms: float) -> Callable:
    def hook(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
        factor = float(rms / output.square().mean().sqrt())
        _scale(module, factor)
        return output * factor

    return hook


def _whiten(spread: Tensor | float, centre: Tensor | float, axis: int) -> Callable:
    """Give a hook that sets mean and deviation of every output channel."""

    def hook(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
        others = tuple(i for i in range(output.ndim) if i != axis % output.ndim)
        mean, deviation = output.mean(others), output.std(others)
        factor = spread / deviation
        _scale(module, factor)
        module.bias.data.add_(centre - mean * factor)
        shape = [1] * output.ndim
        shape[axis] = -1
        shift = torch.as_tensor(centre - mean * factor).reshape(shape)
        return output * factor.reshape(shape) + shift

    return hook


def round_to_half(model: nn.Module) -> None:
    """Round floating tensors to what a half-precision file can hold."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()


def random_contentvec(config: ContentVecConfig, seed: int) -> ContentVec:
    """Give an encoder whose features have unit scale and move with the sound."""
    torch.manual_seed(seed)
    model = ContentVec(config).eval()
    nn.init.uniform_(model.masked_spec_embed)
    targets = {
        r"feature_extractor\.conv_layers\.\d+\.conv": 1.5,
        r"encoder\.pos_conv_embed\.conv": 0.3,
        r"encoder\.layers\.\d+\.attention\.[qk]_proj": 1.0,
        r"encoder\.layers\.\d+\.attention\.v_proj": 1.0,
        r"encoder\.layers\.\d+\.attention\.out_proj": 0.3,
        r"encoder\.layers\.\d+\.feed_forward\.intermediate_dense": 1.0,
        r"encoder\.layers\.\d+\.feed_forward\.output_dense": 0.4,
    }
    # Whitening lifts directions of little variance, and with them the rounding of twelve
    # layers; the projected features are kept smaller for that.
    scales = {model.feature_projection.projection: 1.0, model.final_proj: 0.7}
    handles = [
        layer.register_forward_hook(_whiten(scale, 0.0, -1))
        for layer, scale in scales.items()
    ]
    audio = torch.from_numpy(synthetic_speech(5.0, seed + 1).audio)[None]
    with calibrated(model, targets):
        model.final_proj(model(audio)[min(9, config.num_hidden_layers)])
    for handle in handles:
        handle.remove()
    round_to_half(model)
    return model


def _perturb_batch_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            top = (
                0.7 if name.endswith("conv.4") else 1.2
            )  # residual branches stay small
            nn.init.uniform_(module.weight, 0.7 * top, top)
            nn.init.uniform_(module.bias, -0.2, 0.2)


def random_rmvpe(config: RMVPEConfig, seed: int, seconds: float = 24.0) -> RMVPE:
    """Give an F0 network: random features, last layer fitted to synthetic speech.

    Batch-norm statistics come from one pass over that speech in training mode. The
    last layer is a ridge regression from the GRU's output to a peak at the true F0,
    so that the salience has one clear peak where there is voice and none elsewhere.
    """
    torch.manual_seed(seed)
    model = RMVPE(config)
    _perturb_batch_norms(model)
    speech = synthetic_speech(seconds, seed + 2)
    mel = MelSpectrogram(config.n_mels)(torch.from_numpy(speech.audio)[None])
    mel = pad_frames(mel, 2**config.levels, "reflect")
    handle = model.cnn.register_forward_hook(_whiten(1.0, 0.0, 1))
    with torch.no_grad():
        model.unet.train()
        model.cnn(model.unet(mel.transpose(1, 2)[:, None]))
        handle.remove()
        model.eval()
        round_to_half(model)
        images = model.cnn(model.unet(mel.transpose(1, 2)[:, None]))
        hidden = model.fc[0](images.transpose(1, 2).flatten(2))[0, : len(speech.f0)]
    _fit_salience(model.fc[1], hidden, speech.f0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    round_to_half(model)
    return model


def _fit_salience(layer: nn.Linear, hidden: Tensor, f0: np.ndarray) -> None:
    """Fit ``layer`` ``[360, H]`` so that its logits peak at the F0 of voiced frames."""
    X = np.pad(hidden.double().numpy(), ((0, 0), (0, 1)), constant_values=1.0)
    cents = 1200 * np.log2(np.maximum(f0, 1.0) / 10)
    away = (CENTS - cents[:, None]) / 20.0
    target = np.where(f0[:, None] > 0, np.exp(-0.5 * (away / 4.0) ** 2), 0.0)
    gram = X.T @ X + 1e-4 * len(X) * np.eye(X.shape[1])
    solution = np.linalg.solve(gram, X.T @ target)  # [H + 1, 360]
    peak = (X @ solution).max(axis=1)
    voiced = f0 > 0
    high, low = np.median(peak[voiced]), np.quantile(peak[~voiced], 0.9)
    # Logits: about -4.5 at the peak of silence, 0.5 at that of a voice, 6 at the highest percent.
    gain = min(5.0 / (high - low), 10.5 / (np.quantile(peak, 0.99) - low))
    layer.weight.data = torch.from_numpy((gain * solution[:-1].T).astype(np.float32))
    layer.bias.data = torch.from_numpy(
        (gain * (solution[-1] - low) - 4.5).astype(np.float32)
    )


def _smooth_pitch_rows(embedding: nn.Embedding) -> None:
    """Let neighbouring pitches have neighbouring vectors, as trained tables do."""
    rows, width = embedding.weight.shape
    angle = torch.arange(rows)[:, None] / rows * torch.pi * torch.arange(1, 9)
    basis = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
    embedding.weight.data = basis @ torch.randn(16, width) * 0.2


VOICE_TARGETS = {
    r"enc_p\.encoder\.attn_layers\.\d+\.conv_[qkv]": 1.0,
    r"enc_p\.encoder\.attn_layers\.\d+\.conv_o": 0.4,
    r"enc_p\.encoder\.ffn_layers\.\d+\.conv_1": 1.0,
    r"enc_p\.encoder\.ffn_layers\.\d+\.conv_2": 0.4,
    r"flow\.flows\.\d+\.pre": 1.0,
    r"flow\.flows\.\d+\.post": 0.3,
    r"dec\.(conv_pre|ups\.\d+|upsamples\.\d+)": 1.0,
    r"dec\.(pre_conv|mel_conv|downsample_blocks\.\d+)": 1.0,
    r"dec\.upsample_conv_blocks\.\d+\.input_conv": 1.0,
    r"dec\.cond": 0.4,
    r"dec\.noise_convs\.\d+": 0.5,
    r"dec\..*\.(convs1\.\d+|conv1)": 1.0,
    r"dec\..*\.(convs2\.\d+|conv2)": 0.3,
    r"dec\.conv_post": 0.15,
}


def random_voice(config: list, seed: int, **kind: object) -> Synthesizer:
    """Give a voice whose waveform has an rms of about 0.15.

    Args:
        config: the list of 18.
        seed: of the weights and of the calibration's input.
        kind: ``version``, ``f0``, ``vocoder``, ``with_enc_q``, ``speakers``.
    """
    torch.manual_seed(seed)
    model = Synthesizer(config, **kind).eval()
    if model.f0:
        _smooth_pitch_rows(model.enc_p.emb_pitch)
    if isinstance(model.dec, RefineGAN):
        for name, parameter in model.dec.named_parameters():
            if re.fullmatch(r".*blocks\.\d+\.[02]\.weight", name):
                nn.init.normal_(parameter, std=0.02)
    last = model.dec.conv_post
    taps = last.weight_v if isinstance(last, WNConv1d) else last.weight
    taps.data -= taps.data.mean(dim=-1, keepdim=True)  # no constant in the waveform
    channels = model.inter
    spread = torch.cat([torch.full((channels,), 0.8), torch.full((channels,), 0.15)])
    centre = torch.cat([0.3 * torch.randn(channels), torch.full((channels,), -0.8)])
    handle = model.enc_p.proj.register_forward_hook(_whiten(spread, centre, 1))
    with calibrated(model, VOICE_TARGETS):
        model.infer(*_voice_input(model, seed))
    handle.remove()
    round_to_half(model)
    return model


def _voice_input(model: Synthesizer, seed: int, frames: int = 80) -> tuple:
    """Give arguments of ``infer``: slowly moving features and a broken F0 contour."""
    rng = np.random.default_rng(seed)
    width = model.enc_p.emb_phone.in_features
    slow = rng.standard_normal((frames // 2 + 2, width))
    phone = ((slow[:-1] + slow[1:]) * 2**-0.5).repeat(2, axis=0)[:frames]
    prior, noise = model.draw(SeededNoise(seed), 0, frames)
    phone = torch.from_numpy(phone.astype(np.float32))[None]
    if not model.f0:
        return phone, None, None, 0, prior, noise
    f0 = (
        180 * 2 ** (0.5 * np.sin(np.arange(frames) / 15)) * (np.arange(frames) % 40 > 9)
    )
    f0 = torch.from_numpy(f0.astype(np.float32))[None]
    pitch = (1 + f0 / 5).long()
    return phone, pitch, f0, 0, prior, noise
