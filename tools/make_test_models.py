"""Write random test models in exactly the public file formats.

    python tools/make_test_models.py --out DIR [--only NAME ...] [--small] [--seed N]

The weights are random (the F0 network's last layer is fitted to synthetic speech),
but sizes, names, types and activations are those of the real files. The same seed
gives the same files. ``--small`` writes one tiny set instead: an encoder, an F0
network, a v1 voice and its index.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rvc_reference.contentvec import V1_LAYER, ContentVec, ContentVecConfig
from rvc_reference.rmvpe import RMVPEConfig
from tools.random_weights import (
    random_contentvec,
    random_rmvpe,
    random_voice,
    synthetic_speech,
)

DILATIONS = [[1, 3, 5]] * 3
RATES = {  # (version, kHz): (spectrogram bins, upsample rates, upsample kernels)
    ("v1", 32): (513, [10, 4, 2, 2, 2], [16, 16, 4, 4, 4]),
    ("v1", 40): (1025, [10, 10, 2, 2], [16, 16, 4, 4]),
    ("v1", 48): (1025, [10, 6, 2, 2, 2], [16, 16, 4, 4, 4]),
    ("v2", 24): (513, [10, 6, 2, 2], [20, 12, 4, 4]),
    ("v2", 32): (513, [10, 8, 2, 2], [20, 16, 4, 4]),
    ("v2", 40): (1025, [10, 10, 2, 2], [16, 16, 4, 4]),
    ("v2", 48): (1025, [12, 10, 2, 2], [24, 20, 4, 4]),
}
SPEAKERS = 109
SMALL_CONTENTVEC = ContentVecConfig(
    conv_dim=(32,) * 7,
    hidden_size=48,
    num_attention_heads=4,
    intermediate_size=96,
    num_conv_pos_embeddings=32,
    num_conv_pos_embedding_groups=4,
)
SMALL_RMVPE = RMVPEConfig(channels=2, inter_layers=1, blocks=1, gru_hidden=64)
SMALL_VOICE = [
    *(513, 32, 64, 64, 128, 2, 2, 3, 0, "1", [3, 7, 11], DILATIONS),
    *([10, 4, 2, 2, 2], 64, [16, 16, 4, 4, 4], 4, 32, 32000),
]


@dataclass(frozen=True)
class VoiceFile:
    """What one voice file holds; ``applio`` adds the fields that only Applio writes."""

    version: str
    khz: int
    f0: bool = True
    vocoder: str = "HiFi-GAN"
    applio: bool = False
    speakers: int = SPEAKERS


VOICES = {
    "v2_48k": VoiceFile("v2", 48),
    "v2_40k": VoiceFile("v2", 40),
    "v2_32k": VoiceFile("v2", 32),
    "v2_24k": VoiceFile("v2", 24, applio=True),
    "v1_32k": VoiceFile("v1", 32),
    "v1_40k": VoiceFile("v1", 40),
    "v1_48k": VoiceFile("v1", 48),
    "v2_40k_nof0": VoiceFile("v2", 40, f0=False),
    "v1_40k_nof0": VoiceFile("v1", 40, f0=False),
    **{
        f"v2_{khz}k_{short}": VoiceFile("v2", khz, vocoder=vocoder, applio=True)
        for short, vocoder in (("mrf", "MRF HiFi-GAN"), ("refinegan", "RefineGAN"))
        for khz in (32, 40, 48)
    },
    "v2_40k_multi": VoiceFile("v2", 40, applio=True, speakers=5),
}


def voice_config(version: str, khz: int) -> list:
    """Give the list of 18 that a voice file holds."""
    bins, rates, kernels = RATES[version, khz]
    sizes = [bins, 32, 192, 192, 768, 2, 6, 3, 0, "1", [3, 7, 11], DILATIONS]
    return [*sizes, rates, 512, kernels, SPEAKERS, 256, khz * 1000]


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give half-precision copies; integers stay."""
    return {
        k: v.half() if v.is_floating_point() else v.clone() for k, v in state.items()
    }


