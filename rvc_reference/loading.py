"""Reading public checkpoints into the reference networks; every load is strict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rvc_reference.contentvec import ContentVec, to_reference_keys
from rvc_reference.rmvpe import RMVPE, RMVPEConfig
from rvc_reference.synthesizer import Synthesizer, detect


class InertDictionary:
    """Stands in for the fairseq class that HuBERT's pickle mentions; does nothing."""


def read_pickle(path: str | Path) -> Any:
    """Read a checkpoint without running code from it.

    Raises:
        ValueError: it is none that PyTorch reads.
    """
    inert = (InertDictionary, "fairseq.data.dictionary.Dictionary")
    try:
        with torch.serialization.safe_globals([inert]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{Path(path).name}: PyTorch cannot read this as a checkpoint; give a .pth "
            "or .pt file of tensors"
        ) from error


def to_float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give float32 copies of half tensors; integers stay."""
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def load_contentvec(path: str | Path) -> ContentVec:
    """Load ``hubert_base.pt``, or a folder with ``pytorch_model.bin`` and ``config.json``."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    state = read_pickle(path / "pytorch_model.bin" if path.is_dir() else path)
    fairseq = "model" in state
    state = to_reference_keys(to_float(state["model"] if fairseq else state))
    config = {} if fairseq else json.loads((folder / "config.json").read_text())
    if "final_proj.weight" not in state:
        config = {**config, "classifier_proj_size": None}
    model = ContentVec(config)
    model.load_state_dict(state)
    model.fuse()
    return model.eval()


def load_rmvpe(path: str | Path) -> RMVPE:
    """Load ``rmvpe.pt``; the sizes are read off the tensors."""
    state = to_float(read_pickle(path))
    model = RMVPE(RMVPEConfig.from_state_dict(state))
    model.load_state_dict(state)
    return model.eval()


def build_synthesizer(config: Sequence, weights: dict[str, Tensor]) -> Synthesizer:
    """Give the voice of a config list and its tensors (strict)."""
    with torch.device("meta"):
        model = Synthesizer(config, **detect(weights))
    model.load_state_dict(to_float(weights), assign=True)
    model.fuse()
    return model.eval()


def load_voice(path: str | Path) -> Synthesizer:
    """Load a voice ``.pth``."""
    checkpoint = read_pickle(path)
    return build_synthesizer(checkpoint["config"], checkpoint["weight"])
