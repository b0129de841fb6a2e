"""The content encoder's training: phones, two throats, no speaker.

Three losses on the narrow features: cross entropy of the phones through one linear
layer; two views of a clip in different throats and rooms must give the same features;
a classifier of the speaker, through a gradient reversal, must fail. With parallel speech
(``parallel``) the second view is of another speaker, and what the target voice sounds like
at that moment must follow from the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from recipes.augment import FIRST_SAMPLE, augment, source_length
from recipes.corpus import Shard
from recipes.draws import CONTENT, Draws, Strength, draw
from recipes.optimisation import Batch, HostBatch, Losses
from recipes.parallel import (
    PER_FRAME,
    SPECTRUM_HOP,
    Mouth,
    Pair,
    spectra_at,
    spectral_distance,
)
from recipes.phones import PHONES, UNKNOWN, frame_labels
from recipes.running import on_device, random_key
from rvc_mlx.models.contentvec import (
    HOP_LENGTH,
    RECEPTIVE_FIELD,
    ContentVec,
    ContentVecConfig,
)
from rvc_mlx.training.front_end import quicken

# 12.4 million parameters.
CONFIG = ContentVecConfig(
    conv_dim=320,
    hidden_size=384,
    num_layers=6,
    num_heads=6,
    intermediate_size=1408,
    pos_conv_kernel=64,
    pos_conv_groups=16,
    final_proj_size=0,
    bottleneck_size=64,
    centred=True,
)


class ContentTrainer(nn.Module):
    """The encoder, and what is only there to train it."""

    def __init__(self, config: ContentVecConfig, speakers: int, voices: int = 0):
        super().__init__()
        width = config.bottleneck_size
        self.encoder = ContentVec(config)
        quicken(self.encoder)
        self.head = nn.Linear(width, len(PHONES))
        self.adversary = [nn.Linear(2 * width, 256), nn.Linear(256, speakers)]
        if voices:
            self.mouth = Mouth(width, voices)

    def speaker_logits(self, features: mx.array, strength: mx.array) -> mx.array:
        """Speaker ``[B, speakers]`` from mean and spread over time, gradient reversed."""
        mean = features.mean(axis=1)
        spread = mx.sqrt(mx.square(features - mean[:, None]).mean(axis=1) + 1e-4)
        x = mx.concatenate([mean, spread], axis=-1)
        x = mx.stop_gradient((1 + strength) * x) - strength * x
        return self.adversary[1](nn.relu(self.adversary[0](x)))


@dataclass(frozen=True)
class ContentWeights:
    """Factors of the losses besides the cross entropy's 1.

    Attributes:
        pair: difference of the two views' features.
        speaker: strength of the reversed gradient.
        spectra: difference of the target voices' spectra, of parallel speech.
    """

    pair: float = 1.0
    speaker: float = 0.3
    spectra: float = 2.0


def frame_centres(frames: int) -> np.ndarray:
    """Sample at the centre of each frame's receptive field."""
    return np.arange(frames) * HOP_LENGTH + (RECEPTIVE_FIELD - 1) / 2


_PARALLEL = ("voice", "spectra_a", "spectra_b", "within_a", "within_b")
_NOBODY = -1  # speaker of parallel speech: a stranger is nobody in particular


@dataclass(frozen=True)
class _Row:
    """A clip of a batch.

    Attributes:
        a, b: what the views hear, the same but in parallel speech.
        start: sample of both where they begin.
        speaker: number, or ``_NOBODY``.
        pair: in parallel speech.
    """

    a: Shard
    b: Shard
    start: int
    speaker: int
    pair: Pair | None = None


