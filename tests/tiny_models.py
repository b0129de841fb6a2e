"""Tiny networks for the tests: the PyTorch reference with random weights, and its MLX twin.

The twin is loaded from the reference's own state dict, as it would be from a file.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import rvc_reference.contentvec as torch_contentvec
import rvc_reference.refinegan as torch_refinegan
import rvc_reference.rmvpe as torch_rmvpe
from rvc_mlx.models import contentvec, refinegan, rmvpe, synthesizer
from rvc_mlx.models.layers import fold_weight_norm, load_strictly
from rvc_reference.synthesizer import Synthesizer as TorchSynthesizer

torch.set_num_threads(2)

CONTENTVEC = torch_contentvec.ContentVecConfig(
    conv_dim=(16,) * 7,
    hidden_size=24,
    num_hidden_layers=12,
    num_attention_heads=3,
    intermediate_size=40,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=3,
    classifier_proj_size=12,
)
RMVPE = torch_rmvpe.RMVPEConfig(
    channels=4, levels=3, inter_layers=2, blocks=2, gru_hidden=8, n_mels=32
)


@dataclass(frozen=True)
class Kind:
    """What sets the voices of the tests apart."""

    vocoder: str = "HiFi-GAN"
    f0: bool = True
    rates: tuple[int, ...] = (4, 2, 2, 2)
    kernels: tuple[int, ...] = (8, 4, 4, 4)
    initial: int = 32

    @property
    def config(self) -> list:
        """The checkpoint's list of 18."""
        fixed = self.vocoder == "RefineGAN"  # its blocks are not configurable
        taps = [3, 7, 11] if fixed else [3, 7]
        dilations = [[1, 3, 5]] * 3 if fixed else [[1, 3]] * 2
        return [
            *(33, 32, 12, 16, 24, 2, 2, 3, 0, "1", taps, dilations),
            *(list(self.rates), self.initial, list(self.kernels), 3, 8),
            100 * int(np.prod(self.rates)),
        ]


VOICES = {
    "nsf": Kind(),
    "nsf-5-stages": Kind("HiFi-GAN", True, (6, 2, 2, 2, 2), (16, 4, 4, 4, 4), 64),
    "nsf-odd": Kind(rates=(5, 2, 3), kernels=(10, 4, 6)),
    "plain": Kind(f0=False),
    "mrf": Kind("MRF HiFi-GAN"),
    "mrf-5-stages": Kind("MRF HiFi-GAN", True, (4, 2, 2, 2, 2), (8, 4, 4, 4, 4), 64),
    "mrf-odd": Kind("MRF HiFi-GAN", True, (5, 2, 3), (10, 4, 6)),
    "refinegan": Kind("RefineGAN", initial=64),
    "refinegan-wide": Kind("RefineGAN", initial=512),
}


def narrow_refinegan(patch: pytest.MonkeyPatch) -> None:
    """Make RefineGAN an eighth of its only width, in both programs."""
    patch.setattr(refinegan, "CHANNELS", 64)
    patch.setattr(torch_refinegan, "FIRST_CHANNELS", 2)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every tensor so that activations keep their scale and no term is idle."""
    rng = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        leaf, shape = name.rsplit(".", 1)[-1], tuple(tensor.shape)
        if leaf == "num_batches_tracked":
            continue
        normal = rng.standard_normal(shape)
        if leaf in ("weight_g", "running_var", "gamma") or (
            leaf == "weight" and len(shape) == 1
        ):
            values = rng.uniform(0.6, 1.2, shape)
        elif leaf in ("bias", "beta", "running_mean") or leaf.startswith("bias_"):
            values = 0.2 * normal
        elif leaf == "weight_v" or "emb_g" in name or "emb_pitch" in name:
            values = normal
        else:
            values = normal / np.sqrt(max(np.prod(shape[1:]), 1))
        tensor.copy_(torch.from_numpy(values))
    model.eval()


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """State dict as numpy, as a checkpoint holds it."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def make_contentvec() -> tuple[torch_contentvec.ContentVec, contentvec.ContentVec]:
    """Reference and twin."""
    reference = torch_contentvec.ContentVec(CONTENTVEC)
    randomize(reference, 1)
    tensors = fold_weight_norm(contentvec.sanitize(arrays(reference)))
    config = contentvec.ContentVecConfig.from_tensors(tensors, {"num_heads": 3})
    twin = contentvec.ContentVec(config)
    load_strictly(twin, tensors)
    return reference, twin


def make_rmvpe() -> tuple[torch_rmvpe.RMVPE, rmvpe.RMVPE]:
    """Reference and twin."""
    reference = torch_rmvpe.RMVPE(RMVPE)
    randomize(reference, 2)
    tensors = rmvpe.sanitize(arrays(reference))
    twin = rmvpe.RMVPE(rmvpe.RMVPEConfig.from_tensors(tensors))
    load_strictly(twin, tensors)
    return reference, twin


def make_voice(name: str) -> tuple[TorchSynthesizer, synthesizer.Synthesizer]:
    """Reference (with ``enc_q``) and twin of a kind in ``VOICES``."""
    kind = VOICES[name]
    reference = TorchSynthesizer(
        kind.config, "v1", kind.f0, kind.vocoder, with_enc_q=True
    )
    randomize(reference, 3)
    tensors = synthesizer.sanitize(arrays(reference))
    config = synthesizer.SynthesizerConfig.from_tensors(kind.config, tensors)
    twin = synthesizer.Synthesizer(config)
    load_strictly(twin, tensors)
    return reference, twin
