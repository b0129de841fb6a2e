"""Parity, layer by layer: the same input to a layer of ours and of PyTorch's.

Every function gives rows: the stage, how far the two are apart, and the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import torch
from common import Models
from our_side import (
    FRAME_LENGTHS,
    Network,
    OurSynthesis,
    synthesis_inputs,
    voice_network,
)
from parity import Row, f0_rows, parity_row
from torch_side import OnDevice, TorchPipeline, TorchPitch, decode
from twins import Sides, converter

from rvc_mlx import pitch
from rvc_mlx.loading import PitchNet, Voice, read_weights
from rvc_mlx.models import rmvpe
from rvc_mlx.models.vits import RELATIVE_WINDOW
from rvc_mlx.noise import Noise
from rvc_mlx.options import ConversionOptions
from rvc_mlx.pipeline import VoiceConverter
from rvc_mlx.spectral import N_FFT, log_mel
from rvc_reference.loading import load_voice
from rvc_reference.pipeline import prepare, quantize_f0

INDEX_RATE = 0.75
LAYER = 1  # of the attention compared: a layer norm gives its input unit scale


def rmvpe_network(path: Path) -> Network:
    """RMVPE of a file."""
    tensors = rmvpe.sanitize(read_weights(path, "rmvpe").tensors)
    config = rmvpe.RMVPEConfig.from_tensors(tensors)
    return Network(path, partial(rmvpe.RMVPE, config), tensors)


# What each layer is on our side (steps of a seam) and on PyTorch's.
_RMVPE_LAYERS: dict[str, tuple[Callable[[Any], list], Callable[[Any, Any], Any]]] = {
    "U-Net encoder": (
        lambda net: [lambda x: net.unet.encoder(x[..., None])[0]],
        lambda net, x: net.unet.encoder(x)[0].permute(0, 2, 3, 1),
    ),
    "U-Net decoder": (
        lambda net: [lambda x: net.unet(x[..., None])],
        lambda net, x: net.unet(x).permute(0, 2, 3, 1),
    ),
    "U-Net output": (
        lambda net: [net.image_features],
        lambda net, x: net.cnn(net.unet(x)).transpose(1, 2).flatten(2),
    ),
    "BiGRU": (
        lambda net: [net.image_features, net.fc[0].gru],
        lambda net, x: net.fc[0](net.cnn(net.unet(x)).transpose(1, 2).flatten(2)),
    ),
    "salience": (
        lambda net: [net.image_features, net.fc[0].gru, net.classify],
        lambda net, x: net(x[:, 0].transpose(1, 2)),
    ),
}
_RMVPE_TOLERANCES = {
    "U-Net encoder": 2e-4,
    "U-Net decoder": 2e-4,
    "U-Net output": 2e-4,
    "BiGRU": 2e-5,
    "salience": 1e-5,
}


def rmvpe_rows(sides: Sides, path: Path, audio: np.ndarray) -> list[Row]:
    """Mel, each part of the network on the same mel, and F0."""
    theirs = TorchPitch(path, sides.torch)
    mel = theirs.log_mel(audio)[0].T.cpu().numpy()
    own = log_mel(np.pad(audio, N_FFT // 2, mode="reflect"), mel.shape[1])
    rows = [parity_row("RMVPE: log-mel", own, mel, 1e-5)]
    mel = np.ascontiguousarray(mel[None, : len(mel) // 32 * 32])
    network = rmvpe_network(path)
    for name, (steps, layer) in _RMVPE_LAYERS.items():
        run = network.bind(
            sides.engine,
            f"RMVPE {name}",
            steps,
            lambda length: [((1, length, mel.shape[2]), mx.float32)],
            (mel.shape[1],),
        )
        wanted = theirs.net.run(layer, mel[:, None])
        rows.append(
            parity_row(f"RMVPE: {name}", run(mel), wanted, _RMVPE_TOLERANCES[name])
        )
    net = PitchNet(read_weights(path, "rmvpe"), sides.engine)
    f0 = pitch.estimate_f0(net.salience, lambda a, b: audio[a:b], len(audio))
    return rows + f0_rows(f0, theirs.estimate_f0(audio))


@contextmanager
def recorded_softmax(library: Any) -> Iterator[dict[str, list[Any]]]:
    """Keep the inputs and the results of every ``library.softmax`` inside the block."""
    kept: dict[str, list[Any]] = {"scores": [], "weights": []}
    softmax = library.softmax

    def record(scores: Any, *arguments: Any, **keywords: Any) -> Any:
        weights = softmax(scores, *arguments, **keywords)
        kept["scores"].append(scores)
        kept["weights"].append(weights)
        return weights

    with mock.patch.object(library, "softmax", record):
        yield kept


def _ours_kept(attend: Callable[[Any], Any], x: Any, name: str) -> Any:
    """``[B, H, T, T]`` of ours, which come with padded keys."""
    with recorded_softmax(mx) as kept:
        attend(x)
    return kept[name][0][..., RELATIVE_WINDOW:-RELATIVE_WINDOW]


def _theirs_kept(attend: Callable[[Any], Any], x: Any, name: str) -> Any:
    with recorded_softmax(torch) as kept:
        attend(x)
    return kept[name][0]


def attention_rows(sides: Sides, path: Path, frames: int = 128) -> list[Row]:
    """Q, K, V, scores, weights and result of one attention of the text encoder."""
    voice = OnDevice(load_voice(path), sides.torch)
    config = Voice(read_weights(path, "voice"), sides.engine).config
    network, width = voice_network(path, config), config.hidden_channels
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, frames, width)).astype(np.float32)

    def compare(name: str, ours: Callable, theirs: Callable) -> Row:
        run = network.bind(
            sides.engine,
            f"attention {name}",
            lambda net: [partial(ours, net.enc_p.encoder.attn_layers[LAYER])],
            lambda length: [((1, length, width), mx.float32)],
            (frames,),
        )
        wanted = voice.run(
            lambda net, x: theirs(
                net.enc_p.encoder.attn_layers[LAYER], x.transpose(1, 2)
            ),
            x,
        )
        # Q, K, V and scores are float32 sums of 192 and 96 terms, up to 4 in size.
        exact = name in ("weights", "output")
        return parity_row(f"attention: {name}", run(x), wanted, 1e-6 if exact else 5e-6)

    rows = [
        compare(
            name[-1].upper(),
            lambda layer, x, n=name: layer[n](x),
            lambda layer, x, n=name: getattr(layer, n)(x).mT,
        )
        for name in ("conv_q", "conv_k", "conv_v")
    ]
    rows += [
        compare(
            name,
            lambda layer, x, n=name: _ours_kept(layer, x, n),
            lambda layer, x, n=name: _theirs_kept(layer, x, n),
        )
        for name in ("scores", "weights")
    ]
    rows.append(
        compare("output", lambda layer, x: layer(x), lambda layer, x: layer(x).mT)
    )
    return rows


def synthesis_rows(
    sides: Sides, path: Path, frames: int = 256, pt_path: Path | None = None
) -> list[Row]:
    """Text encoder, flow, and generator, each on PyTorch's result of the one before."""
    theirs = OnDevice(load_voice(pt_path or path), sides.torch)
    voice = Voice(read_weights(path, "voice"), sides.engine)
    config, network = voice.config, voice_network(path, voice.config)
    given = synthesis_inputs(frames, config.feature_size)
    phone, coarse = given.features[None], quantize_f0(given.f0)[None]
    g = voice.speakers[:1][None]
    mean, log_std = theirs.run(lambda net, p, c: net.encode_text(p, c), phone, coarse)
    stats = torch.cat([mean, log_std], dim=-1)
    run = text_encoder(network, sides, config)
    rows = [parity_row("TextEncoder", run(phone, coarse.astype(np.int32)), stats, 1e-5)]
    draw = given.noise.normal("prior", 0, 0, frames, 1, config.inter_channels)
    z_p = (mean + log_std.exp() * torch.from_numpy(draw)[None] * 0.66666).numpy()
    z = theirs.run(inverse_flow, z_p)
    rows.append(parity_row("flow", flow(network, sides, config)(z_p, g), z, 1e-5))
    ours = OurSynthesis(voice, given.noise)
    crop = slice(ours.margin * voice.config.samples_per_frame, None)
    audio = decode(theirs, z.numpy(), given)[crop]
    made = ours.decode(z.numpy(), given.f0)
    return [*rows, parity_row("generator", made, audio[: len(made)], 2e-5)]