class ContentBatches:
    """Batches of two views of random clips, a pure function of the step's number.

    Args:
        shards: the corpus, decoded.
        batch_size: clips.
        frames: of each view, 50 per second.
        seed: of everything.
        strength: of the augmentation.
        pairs: parallel speech: half of each batch, its last clips, if there is any.

    Raises:
        ValueError: a batch of one clip has no half.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        batch_size: int,
        frames: int,
        seed: int,
        strength: Strength = CONTENT,
        pairs: Sequence[Pair] = (),
    ):
        if pairs and batch_size < 2:
            raise ValueError(
                f"--batch {batch_size} with --parallel; expected 2 or more: half of a "
                "batch is parallel speech"
            )
        self.speakers = sorted({shard.speaker for shard in shards})
        self._shards = list(shards)
        lengths = np.array([len(shard.samples) for shard in shards], np.float64)
        # Shards of short speakers are drawn more often than their share of the time.
        self._odds = np.sqrt(lengths) / np.sqrt(lengths).sum()
        self._size, self._frames, self._seed = batch_size, frames, seed
        self._centres = frame_centres(frames)
        self._length = (frames - 1) * HOP_LENGTH + RECEPTIVE_FIELD
        self._span = source_length(self._length)
        self._strength = strength
        self._pairs = list(pairs)
        self._paired = batch_size // 2 if pairs else 0  # clips of a batch

    def __call__(self, step: int) -> HostBatch:
        """The batch of a step: per view a and b its audio, labels and its partner frame."""
        rng = np.random.default_rng([self._seed, step])
        rows = self._rows(rng)
        views = [draw(rng, len(rows), self._length, self._strength) for _ in range(2)]
        batch: HostBatch = {}
        for name, view, other in zip("ab", views, views[::-1], strict=True):
            batch |= self._view(name, rows, view)
            batch[f"key_{name}"] = random_key(rng)
            if name == "a":
                batch["partner"] = self.partners(view, other)
        batch["speaker"] = np.array([row.speaker for row in rows], np.int32)
        if self._paired:
            voices = [row.pair.voice for row in rows if row.pair]
            batch["voice"] = np.array(voices, np.int32)
        return batch

    def _rows(self, rng: np.random.Generator) -> list[_Row]:
        chosen = rng.choice(len(self._shards), self._size - self._paired, p=self._odds)
        rows = []
        for shard in (self._shards[i] for i in chosen):
            start = int(rng.integers(0, max(len(shard.samples) - self._span, 1)))
            rows.append(_Row(shard, shard, start, self.speakers.index(shard.speaker)))
        for _ in range(self._paired):
            pair = self._pairs[rng.integers(len(self._pairs))]
            start = int(rng.integers(0, max(len(pair.b.samples) - self._length, 1)))
            rows.append(_Row(pair.a, pair.b, start, _NOBODY, pair))
        return rows

    def _view(self, name: str, rows: Sequence[_Row], view: Draws) -> HostBatch:
        """What one of the two views hears, by names that end or begin with its own."""
        source, labels, spectra = [], [], []
        for row, rate in zip(rows, view.rate, strict=True):
            clip: Shard = getattr(row, name)
            part = clip.samples[row.start : row.start + self._span]
            source.append(np.pad(part, (0, self._span - len(part))))
            first = row.start + FIRST_SAMPLE
            times = first + rate * self._centres
            labels.append(frame_labels(clip.classes, clip.ends, times))
            if row.pair:
                spectra.append(self._spectra(row.pair, first, rate))
        batch: HostBatch = {f"{name}.{k}": v for k, v in view.arrays().items()}
        batch[f"source_{name}"] = np.stack(source)
        batch[f"labels_{name}"] = np.stack(labels).astype(np.int32)
        if spectra:
            there, within = zip(*spectra, strict=True)
            batch[f"spectra_{name}"] = np.stack(there)
            batch[f"within_{name}"] = np.stack(within)
        return batch

    def _spectra(
        self, pair: Pair, first: float, rate: float
    ) -> tuple[np.ndarray, np.ndarray]:
        hops = np.arange(PER_FRAME) - (PER_FRAME - 1) / 2
        moments = (self._centres[:, None] + SPECTRUM_HOP * hops).ravel()
        return spectra_at(pair, first + rate * moments)

    def partners(self, a: Draws, b: Draws) -> np.ndarray:
        """Where in view b each frame of view a is heard.

        Returns:
            ``[B, F]`` float32 frames of b, -1 where b is over by then.
        """
        moments = (a.rate / b.rate)[:, None] * self._centres
        places = (moments - self._centres[0]) / HOP_LENGTH
        heard = (places >= 0) & (places < self._frames - 1)
        return np.where(heard, places, -1).astype(np.float32)


def views(batch: Batch, L: int) -> mx.array:
    """Both views of a batch, ``[2 B, L]``, the first ones first."""
    made = []
    for name in "ab":
        source = batch[f"source_{name}"].astype(mx.float32) / 32768
        draws = {k[2:]: v for k, v in batch.items() if k.startswith(f"{name}.")}
        made.append(augment(source, draws, L, batch[f"key_{name}"]))
    return mx.concatenate(made)


def prepare(host: HostBatch, frames: int) -> Batch:
    """What the compiled step takes: audio in place of the source and its draws."""
    batch = on_device(host)
    L = (frames - 1) * HOP_LENGTH + RECEPTIVE_FIELD
    return {
        "audio": views(batch, L),
        "labels": mx.concatenate([batch["labels_a"], batch["labels_b"]]),
        "partner": batch["partner"],
        "speaker": batch["speaker"],
        **{name: batch[name] for name in _PARALLEL if name in batch},
    }


def content_loss(weights: ContentWeights):
    """The loss function of ``Training``."""

    def loss(net: nn.Module, batch: Batch, progress: mx.array) -> Losses:
        dtype = net.head.weight.dtype
        features = net.encoder(batch["audio"].astype(dtype))
        entropy, right = _class_loss(net.head(features), batch["labels"], UNKNOWN)
        features = features.astype(mx.float32)
        a, b = mx.split(features, 2)
        pair = pair_distance(a, b, batch["partner"])
        strength = mx.minimum(1.0, 5 * progress).astype(dtype)
        logits = net.speaker_logits(features.astype(dtype), strength)
        speaker = mx.concatenate([batch["speaker"]] * 2)
        adversary, named = _class_loss(logits, speaker, _NOBODY)
        total = entropy + weights.pair * pair + weights.speaker * adversary
        losses = {
            "phones": entropy,
            "right": right,
            "pair": pair,
            "speaker": adversary,
            "named": named,
        }
        if "voice" in batch:
            spoken = [
                net.mouth(view[-len(batch["voice"]) :].astype(dtype)) for view in (a, b)
            ]
            losses["spectra"], losses["own"] = (
                spectral_distance(
                    mouth,
                    batch["voice"],
                    batch[f"spectra_{name}"],
                    batch[f"within_{name}"],
                )
                for name, mouth in zip("ab", spoken, strict=True)
            )
            total = total + weights.spectra / 2 * (losses["spectra"] + losses["own"])
        return {"total": total, **losses}

    return loss


def _class_loss(
    logits: mx.array, labels: mx.array, unknown: int
) -> tuple[mx.array, mx.array]:
    """Cross entropy and share of right answers, where the class is known."""
    known = (labels != unknown).astype(mx.float32)
    labels = mx.where(labels == unknown, 0, labels)
    entropy = nn.losses.cross_entropy(logits.astype(mx.float32), labels)
    right = (logits.argmax(axis=-1) == labels) * known
    count = mx.maximum(known.sum(), 1)
    return (entropy * known).sum() / count, right.sum() / count


def pair_distance(a: mx.array, b: mx.array, partner: mx.array) -> mx.array:
    """Squared difference of two views as a share of the features' variance.

    Args:
        a: ``[B, F, C]`` float32.
        b: as ``a``.
        partner: ``[B, F]`` place in ``b`` of each frame of ``a``, -1 for none.

    Returns:
        A number: 0 for equal features, 1 for unrelated ones.
    """
    heard = (partner >= 0).astype(mx.float32)[..., None]
    place = mx.maximum(partner, 0)
    index = mx.floor(place).astype(mx.int32)[..., None]
    index = mx.broadcast_to(index, a.shape)
    part = (place - mx.floor(place))[..., None]
    there = mx.take_along_axis(b, index, axis=1) * (1 - part)
    there = there + mx.take_along_axis(b, index + 1, axis=1) * part
    mean = a.mean(axis=(0, 1), keepdims=True)
    difference = mx.square(a - there) * heard
    variance = (mx.square(a - mean) + mx.square(there - mean)) * heard
    return difference.sum() / (variance.sum() + 1e-6)