def rename(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace parts of the keys, every rule in turn."""
    renamed = {}
    for key, tensor in state.items():
        for old, new in rules:
            key = key.replace(old, new)
        renamed[key] = tensor
    return renamed


def to_fairseq(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of ``ContentVec`` to those of ``hubert_base.pt``."""
    first = "feature_extractor.conv_layers.0.layer_norm."
    rules = [
        ("masked_spec_embed", "mask_emb"),
        (first, "feature_extractor.conv_layers.0.2."),
        ("feature_projection.layer_norm.", "layer_norm."),
        ("feature_projection.projection.", "post_extract_proj."),
        ("encoder.pos_conv_embed.conv.", "encoder.pos_conv.0."),
        (".attention.", ".self_attn."),
        (".feed_forward.intermediate_dense.", ".fc1."),
        (".feed_forward.output_dense.", ".fc2."),
    ]
    rules += [
        (f"encoder.layers.{i}.layer_norm.", f"encoder.layers.{i}.self_attn_layer_norm.")
        for i in range(12)
    ]
    rules += [(f"conv_layers.{i}.conv.", f"conv_layers.{i}.0.") for i in range(7)]
    return rename(state, rules)


def fairseq_dictionary() -> object:
    """Give an object whose class is named ``fairseq.data.dictionary.Dictionary``."""
    names = ("fairseq", "fairseq.data", "fairseq.data.dictionary")
    for name in names:
        sys.modules.setdefault(name, ModuleType(name))
    kind = type("Dictionary", (), {"__module__": names[-1]})
    sys.modules[names[-1]].Dictionary = kind
    dictionary = kind()
    dictionary.symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    dictionary.indices = {symbol: i for i, symbol in enumerate(dictionary.symbols)}
    return dictionary


def write_hubert(model: ContentVec, path: Path) -> None:
    """Write ``hubert_base.pt``: half tensors under fairseq's names, and its leftovers."""
    state = half(to_fairseq(model.state_dict()))
    generator = torch.Generator().manual_seed(504)
    state["label_embs_concat"] = torch.rand(504, 256, generator=generator).half()
    checkpoint = {
        "args": None,
        "cfg": {"_name": None, "model": {"_name": "contentvec", "encoder_layers": 12}},
        "model": state,
        "criterion": None,
        "optimizer_history": [{"num_updates": 100000, "best_loss": 3.2}],
        "task_state": {"dictionaries": [fairseq_dictionary()]},
        "extra_state": {"epoch": 700, "val_loss": 3.2},
        "last_optimizer_state": None,
    }
    torch.save(checkpoint, path)


def write_contentvec(
    model: ContentVec, folder: Path, *, old_names: bool, small: bool = False
) -> None:
    """Write a transformers folder: ``pytorch_model.bin`` and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = half(model.state_dict()) if small else dict(model.state_dict())
    if not old_names:
        middle = "conv.parametrizations.weight.original"
        state = rename(
            state, [("conv.weight_g", f"{middle}0"), ("conv.weight_v", f"{middle}1")]
        )
    torch.save(state, folder / "pytorch_model.bin")
    values = {
        "architectures": ["HubertModelWithFinalProj"],
        "model_type": "hubert",
        "conv_bias": False,
        "do_stable_layer_norm": False,
        "feat_extract_activation": "gelu",
        "feat_extract_norm": "group",
        "hidden_act": "gelu",
        **vars(model.config),
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def write_rmvpe(
    config: RMVPEConfig, path: Path, seed: int, seconds: float = 24.0
) -> None:
    """Write ``rmvpe.pt``: a bare dict of half tensors."""
    torch.save(half(random_rmvpe(config, seed, seconds).state_dict()), path)


def applio_fields(name: str, spec: VoiceFile) -> dict:
    """Give the entries that only Applio writes."""
    text = f"{name}-200-10000-{spec.khz}000-{spec.version}"
    return {
        "epoch": 200,
        "step": 10000,
        "creation_date": "2025-01-01T00:00:00",
        "model_hash": hashlib.sha256(text.encode()).hexdigest(),
        "dataset_length": "0:10:00",
        "model_name": name,
        "author": "None",
        "embedder_model": "contentvec",
        "speakers_id": spec.speakers if spec.speakers != SPEAKERS else 1,
        "vocoder": spec.vocoder,
    }


def write_voice(
    name: str, spec: VoiceFile, config: list, path: Path, seed: int
) -> None:
    """Write a voice: half weights without ``enc_q``, config, and the other fields."""
    model = random_voice(
        config,
        seed,
        version=spec.version,
        f0=spec.f0,
        vocoder=spec.vocoder,
        speakers=spec.speakers,
    )
    checkpoint = {"weight": half(model.state_dict()), "config": config}
    if spec.applio:
        checkpoint |= {"sr": spec.khz * 1000, "f0": spec.f0, "version": spec.version}
        checkpoint |= applio_fields(name, spec)
    else:
        checkpoint |= {"info": "200epoch", "sr": f"{spec.khz}k", "f0": int(spec.f0)}
        checkpoint["version"] = spec.version
    torch.save(checkpoint, path)


def write_training(path: Path, seed: int) -> None:
    """Write a training checkpoint: float32 with ``enc_q``, and the optimizer's state."""
    model = random_voice(voice_config("v2", 40), seed, with_enc_q=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.8, 0.99), 1e-9)
    checkpoint = {
        "model": dict(model.state_dict()),
        "iteration": 20,
        "optimizer": optimizer.state_dict(),
        "learning_rate": 1e-4,
    }
    torch.save(checkpoint, path)