def conversion_rows(
    sides: Sides, files: Models, clip: np.ndarray, pt_voice: Path | None = None
) -> list[Row]:
    """Content features, F0 and the whole conversion of ``[n]`` float32 at 16 kHz."""
    ours = converter(files, sides)
    theirs = TorchPipeline(files._replace(voice=pt_voice or files.voice), sides.torch)
    pad = x_pad(sides)
    heard = np.pad(prepare(clip), round(pad * 16000), mode="reflect")
    heard = heard.astype(np.float32)
    version = ours.voice.config.version
    wanted = theirs.contentvec.extract(torch.from_numpy(heard)[None], version)[0]
    rows = [parity_row("HuBERT", ours.encoder.encode(heard, version), wanted, 2e-5)]
    net = ours.pitch_net
    if net:
        f0 = pitch.estimate_f0(net.salience, lambda a, b: heard[a:b], len(heard))
        rows += f0_rows(f0, theirs.pitch.estimate_f0(heard))
    audio = convert_ours(ours, clip, pad), convert_torch(theirs, clip, pad)
    return [*rows, parity_row("conversion", *audio, 1e-3, 1e-4)]


def x_pad(sides: Sides) -> float:
    """Seconds of context; less on MLX's own CPU back end, which is slow."""
    return 0.25 if sides.backend == "mlx-cpu" else 1


