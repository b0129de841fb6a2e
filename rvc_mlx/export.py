"""Rewrite a public checkpoint as ``.safetensors`` or ``.npz``, with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rvc_mlx.checkpoint import Checkpoint, hash_file, read_checkpoint, save_checkpoint
from rvc_mlx.loading import Asked, encoder_metadata, file_in_folder, kind_of
from rvc_mlx.models import contentvec, rmvpe, synthesizer
from rvc_mlx.models.layers import fold_weight_norm
from rvc_mlx.models.voice_config import SynthesizerConfig, public_config
from rvc_mlx.version import __version__

_KEPT = (
    "info",
    "epoch",
    "step",
    "model_name",
    "author",
    "embedder_model",
    "pitch_model",
    *Asked._fields,
    "speakers_id",
    "creation_date",
    "model_hash",
    "dataset_length",
)


def convert_model(
    source: str | Path,
    target: str | Path,
    half: bool = False,
    expected: str = "",
) -> str:
    """Convert weights of any kind that a conversion uses.

    Weight norm is folded in float32, training-only tensors are left out, names and
    layouts stay the checkpoint's; the metadata tells the kind, the configuration and
    the source with its sha256. A training checkpoint (``G_*.pth``) becomes a voice.

    Args:
        source: ``.pth``, ``.pt``, ``.bin``, ``.safetensors`` or ``.npz``, or the folder
            of an encoder in the transformers layout.
        target: ``.safetensors`` or ``.npz``.
        half: store float16 instead of float32.
        expected: refuse another kind than this.

    Returns:
        The kind: ``"voice"``, ``"contentvec"`` or ``"rmvpe"``.

    Raises:
        ValueError: the source is of no known or of another kind.
        OSError: a file cannot be read or written.
    """
    source = Path(source)
    if source.is_dir():
        source = file_in_folder(source)
    checkpoint = read_checkpoint(source)
    kind = kind_of(checkpoint.tensors)
    if not kind or (expected and kind != expected):
        raise ValueError(
            f"{source}: this is {f'a {kind}' if kind else 'no'} checkpoint; expected "
            f"{expected or 'a voice, a HuBERT / ContentVec encoder or RMVPE'}"
        )
    tensors, metadata = _PREPARE[kind](checkpoint)
    dtype = np.float16 if half else np.float32
    converted = {
        name: value.astype(dtype) if value.dtype.kind == "f" else value
        for name, value in fold_weight_norm(tensors).items()
    }
    provenance = {
        "source": source.name,
        "source_sha256": hash_file(source),
        "converted_by": f"rvc_mlx {__version__}",
    }
    save_checkpoint(target, converted, {"kind": kind, **metadata, **provenance})
    return kind


def _prepare_voice(
    checkpoint: Checkpoint,
) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    tensors = synthesizer.sanitize(checkpoint.tensors)
    listed = checkpoint.metadata.get("config")
    if listed is None:
        listed = public_config(checkpoint.tensors)
    config = SynthesizerConfig.from_tensors(listed, tensors)
    kept = {k: v for k, v in checkpoint.metadata.items() if k in _KEPT}
    return tensors, {
        "config": config.as_list(),
        "sr": config.sample_rate,
        "f0": int(config.f0),
        "version": config.version,
        "vocoder": config.vocoder,
        **kept,
    }


def _prepare_encoder(
    checkpoint: Checkpoint,
) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    tensors = contentvec.sanitize(checkpoint.tensors)
    heads = encoder_metadata(checkpoint).get("num_heads")
    return tensors, {} if heads is None else {"num_heads": heads}


def _prepare_rmvpe(
    checkpoint: Checkpoint,
) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    return rmvpe.sanitize(checkpoint.tensors), {}


_PREPARE = {
    "voice": _prepare_voice,
    "contentvec": _prepare_encoder,
    "rmvpe": _prepare_rmvpe,
}
