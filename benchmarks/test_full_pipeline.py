"""Validation of the whole: baseline RMVPE, our RMVPE, a conversion, its accuracy.

    python benchmarks/test_full_pipeline.py [--engine ...] [--seconds 3]

Full-size random models in float32; also runs under ``pytest benchmarks``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import cache
from pathlib import Path

import common
import numpy as np
import soundfile
from parity import f0_rows, parity_row, require
from stages import convert_ours, convert_torch, x_pad
from torch_side import TorchPipeline
from twins import Sides, choose_sides, converter

from rvc_mlx.options import ConversionOptions
from rvc_mlx.pipeline import VoiceConverter
from rvc_mlx.pitch import estimate_f0
from tools.make_test_models import Maker
from tools.random_weights import Speech, synthetic_speech

BASELINE_CENTS = 25.0  # more than a bin: the network is random but for its last layer
BASELINE_VOICING = 0.9
CORRELATION = 0.99999


def _parser() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, precisions=("f32",))
    parser.add_argument(
        "--seconds", type=common.seconds, default=3.0, help="of the recording"
    )
    return parser


@cache
def _arguments() -> argparse.Namespace:
    words = sys.argv[1:] if __name__ == "__main__" else []
    return _parser().parse_args(words)


@cache
def _sides() -> Sides:
    return choose_sides(_arguments(), keep=False)


@cache
def _ours() -> VoiceConverter:
    return converter(common.models(_arguments().models), _sides())


@cache
def _theirs() -> TorchPipeline:
    return TorchPipeline(common.models(_arguments().models), _sides().torch)


@cache
def _speech() -> Speech:
    """Speech of known F0: what the random network's last layer was fitted to."""
    seed = Maker(common.TEST_MODELS, 0).seed_of("rmvpe")
    whole = synthetic_speech(24.0, seed + 2)
    frames = round(100 * _arguments().seconds)
    return Speech(whole.audio[: 160 * frames], whole.f0[: frames + 1])


def test_baseline_rmvpe() -> None:
    """PyTorch's F0 is near the F0 with which the speech was made."""
    audio, truth = _speech()
    f0 = _theirs().pitch.estimate_f0(audio)
    both = (f0 > 0) & (truth > 0)
    cents = np.median(np.abs(1200 * np.log2(f0[both] / truth[both])))
    agreement = np.mean((f0 > 0) == (truth > 0))
    print(f"baseline: median {cents:.1f} cents from the truth, voicing {agreement:.3f}")
    assert cents < BASELINE_CENTS, f"{cents} cents from the true F0"
    assert agreement > BASELINE_VOICING, f"voicing agrees in {agreement}"


def test_mlx_rmvpe() -> None:
    """Our F0 is PyTorch's within 0.01 cent, voicing the same in every frame."""
    audio = _speech().audio
    net = _ours().pitch_net
    f0 = estimate_f0(net.salience, lambda start, stop: audio[start:stop], len(audio))
    theirs = _theirs().pitch.estimate_f0(audio)
    assert len(f0) == len(audio) // 160 + 1, len(f0)
    assert 0.2 < np.mean(theirs > 0) < 0.95, "both kinds of frames are needed"
    require(f0_rows(f0, theirs))


def test_full_inference() -> None:
    """File to file: exact length, finite, audible, repeatable, silent where silent."""
    audio = common.synthetic_audio(_arguments().seconds)
    silence = np.zeros(common.SAMPLE_RATE, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.wav"), Path(folder, "out.wav")
        soundfile.write(source, np.concatenate([audio, silence]), common.SAMPLE_RATE)
        made = []
        for seed in (0, 0, 1):
            options = ConversionOptions(seed=seed, x_pad=x_pad(_sides()))
            report = _ours().convert_file(source, target, options)
            made.append(soundfile.read(target, dtype="float32")[0])
    rate = _ours().sample_rate
    wanted = round((len(audio) + len(silence)) * rate / common.SAMPLE_RATE)
    assert [len(x) for x in made] == [wanted] * 3, [len(x) for x in made]
    assert report.samples == wanted, report
    assert all(np.isfinite(x).all() for x in made), "samples that are not finite"
    spoken = made[0][: -len(silence) * rate // common.SAMPLE_RATE]
    level = float(np.sqrt(np.mean(spoken**2)))
    assert 0.01 < level < 0.9, f"the rms is {level}"
    np.testing.assert_array_equal(made[0], made[1], "the same seed, other audio")
    assert np.abs(made[0] - made[2]).max() > 1e-4, "another seed, the same audio"
    rest = float(np.abs(made[0][-rate // 4 :]).max())
    assert rest < 0.1 * level, f"silence became {rest}"


def test_accuracy() -> None:
    """The waveform of real audio is PyTorch's."""
    clip = common.real_audio(_arguments().seconds)
    pad = x_pad(_sides())
    ours, theirs = convert_ours(_ours(), clip, pad), convert_torch(_theirs(), clip, pad)
    row = parity_row("conversion", ours, theirs, 1e-3, 1e-4)
    print(f"max {row['max_abs']:.1e}, mean {row['mean_abs']:.1e}, ", end="")
    print(f"correlation {row['correlation']:.9f}")
    require([row])
    assert row["correlation"] >= CORRELATION, row


CHECKS = (test_baseline_rmvpe, test_mlx_rmvpe, test_full_inference, test_accuracy)

if __name__ == "__main__":
    raise SystemExit(common.exit_code(lambda: common.run_checks(CHECKS)))
