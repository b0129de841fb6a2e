"""Debian's free speech engines: text in, samples and exactly timed phones out.

Source: manuals of flite, festival and hts_engine. espeak-ng has its own file, `espeak`.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from recipes.phones import arpabet_class
from rvc_mlx.audio import SAMPLE_RATE

SLT_VOICE = Path(
    "/usr/share/festival/voices/us/cmu_us_slt_arctic_hts/hts/cmu_us_slt_arctic_hts.htsvoice"
)
HTS_FRAME = 0.005  # seconds per value of hts_engine's log F0
_TIMEOUT = 1800  # seconds

Run = tuple[int, float]  # class and end in seconds of a phone


@dataclass(frozen=True)
class Utterance:
    """What an engine said.

    Attributes:
        samples: ``[n]`` float32 in -1..1.
        rate: Hz.
        runs: class and end of each phone.
        f0: Hz every 5 ms with 0 where unvoiced, or None when the engine does not tell.
    """

    samples: np.ndarray
    rate: int
    runs: list[Run]
    f0: np.ndarray | None = None

    def at_16k(self) -> np.ndarray:
        """Samples at 16 kHz."""
        return soxr.resample(self.samples, self.rate, SAMPLE_RATE)


def run_engine(command: Sequence[str | Path]) -> str:
    """Output of a program.

    Raises:
        FileNotFoundError: it is not installed.
        RuntimeError: it failed.
    """
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, timeout=_TIMEOUT
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{command[0]}: not installed; recipes/README.md lists the packages"
        ) from error
    if done.returncode:
        tail = done.stderr.decode("utf-8", "replace")[-300:]
        raise RuntimeError(f"{command[0]} exited with {done.returncode}: {tail}")
    return done.stdout.decode("utf-8", "replace")


def flite(
    text: str,
    voice: str,
    stretch: float = 1.0,
    f0: float = 0.0,
    words: Mapping[str, Sequence[str]] | None = None,
) -> Utterance:
    """Speak with Flite.

    Args:
        text: what.
        voice: ``"awb"``, ``"rms"``, ``"slt"`` or ``"kal16"``.
        stretch: duration.
        f0: mean F0 in Hz, 0 for the voice's own (``rms`` ignores it).
        words: phones of words that its dictionary has not, or has otherwise; 0 or 1
            behind each vowel says whether it is stressed.
    """
    settings = ["--setf", f"duration_stretch={stretch:.3f}"]
    if f0:
        settings += ["--setf", f"int_f0_target_mean={f0:.1f}"]
    with tempfile.TemporaryDirectory() as folder:
        wav, added = Path(folder) / "a.wav", Path(folder) / "words"
        if words:
            lines = [f"{word} : {' '.join(phones)}\n" for word, phones in words.items()]
            added.write_text("".join(lines), "utf-8")
            settings += ["-add_lex", str(added)]
        told = run_engine(
            ["flite", "-voice", voice, *settings, "-psdur", "-t", text, "-o", wav]
        )
        samples, rate = sf.read(wav, dtype="float32")
    pairs = [item.rsplit(":", 1) for item in told.split()]
    return Utterance(samples, rate, [(arpabet_class(p), float(t)) for p, t in pairs])


def festival(
    sentences: Sequence[str],
    voice: str,
    setup: str = "",
    phone_class: Callable[[str], int] = arpabet_class,
    encoding: str = "utf-8",
) -> list[Utterance]:
    """Speak sentences with one Festival process.

    Args:
        sentences: what.
        voice: the name behind ``voice_``.
        setup: Scheme run after the voice is chosen.
        phone_class: class of a phone's name.
        encoding: of the voice.

    Returns:
        One utterance per sentence; sentences that the voice fails on are left out.
    """
    texts = [s.replace("\\", "").replace('"', "") for s in sentences]
    inputs = [f'(utt.synth (Utterance Text "{text}"))' for text in texts]
    return _festival(inputs, voice, setup, phone_class, encoding)


def festival_segments(
    phrases: Sequence[Sequence[tuple[str, float, float]]], voice: str
) -> list[np.ndarray]:
    """Speak given phones with one Festival process.

    Args:
        phrases: per utterance the voice's own phones, seconds and F0 in Hz.
        voice: the name behind ``voice_``.

    Returns:
        Samples at 16 kHz per phrase, empty where the voice failed.
    """
    inputs = []
    for phrase in phrases:
        listed = " ".join(
            f"({name} {length:.4f} ({length / 2:.4f} {f0:.0f}))"
            for name, length, f0 in phrase
        )
        inputs.append(f"(utt.synth (Utterance Segments ({listed})))")
    with tempfile.TemporaryDirectory() as folder:
        run_scheme(Path(folder), inputs, voice, "", "utf-8")
        found = []
        for i in range(len(inputs)):
            wav = Path(folder) / f"{i:05d}.wav"
            if wav.is_file() and wav.stat().st_size > 1000:
                samples, rate = sf.read(wav, dtype="float32")
                found.append(soxr.resample(samples, rate, SAMPLE_RATE))
            else:
                found.append(np.zeros(0, np.float32))
    return found


def run_scheme(
    folder: Path, inputs: Sequence[str], voice: str, setup: str, encoding: str
) -> None:
    """Have one Festival process write ``00000.wav`` and ``00000.lab`` and on.

    Args:
        folder: for the files.
        inputs: Scheme expressions, each giving a synthesised utterance.
        voice: the name behind ``voice_``.
        setup: Scheme run after the voice is chosen.
        encoding: of the voice.
    """
    lines = [f"(voice_{voice})", setup]
    for i, utterance in enumerate(inputs):
        stem = folder / f"{i:05d}"
        # One failing sentence must not end the process.
        lines.append(
            f"(unwind-protect (begin (set! u {utterance})"
            f' (utt.save.wave u "{stem}.wav" \'riff) (utt.save.segs u "{stem}.lab")))'
        )
    script = folder / "run.scm"
    script.write_bytes("\n".join(lines).encode(encoding, "ignore"))
    run_engine(["festival", "--batch", script])


def _festival(
    inputs: Sequence[str],
    voice: str,
    setup: str,
    phone_class: Callable[[str], int],
    encoding: str,
) -> list[Utterance]:
    said = []
    with tempfile.TemporaryDirectory() as name:
        run_scheme(Path(name), inputs, voice, setup, encoding)
        for wav in sorted(Path(name).glob("*.wav")):
            runs = read_segments(wav.with_suffix(".lab"), phone_class)
            if runs:
                samples, rate = sf.read(wav, dtype="float32")
                said.append(Utterance(samples, rate, runs))
    return said


def read_segments(path: Path, phone_class: Callable[[str], int]) -> list[Run]:
    """Classes and ends of a label file of Festival (``utt.save.segs``)."""
    rows = (line.split() for line in path.read_text("latin-1").splitlines())
    return [
        (phone_class(row[2]), float(row[0]))
        for row in rows
        if len(row) == 3 and not row[0].startswith("#")
    ]


def slt_labels(
    sentences: Sequence[str], words: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Full-context labels of the HTS voice slt, for ``hts_engine``; no audio is made.

    Args:
        sentences: what is said.
        words: as for `flite`.
    """
    setup = (
        "(defSynthType LABELS (begin (hts_dump_feats utt hts_feats_list label_file) utt))"
        "(Parameter.set 'Synth_Method 'LABELS)"
    )
    labels = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = ["(voice_cmu_us_slt_arctic_hts)", setup]
        for word, phones in (words or {}).items():
            syllables = f"(lex.syllabify.phstress '({' '.join(phones)}))"
            lines.append(f'(lex.add.entry (list "{word}" nil {syllables}))')
        for i, sentence in enumerate(sentences):
            text = sentence.replace("\\", "").replace('"', "")
            lines.append(f'(set! label_file "{folder}/{i:05d}.lab")')
            lines.append(f'(utt.synth (Utterance Text "{text}"))')
        script = folder / "run.scm"
        script.write_text("\n".join(lines), "utf-8")
        run_engine(["festival", "--batch", script])
        for path in sorted(folder.glob("*.lab")):
            labels.append(path.read_text("utf-8"))
    return labels