def convert_ours(
    ours: VoiceConverter, clip: np.ndarray, pad: float, seed: int = 0
) -> np.ndarray:
    """Our conversion of ``[n]`` float32 at 16 kHz, as long as the original's."""
    rate = INDEX_RATE if ours.index else 0.0
    options = ConversionOptions(reference_lengths=True, index_rate=rate, x_pad=pad)
    return ours.convert(clip, 16000, options, noise=Noise(seed)).audio


def convert_torch(
    theirs: TorchPipeline, clip: np.ndarray, pad: float, seed: int = 0
) -> np.ndarray:
    """PyTorch's conversion of the same clip with the same noise."""
    rate = INDEX_RATE if theirs.index else 0.0
    return theirs.convert(clip, noise=Noise(seed), index_rate=rate, x_pad=pad)


def text_encoder(network: Network, sides: Sides, config: Any) -> Callable:
    """Our text encoder: features, coarse pitch to mean and log deviation side by side."""
    return network.bind(
        sides.engine,
        "text encoder",
        lambda net: [lambda *a: mx.concatenate(net.enc_p(*a), axis=-1)],
        lambda T: [((1, T, config.feature_size), mx.float32), ((1, T), mx.int32)],
        FRAME_LENGTHS,
    )


def flow(network: Network, sides: Sides, config: Any) -> Callable:
    """Our inverse flow: latent and speaker to latent."""
    return network.bind(
        sides.engine,
        "flow",
        lambda net: [lambda z, g: net.flow(z, g, reverse=True)],
        lambda T: [
            ((1, T, config.inter_channels), mx.float32),
            ((1, 1, config.gin_channels), mx.float32),
        ],
        FRAME_LENGTHS,
    )


def inverse_flow(net: Any, z_p: torch.Tensor) -> torch.Tensor:
    """PyTorch's inverse flow of ``[B, T, C]`` for speaker 0."""
    g = net.speaker(0)[..., None]
    return net.flow.inverse(z_p.transpose(1, 2), g).transpose(1, 2)
