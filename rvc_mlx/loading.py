"""From weight files to callables: the content encoder, the pitch net and the voice.

Reading a file costs little (its tensors stay mapped); weights are loaded when an engine
first needs them, and not at all when it finds the compiled model on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rvc_mlx.arrays import Array
from rvc_mlx.bundled_models import NETWORKS, bundled_network
from rvc_mlx.checkpoint import Checkpoint, read_checkpoint
from rvc_mlx.download import locate
from rvc_mlx.engine import MLXEngine, OpenVINOEngine, Run, Seam, Step, fingerprint
from rvc_mlx.models import contentvec, rmvpe, synthesizer
from rvc_mlx.models.contentvec import ContentVec, ContentVecConfig
from rvc_mlx.models.layers import (
    fold_batch_norm,
    fold_weight_norm,
    load_strictly,
)
from rvc_mlx.models.nsf_hifigan import HiFiGAN
from rvc_mlx.models.refinegan import RefineGANGenerator
from rvc_mlx.models.rmvpe import RMVPE, RMVPEConfig
from rvc_mlx.models.synthesizer import Synthesizer, build_vocoder
from rvc_mlx.models.voice_config import SynthesizerConfig
from rvc_mlx.options import MOST_WIDENED, ConversionOptions
from rvc_mlx.pitch import VOICING_THRESHOLD, PitchSettings
from rvc_mlx.spectral import HOP_LENGTH, log_mel
from rvc_mlx.steady import few_lengths

Engine = MLXEngine | OpenVINOEngine
Network = TypeVar("Network", bound=nn.Module)
Shape = tuple[tuple[int, ...], mx.Dtype]

# Lengths at which seams of dynamic length are traced. The encoder's are 80 samples
# more than a multiple of its hop, where its frames are an affine function of them.
_AUDIO_LENGTHS = (320 * 50 + 80, 320 * 51 + 80, 320 * 53 + 80)
_FRAME_LENGTHS = (50, 51, 70)
_MEL_LENGTHS = (64, 96, 160)
_EXCITATION = "dec.m_source."  # begins its weights' names


def kind_of(tensors: Mapping[str, np.ndarray]) -> str:
    """What a state dict is: ``"voice"``, ``"contentvec"``, ``"rmvpe"`` or ``""``."""
    kinds = {
        "voice": synthesizer.is_voice,
        "contentvec": contentvec.is_contentvec,
        "rmvpe": rmvpe.is_rmvpe,
    }
    return next((kind for kind, test in kinds.items() if test(tensors)), "")


def read_weights(path: str | Path, kind: str) -> Checkpoint:
    """Read a weight file and check what it is.

    Args:
        path: a file, or a folder in the transformers layout.
        kind: ``"voice"``, ``"contentvec"`` or ``"rmvpe"``.

    Raises:
        ValueError: the file holds something else; says what.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = file_in_folder(path, kind)
    checkpoint = read_checkpoint(path)
    found = kind_of(checkpoint.tensors)
    names = {
        "voice": "an RVC voice",
        "contentvec": "a HuBERT / ContentVec encoder",
        "rmvpe": "an RMVPE pitch network",
        "": "a model that rvc_mlx does not know",
    }
    if found != kind:
        raise ValueError(f"{path}: this is {names[found]}; expected {names[kind]}")
    return checkpoint


def file_in_folder(folder: Path, kind: str = "contentvec") -> Path:
    """The weight file of a folder in the transformers layout.

    Raises:
        IsADirectoryError: there is none, or another kind than the encoder is wanted.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if kind == "contentvec" and (folder / name).is_file():
            return folder / name
    raise IsADirectoryError(
        f"{folder}: a folder was given; expected a file, or for the encoder a folder "
        "with pytorch_model.bin or model.safetensors"
    )


# Names under which a kind of weights may have been downloaded, the best first.
_DOWNLOADS = {
    "contentvec": ("contentvec", "hubert", "hubert-fairseq"),
    "rmvpe": ("rmvpe",),
}


def find_weights(kind: str, wanted: str) -> Path:
    """A bundled or downloaded weight file.

    Args:
        kind: ``"contentvec"`` or ``"rmvpe"``.
        wanted: what the voice names; another encoder would give another voice.

    Raises:
        FileNotFoundError: it is not there; says how to get it.
        ValueError: the voice names one that is neither bundled nor has a download.
    """
    if wanted == NETWORKS:
        return bundled_network(kind)
    option, what = {
        "contentvec": ("--encoder", "encoder"),
        "rmvpe": ("--rmvpe", "pitch network"),
    }[kind]
    if wanted != kind:
        raise ValueError(
            f"this voice was trained with the {what} {wanted!r}, which has no download; "
            f"pass its file with {option}"
        )
    for name in _DOWNLOADS[kind]:
        if path := locate(name):
            return path
    raise FileNotFoundError(
        f"no {kind} weights found; get them once with: rvc-mlx download {kind} "
        f"(or pass a file with {option})"
    )


def _builder(
    make: Callable[[], nn.Module],
    tensors: Mapping[str, np.ndarray],
    path: Path,
    steps: Callable[[Any], Sequence[Step]],
    simplify: Callable[[nn.Module], None] | None = None,
) -> Callable[[mx.Dtype], Sequence[Step]]:
    """A seam's ``build``: make the network, load it strictly, pick its steps."""
    return lambda dtype: steps(_load(make, tensors, path, dtype, simplify))