def hts_engine(
    label: str,
    *,
    rate: float = 1.0,
    semitones: float = 0.0,
    all_pass: float = 0.0,
) -> Utterance:
    """Speak a full-context label with the HTS voice slt, with its exact F0.

    Args:
        label: one of ``slt_labels``.
        rate: speed of speech.
        semitones: transposition.
        all_pass: warping of frequency, 0 for the voice's own (.45); .50 to .58 sound
            like other vocal tracts.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.lab").write_text(label, "utf-8")
        options = ["-r", f"{rate:.3f}", "-fm", f"{semitones:.2f}"]
        if all_pass:
            options += ["-a", f"{all_pass:.3f}"]
        outputs = ["-od", folder / "d", "-of", folder / "f", "-ow", folder / "w.wav"]
        run_engine(
            ["hts_engine", "-m", SLT_VOICE, *options, *outputs, folder / "in.lab"]
        )
        samples, sample_rate = sf.read(folder / "w.wav", dtype="float32")
        log_f0 = np.fromfile(folder / "f", np.float32)
        runs = _hts_runs((folder / "d").read_text("utf-8"))
    f0 = np.where(log_f0 > 0, np.exp(np.maximum(log_f0, 0)), 0)
    return Utterance(samples, sample_rate, runs, f0.astype(np.float32))


def _hts_runs(text: str) -> list[Run]:
    """Phones of an alignment, one per line: ``start end p1^p2-phone+...``, 100 ns."""
    rows = (line.split() for line in text.splitlines())
    return [
        (arpabet_class(row[2].split("-", 1)[1].split("+", 1)[0]), int(row[1]) * 1e-7)
        for row in rows
    ]
