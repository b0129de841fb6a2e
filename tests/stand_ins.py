"""Untrained networks in the files and folders that the recipes and a training run leave."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from recipes.exporting import export
from rvc_mlx.checkpoint import hash_file
from rvc_mlx.models.contentvec import ContentVec, ContentVecConfig
from rvc_mlx.models.rmvpe import RMVPE, RMVPEConfig
from rvc_mlx.training.features import SETTINGS
from rvc_mlx.training.index import build_index
from rvc_mlx.training.parametrization import initial, to_torch
from rvc_mlx.training.plan import Plan
from rvc_mlx.training.presets import TrainingConfig, preset
from rvc_mlx.training.run_options import RunOptions
from rvc_mlx.training.voice_export import VoiceFacts, write_voice

ENCODER = ContentVecConfig(
    conv_dim=32,
    hidden_size=48,
    num_layers=2,
    num_heads=2,
    intermediate_size=96,
    pos_conv_kernel=16,
    pos_conv_groups=4,
    final_proj_size=0,
    bottleneck_size=64,
)
PITCH = RMVPEConfig(base_channels=4, levels=3, blocks=1, inter_layers=1, gru_size=32)
CORPUS = {
    "speakers": "nobody",
    "licences_of_voices": "none",
    "packages": "none",
    "corpus": "none: untrained",
    "seed": "0",
}


def voice_config(width: int = ENCODER.bottleneck_size) -> TrainingConfig:
    """The preset ``small`` with a narrow vocoder."""
    config = preset("small", "v2", True, 1, width)
    model = replace(config.model, upsample_initial_channel=64, n_layers=2)
    return replace(config, model=model)


def write_run(folder: Path, name: str, networks, seed: int, width: int = 64) -> Path:
    """A run's folder: its plan, what made its features, a voice and an index."""
    folder.mkdir(parents=True)
    config = voice_config(width)
    generator, _ = initial(config, seed)
    facts = VoiceFacts(name, embedder="small")
    write_voice(
        folder / f"{name}.safetensors", to_torch(generator), config.model, facts
    )
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((500, width)).astype(np.float32)
    build_index(rows, folder / f"{name}.index", "v2")
    start = ["before.safetensors (sha256 0)"] if seed == 0 else []
    Plan(config, RunOptions(seed=seed), name, started_from=start).save(folder)
    settings = {
        "features": {"encoder_sha256": hash_file(networks.encoder), "version": "v2"},
        "pitch": {"rmvpe_sha256": hash_file(networks.rmvpe), "threshold": 0.03},
        "problems": [],
    }
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


def write_stand_ins(folder: Path) -> SimpleNamespace:
    """Everything that ``recipes.bundle`` takes.

    Returns:
        Paths: ``encoder``, ``rmvpe``, ``slt``, ``rms`` (folders) and ``recordings``.
    """
    paths = SimpleNamespace(
        encoder=folder / "content.safetensors",
        rmvpe=folder / "pitch.safetensors",
        recordings=folder / "recordings",
    )
    mx.random.seed(0)
    told = {**CORPUS, "steps": 0}
    heads = {"num_heads": ENCODER.num_heads}
    export(paths.encoder, ContentVec(ENCODER), "contentvec", {**told, **heads})
    export(paths.rmvpe, RMVPE(PITCH), "rmvpe", told)
    for seed, name in enumerate(("slt", "rms")):
        setattr(paths, name, write_run(folder / name, name, paths, seed))
    paths.recordings.mkdir()
    packages = {"flite": "2", "htsengine": "1", "festvox-us-slt-hts": "0"}
    provenance = {"packages": {**packages, "espeak-ng": "9"}, "seed": 2}
    (paths.recordings / "provenance.json").write_text(json.dumps(provenance))
    return paths