def _load(
    make: Callable[[], Network],
    tensors: Mapping[str, np.ndarray],
    path: Path,
    dtype: mx.Dtype,
    simplify: Callable[[nn.Module], None] | None = None,
) -> Network:
    """Make a network, load it strictly, simplify it in float32, change its type.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    network = make()
    try:
        load_strictly(network, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if simplify:
        simplify(network)
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


class Encoder:
    """A content encoder bound to an engine.

    Attributes:
        path: its file.
        config: its sizes.
        batch_frames: most frames of 10 ms of several recordings to encode together.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine):
        self.path = checkpoint.path
        tensors = contentvec.sanitize(checkpoint.tensors)
        metadata = encoder_metadata(checkpoint)
        folded = fold_weight_norm({k: v for k, v in tensors.items() if "pos_conv" in k})
        shapes = {k: v for k, v in tensors.items() if "pos_conv" not in k} | folded
        self.config = ContentVecConfig.from_tensors(shapes, metadata)
        widest = HOP_LENGTH // contentvec.FIRST_STRIDE * self.config.conv_dim
        self.batch_frames = engine.batch_bytes // (4 * widest)
        self._tensors = tensors
        self._engine = engine
        self._runs: dict[str, Run] = {}

    def encode(self, audio: np.ndarray, version: str) -> np.ndarray:
        """Features of 16 kHz audio ``[N]``, N >= 400: ``[F, C]`` float32."""
        return self._run(version)(audio[None])[0]

    def start(self, audio: Array, version: str) -> Array:
        """Features ``[B, F, C]`` of ``[B, N]``, where the engine made them.

        They may still be computing.
        """
        return self._run(version).start(audio)

    def beside(self) -> AbstractContextManager[Any]:
        """Where what ``start`` is given is made."""
        return self._engine.beside()

    def prepare(self, version: str) -> None:
        """Start to get ready for voices of ``"v1"`` or ``"v2"``."""
        self._run(version)

    def _run(self, version: str) -> Run:
        if version not in self._runs:
            self._runs[version] = self._engine.bind(self.seam(version))
        return self._runs[version]

    def network(self, dtype: mx.Dtype) -> ContentVec:
        """The network itself, with weights of this type, bound to nothing."""
        return _load(partial(ContentVec, self.config), self._tensors, self.path, dtype)

    def seam(self, version: str) -> Seam:
        """The encoder for voices of ``"v1"`` or ``"v2"``."""
        return Seam(
            "encode",
            fingerprint(self.path, self.config, version),
            lambda dtype: [partial(self.network(dtype), version=version)],
            lambda length: [((1, length), mx.float32)],
            _AUDIO_LENGTHS,
            beside=True,
        )


def encoder_metadata(checkpoint: Checkpoint) -> Mapping[str, object]:
    """What the tensors do not say: the number of attention heads."""
    sidecar = checkpoint.path.with_name("config.json")
    if checkpoint.path.suffix == ".bin" and sidecar.is_file():
        config = json.loads(sidecar.read_text("utf-8"))
        if config.get("do_stable_layer_norm") or config.get("conv_bias"):
            raise ValueError(
                f"{sidecar}: this HuBERT is of the large kind; RVC uses the base kind"
            )
        return {"num_heads": config["num_attention_heads"]}
    return checkpoint.metadata