def write_index(features: np.ndarray, path: Path, seed: int) -> None:
    """Write a faiss index ``IVF{n},Flat`` of ``[n, C]`` float32 features."""
    import faiss

    rows = np.random.default_rng(seed).permutation(len(features))
    vectors = np.ascontiguousarray(features[rows])
    cells = min(int(16 * np.sqrt(len(vectors))), len(vectors) // 39)
    index = faiss.index_factory(vectors.shape[1], f"IVF{cells},Flat")
    faiss.extract_index_ivf(index).nprobe = 1
    index.train(vectors)
    for start in range(0, len(vectors), 8192):
        index.add(vectors[start : start + 8192])
    faiss.write_index(index, str(path))


def index_features(model: ContentVec, seconds: int, seed: int) -> dict[str, np.ndarray]:
    """Give v1 and v2 features ``[n, C]`` float32 of synthetic speech, in 10 s clips."""
    found = {"v1": [], "v2": []}
    with torch.inference_mode():
        for clip in range(seconds // 10):
            audio = synthetic_speech(10.0, seed + clip).audio
            states = model(torch.from_numpy(audio)[None])
            found["v1"].append(model.final_proj(states[V1_LAYER])[0].numpy())
            found["v2"].append(states[-1][0].numpy())
    return {version: np.concatenate(parts) for version, parts in found.items()}


class Maker:
    """Writes named files into one folder; the encoder is made once when needed."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out = out
        self.seed = seed

    def seed_of(self, name: str) -> int:
        """Give the seed of one file, the same whichever others are made."""
        return zlib.crc32(f"{self.seed}/{name}".encode()) % 2**31

    @cached_property
    def contentvec(self) -> ContentVec:
        """The full-size encoder."""
        return random_contentvec(ContentVecConfig(), self.seed_of("contentvec"))

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Features of 60 s for the indexes."""
        return index_features(self.contentvec, 60, self.seed_of("speech"))

    def jobs(self) -> dict[str, Callable[[Path], None]]:
        """Give file or folder name to the function that writes it."""
        jobs: dict[str, Callable[[Path], None]] = {
            "hubert_base.pt": lambda p: write_hubert(self.contentvec, p),
            "contentvec": lambda p: write_contentvec(
                self.contentvec, p, old_names=False
            ),
            "contentvec_weight_g": lambda p: write_contentvec(
                self.contentvec, p, old_names=True
            ),
            "rmvpe.pt": lambda p: write_rmvpe(RMVPEConfig(), p, self.seed_of("rmvpe")),
            "G_2333333.pth": lambda p: write_training(p, self.seed_of("G")),
        }
        for version in ("v1", "v2"):
            jobs[f"{version}.index"] = lambda p, v=version: write_index(
                self.features[v], p, self.seed_of(v)
            )
        for name, spec in VOICES.items():
            jobs[f"{name}.pth"] = lambda p, n=name, s=spec: write_voice(
                n, s, voice_config(s.version, s.khz), p, self.seed_of(n)
            )
        return jobs

    def small_jobs(self) -> dict[str, Callable[[Path], None]]:
        """Give the jobs of the small set."""
        spec = VoiceFile("v1", 32, speakers=4)

        def encoder() -> ContentVec:
            return random_contentvec(SMALL_CONTENTVEC, self.seed_of("small contentvec"))

        def index(path: Path) -> None:
            features = index_features(encoder(), 10, self.seed_of("small speech"))["v1"]
            write_index(features[::4], path, self.seed_of("small index"))

        return {
            "contentvec": lambda p: write_contentvec(
                encoder(), p, old_names=False, small=True
            ),
            "rmvpe.pt": lambda p: write_rmvpe(
                SMALL_RMVPE, p, self.seed_of("small rmvpe"), 90.0
            ),
            "voice.pth": lambda p: write_voice(
                "voice", spec, SMALL_VOICE, p, self.seed_of("small voice")
            ),
            "voice.index": index,
        }


def make_test_models(
    out: str | Path,
    only: list[str] | None = None,
    *,
    small: bool = False,
    seed: int = 0,
) -> dict[str, Path]:
    """Write test models into ``out``.

    Args:
        out: folder, made if missing.
        only: names to write, with or without the suffix; None writes all.
        small: write the small set in place of the full-size one.
        seed: of everything.

    Returns:
        Name to path of what was written.

    Raises:
        ValueError: for a name that is not known.
    """
    maker = Maker(Path(out), seed)
    maker.out.mkdir(parents=True, exist_ok=True)
    jobs = maker.small_jobs() if small else maker.jobs()
    # Indexes last: they need faiss, which is not everywhere.
    every = sorted(jobs, key=lambda name: name.endswith(".index"))
    wanted = every if only is None else only
    by_stem = {
        Path(name).stem if name.endswith(".pth") else name: name for name in jobs
    }
    written = {}
    for name in wanted:
        name = by_stem.get(name, name)
        if name not in jobs:
            raise ValueError(
                f"no test model is named {name!r}; known: {', '.join(jobs)}"
            )
        jobs[name](maker.out / name)
        written[name] = maker.out / name
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="write only these")
    parser.add_argument("--small", action="store_true", help="write the small set")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        written = make_test_models(
            given.out, given.only, small=given.small, seed=given.seed
        )
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written.values():
        files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
        print(f"{sum(f.stat().st_size for f in files):>12,}  {path}")
    print(f"{time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