class PitchNet:
    """RMVPE bound to an engine.

    Attributes:
        path: its file.
        config: its sizes.
        batch_frames: most frames of several chunks that go through it together.
        log_mel: its input, of samples and bands.
        on_device: whether that is computed where the network is.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine):
        self.path = checkpoint.path
        self.log_mel = engine.log_mel
        self.on_device = engine.log_mel is not log_mel
        self._tensors = rmvpe.sanitize(checkpoint.tensors)
        self.config = RMVPEConfig.from_tensors(self._tensors)
        # The decoder's first join: an image of two halves.
        widest = 2 * self.config.base_channels * self.config.n_mels
        self.batch_frames = engine.batch_bytes // (4 * widest)
        self.salience = engine.bind(self.seam())

    @property
    def frames_multiple(self) -> int:
        """The network takes a multiple of this many frames."""
        return 1 << self.config.levels

    def settings(self, **chosen: Any) -> PitchSettings:
        """How F0 is found with this network; what is ``chosen`` is of ``PitchSettings``."""
        return PitchSettings(
            self.config.n_mels,
            frames_multiple=self.frames_multiple,
            batch_frames=self.batch_frames,
            log_mel=self.log_mel,
            **chosen,
        )

    def seam(self) -> Seam:
        """Log-mel ``[1, T, n_mels]`` to salience ``[1, T, bins]``."""
        mels = self.config.n_mels
        return Seam(
            "salience",
            fingerprint(self.path, self.config),
            _builder(
                partial(RMVPE, self.config),
                self._tensors,
                self.path,
                lambda net: [net.image_features, net.fc[0].gru, net.classify],
                fold_batch_norm,
            ),
            lambda length: [((1, length, mels), mx.float32)],
            _MEL_LENGTHS,
        )


class Asked(NamedTuple):
    """What a voice asks of a conversion that leaves it to the voice; by default RVC's.

    Attributes:
        f0_threshold: of ``ConversionOptions``, 0 to 1.
        f0_onset: likewise, 0 to 10.
        f0_offset: likewise.
    """

    f0_threshold: float = VOICING_THRESHOLD
    f0_onset: int = 0
    f0_offset: int = 0


class Voice:
    """A voice bound to an engine.

    Attributes:
        path: its file.
        config: its sizes.
        asks: what it asks of a conversion.
        window: most frames of latent that the vocoder takes at once.
        window_step: windows are a multiple of it.
        few_windows: whether a segment alone has windows of few lengths.
        batch_frames: most frames of several windows that it takes together.
        context: of the window, frames on each side that only serve as context.
        source_context: frames of source beyond the window on each side.
        speakers: embeddings ``[speakers, gin_channels]`` float32.
        prior: features, noise, speaker [, coarse pitch] to latent.
        glides: whether the pitch glides between frames, or holds for each.
        source: excitation, see ``SineSource.from_frames``; None without F0.
        vocoder: latent, speaker [, source [, noises]] to audio.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine):
        self.path = checkpoint.path
        self.metadata = checkpoint.metadata
        self._tensors = synthesizer.sanitize(checkpoint.tensors)
        # One network for prior and vocoder, for as long as an engine keeps a part of it.
        self._networks: WeakValueDictionary[mx.Dtype, Synthesizer] = (
            WeakValueDictionary()
        )
        self.config = voice_config(checkpoint)
        self.asks = asked_by(checkpoint)
        self.speakers = self._tensors["emb_g.weight"].astype(np.float32)
        vocoder = build_vocoder(self.config)  # for its sizes; never evaluated
        assert isinstance(vocoder, HiFiGAN | RefineGANGenerator)
        self.context = vocoder.context
        self.source_context = getattr(vocoder, "source_context", 0)
        self.harmonics = getattr(vocoder, "HARMONICS", 0)
        self.glides = self.config.vocoder == "RefineGAN"
        self.noise_shapes: list[tuple[int, int]] = (
            vocoder.noise_shapes() if isinstance(vocoder, RefineGANGenerator) else []
        )
        most, step, self.few_windows = engine.windows(vocoder)
        # A RefineGAN takes noise of every channel at every sample.
        most = min(most, 1024) if self.noise_shapes else most
        self.window_step = min(step, most)
        self.window = most + 2 * self.context
        self.batch_frames = engine.batch_bytes // (4 * self._widest())
        self.prior = engine.bind(self.prior_seam())
        self.source = engine.bind(self.source_seam()) if self.config.f0 else None
        self.vocoder = engine.bind(self.vocoder_seam())

    def pitch_settings(
        self, net: PitchNet, options: ConversionOptions
    ) -> PitchSettings:
        """How F0 is found for this voice: as it asks where the options leave it to it."""

        def chosen(name: str) -> Any:
            given = getattr(options, name)
            return getattr(self.asks, name) if given < 0 else given

        return net.settings(
            threshold=chosen("f0_threshold"),
            onset=chosen("f0_onset"),
            offset=chosen("f0_offset"),
            mel_padding=options.mel_padding,
        )

    def _widest(self) -> int:
        """Numbers of one frame in the vocoder's largest array."""
        channels, samples, sizes = self.config.upsample_initial_channel, 1, []
        for rate in self.config.upsample_rates:
            channels, samples = channels // 2, samples * rate
            sizes.append(channels * samples)
        return max(*sizes, *(6 * per * width for per, width in self.noise_shapes))

    def window_frames(self, frames: int) -> int:
        """Frames of the window that decodes the next of ``frames`` frames to come."""
        most = self.window - 2 * self.context
        core = min(most, -(-frames // self.window_step) * self.window_step)
        return core + 2 * self.context

    def plan_window(self, frames: int, around: int) -> int:
        """``window_frames`` for a segment alone: few, whose graphs are soon there.

        Args:
            frames: of the segment that are to come.
            around: of context, which the other networks hear as well: so the vocoder meets
                a new length where they meet one, and not at other times.
        """
        if self.few_windows:
            frames = few_lengths(frames + around) - around
        return self.window_frames(frames)

    def _seam(
        self,
        name: str,
        steps: Callable[[Synthesizer], Sequence[Step]],
        inputs: Callable[[int], Sequence[Shape]],
        lengths: tuple[int, ...],
    ) -> Seam:
        def build(dtype: mx.Dtype) -> Sequence[Step]:
            network = self._networks.get(dtype)
            if network is None:
                make = partial(Synthesizer, self.config)
                network = _load(make, self._tensors, self.path, dtype)
                self._networks[dtype] = network
            return steps(network)

        identity = fingerprint(self.path, self.config)
        return Seam(name, identity, build, inputs, lengths)

    def prior_seam(self) -> Seam:
        """Text encoder, prior sample and inverse flow."""
        config = self.config

        def inputs(T: int) -> list[Shape]:
            shapes: list[Shape] = [
                ((1, T, config.feature_size), mx.float32),
                ((1, T, config.inter_channels), mx.float32),
                ((1, 1, config.gin_channels), mx.float32),
            ]
            return shapes + ([((1, T), mx.int32)] if config.f0 else [])

        return self._seam("prior", lambda net: [net.prior], inputs, _FRAME_LENGTHS)

    def source_seam(self) -> Seam:
        """Harmonic source of one window; always float32."""
        U, H = self.config.samples_per_frame, self.harmonics
        per_frame = U if self.glides else 1

        def inputs(T: int) -> list[Shape]:
            shapes = [(1, T, per_frame), (1, T, 1), (1, 1, H), (1, T * U, H)]
            return [(shape, mx.float32) for shape in shapes]

        def build(dtype: mx.Dtype) -> Sequence[Step]:
            """The source alone: it stays float32 where the network does not."""
            network = nn.Module()
            network.dec = nn.Module()
            network.dec.m_source = build_vocoder(self.config).m_source
            own = {k: v for k, v in self._tensors.items() if k.startswith(_EXCITATION)}
            _load(lambda: network, own, self.path, dtype)
            return [network.dec.m_source.from_frames]

        length = self.window + 2 * self.source_context
        identity = fingerprint(self.path, self.config)
        return Seam("source", identity, build, inputs, (length,), exact=True)

    def vocoder_seam(self) -> Seam:
        """Vocoder of one window."""
        config, U = self.config, self.config.samples_per_frame

        def inputs(T: int) -> list[Shape]:
            shapes = [(1, T, config.inter_channels), (1, 1, config.gin_channels)]
            if config.f0:
                shapes.append((1, (T + 2 * self.source_context) * U, 1))
            shapes += [(1, T * n, 6 * channels) for n, channels in self.noise_shapes]
            return [(shape, mx.float32) for shape in shapes]

        return self._seam("vocoder", lambda net: [net.dec], inputs, (self.window,))


def voice_config(checkpoint: Checkpoint) -> SynthesizerConfig:
    """Configuration of a voice file.

    Raises:
        ValueError: it is a training checkpoint, which has no configuration of its own,
            or its configuration is not RVC's.
    """
    config = checkpoint.metadata.get("config")
    if config is None:
        raise ValueError(
            f"{checkpoint.path}: a training checkpoint, which lacks the voice's "
            "settings; extract the voice from it first: rvc-mlx convert-model "
            f"{checkpoint.path.name} voice.safetensors"
        )
    try:
        return SynthesizerConfig.from_tensors(config, checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def asked_by(checkpoint: Checkpoint) -> Asked:
    """What the metadata of a voice file asks for.

    Raises:
        ValueError: a value is none that the option of that name takes.
    """
    told = checkpoint.metadata
    asked = Asked(**{name: told[name] for name in Asked._fields if name in told})
    threshold = asked.f0_threshold
    if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
        raise ValueError(
            f"{checkpoint.path}: asks for f0_threshold {threshold!r}; expected 0 to 1"
        )
    for name in ("f0_onset", "f0_offset"):
        frames = getattr(asked, name)
        if type(frames) is not int or not 0 <= frames <= MOST_WIDENED:
            raise ValueError(
                f"{checkpoint.path}: asks for {name} {frames!r}; expected 0 to "
                f"{MOST_WIDENED} frames"
            )
    return asked
