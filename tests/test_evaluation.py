"""Judges of conversions against cases whose answer is known."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import clicks
import evaluate_conversion
import evaluation_inputs
import evaluation_report
import judge_pitch
import judge_sound
import judge_speaker
import judge_words
import judges
import make_anchors
from judging import Case, Judge, Missing, NoReadingError, Recording, mean_values

from rvc_mlx.audio_io import save_audio
from rvc_mlx.bundled_models import bundled_index, bundled_voice

RATE = 16000


def needs(name):
    """Skip without the tools of a judge."""
    missing = judges.JUDGES[name].missing_tools()
    reason = f"needs {', '.join(missing)} (extra eval)"
    return pytest.mark.skipif(bool(missing), reason=reason)


def vowel(f0: np.ndarray, rate: int = RATE) -> np.ndarray:
    """A sung vowel of a known pitch ``[n]`` Hz: harmonics under two formants."""
    phase = 2 * np.pi * np.cumsum(f0) / rate
    sound = np.zeros(len(f0))
    for k in range(1, 40):
        hz = k * f0
        level = np.exp(-(((hz - 700) / 300) ** 2)) + np.exp(-(((hz - 1200) / 400) ** 2))
        sound += np.where(hz < 0.45 * rate, level + 0.02, 0) * np.sin(k * phase)
    return (0.2 * sound / np.abs(sound).max()).astype(np.float32)


def sung(semitones: float = 0.0, seconds: float = 2.0) -> np.ndarray:
    """150 Hz with a vibrato of a semitone, moved; half a second of silence around."""
    t = np.arange(round(seconds * RATE)) / RATE
    f0 = 150 * 2 ** ((np.sin(2 * np.pi * 4 * t) + semitones) / 12)
    return np.pad(vowel(f0), RATE // 2)


def flat(f0: list[float], voiced: list[int]) -> judge_pitch.Curve:
    return judge_pitch.Curve(np.array(f0, float), np.array(voiced, bool))


@pytest.fixture
def clip(speech) -> np.ndarray:
    return np.array(speech)


@pytest.fixture
def noise(rng, clip) -> np.ndarray:
    return (0.1 * rng.standard_normal(len(clip))).astype(np.float32)


@pytest.fixture(scope="module")
def heard(speech) -> str:
    """What the recogniser hears in the clip."""
    return judge_words.recognise(np.array(speech))


# Pitch


@needs("f0")
def test_what_is_too_faint_to_hear_has_no_pitch():
    sound = sung()
    faint = np.concatenate([sound, 1e-3 * sound])
    first, second = np.split(judge_pitch.track(faint).voiced, [len(sound) // 256])
    assert first.mean() > 0.5
    assert not second.any()


@needs("f0")
@pytest.mark.parametrize("semitones", [-7.0, 0.0, 0.4, 12.0])
def test_a_known_shift_is_measured(semitones):
    before, after = (judge_pitch.track(sung(shift)) for shift in (0.0, semitones))
    assert before.median == pytest.approx(150, rel=0.01)
    found = judge_pitch.compare_curves(before, after, semitones)
    assert found["rpa"] >= 97
    assert found["median_cents"] <= 12
    assert found["octave_errors"] <= 1
    assert found["voicing_error"] <= 4


@needs("f0")
def test_a_wrong_pitch_is_measured():
    before, higher, octave = (judge_pitch.track(sung(s)) for s in (0.0, 1.0, 12.0))
    found = judge_pitch.compare_curves(before, higher, 0)
    assert found["rpa"] <= 3
    assert found["bias_cents"] == pytest.approx(100, abs=10)
    found = judge_pitch.compare_curves(before, octave, 0)
    assert found["octave_errors"] >= 95


def test_pitch_figures_of_hand_made_curves():
    source = flat([100, 100, 100, 100, 100], [1, 1, 1, 1, 0])
    # Right, 60 cents high, an octave high and unvoiced, right but unvoiced, added.
    output = flat([200, 200 * 2 ** (60 / 1200), 400, 200, 50], [1, 1, 0, 0, 1])
    found = judge_pitch.compare_curves(source, output, 12)
    assert found["rpa"] == pytest.approx(50)
    assert found["rpa_both_voiced"] == pytest.approx(50)
    assert found["octave_errors"] == pytest.approx(25)
    assert found["median_cents"] == pytest.approx(30)
    assert found["bias_cents"] == pytest.approx(30)
    assert found["voicing_error"] == pytest.approx(60)
    assert found["voicing_lost"] == pytest.approx(50)
    assert found["voicing_added"] == pytest.approx(100)


def test_an_output_without_voice_has_no_cents():
    source, output = flat([100, 100], [1, 1]), flat([900, 30], [0, 0])
    found = judge_pitch.compare_curves(source, output, 0)
    assert found["median_cents"] is None
    assert (found["rpa"], found["voicing_lost"]) == (0, 100)


def test_pitch_needs_recordings_of_one_length():
    with pytest.raises(ValueError, match=r"last 0\.32 and 0\.16 s"):
        judge_pitch.compare_curves(
            flat([100] * 20, [1] * 20), flat([100] * 10, [1] * 10), 0
        )


def test_a_source_without_voice_is_noted():
    silent, spoken = flat([100], [0]), flat([100], [1])
    verdict = judge_pitch.PITCH.verdict(Case(silent, spoken))
    assert set(verdict) == {"note"}


def test_the_shift_between_medians():
    source = flat([90, 100, 110, 500], [1, 1, 1, 0])
    targets = [flat([200], [1]), flat([200, 190, 777], [1, 1, 0])]
    assert judge_pitch.semitones_to(source, targets) == 12.0
    with pytest.raises(NoReadingError):
        judge_pitch.semitones_to(source, [flat([200], [0])])


# Speaker


@needs("speaker")
def test_a_speaker_is_nearer_to_himself_than_to_another(clip):
    half = len(clip) // 2
    first, second = (judge_speaker.embed(part) for part in (clip[:half], clip[half:]))
    # Played faster: shorter vocal tract, higher voice.
    places = np.arange(0, len(clip) - 1, 1.4)
    warped = np.interp(places, np.arange(len(clip)), clip).astype(np.float32)
    other = judge_speaker.embed(warped)
    assert judge_speaker.embed(clip) @ judge_speaker.embed(clip) == pytest.approx(1)
    assert first @ second > 0.75
    assert max(first @ other, second @ other) < first @ second


@needs("speaker")
@pytest.mark.parametrize("level", [0.0, 1e-5])
def test_silence_has_no_speaker(level, rng):
    with pytest.raises(NoReadingError, match="too little"):
        judge_speaker.embed((level * rng.standard_normal(2 * RATE)).astype(np.float32))


def test_similarity_to_target_and_source():
    source, output = np.array([1.0, 0, 0]), np.array([0.6, 0.8, 0])
    references = [np.array([0, 1.0, 0]), Missing("silent"), np.array([0, 1.0, 0])]
    found = judge_speaker.SPEAKER.verdict(Case(source, output, references))
    assert found["similarity_source"] == pytest.approx(0.6)
    assert found["similarity_target"] == pytest.approx(0.8)
    assert found["source_to_target"] == pytest.approx(0)
    assert found["nearer_target"] is True
    alone = judge_speaker.SPEAKER.verdict(Case(source, output, []))
    assert "similarity_target" not in alone
    assert "--references" in alone["note"]


def test_an_output_without_speech_is_not_near_the_target():
    case = Case(np.ones(3), Missing("no speech"), [np.ones(3)])
    verdict = judge_speaker.SPEAKER.verdict(case)
    assert verdict["nearer_target"] is False
    assert verdict["similarity_target"] == 0
    assert verdict["note"] == "output: no speech"


# Words and phones


@needs("words")
def test_a_copy_costs_no_words_and_noise_all(clip, noise, heard):
    assert len(heard.split()) >= 5
    in_noise = judge_words.recognise(noise[:RATE])
    assert judge_words.recognise(clip) == heard  # what came before does not matter
    copy = judge_words.WORDS.verdict(Case(heard, heard, text="something else entirely"))
    assert copy["word_gap"] == copy["character_gap"] == copy["word_drift"] == 0
    assert copy["word_error_source"] > 50
    lost = judge_words.WORDS.verdict(Case(heard, in_noise, text=heard))
    assert lost["word_error_source"] == 0
    assert lost["word_error_output"] >= 80
    assert lost["character_gap"] >= 50


@needs("words")
def test_word_errors_are_counted_and_pooled():
    rows = [
        judge_words.WORDS.compare(Case("a b c d", "a x d", text="a b c d")),
        judge_words.WORDS.compare(Case("one", "one", text="one")),
        judge_words.WORDS.compare(Case("no text", "no text")),
    ]
    assert rows[0]["word_error_output"] == 50  # a substitution and a deletion
    assert rows[0]["word_gap"] == rows[0]["word_drift"] == 50
    assert "note" in rows[2]
    assert "word_gap" not in rows[2]
    pooled = judge_words.WORDS.summarize(rows)
    assert pooled["word_error_output"] == pytest.approx(40)  # 2 of 5, not a mean of 25
    assert pooled["words"] == 5


def test_text_is_compared_without_case_and_signs():
    assert judge_words.plain_text("Don\u2019t -- STOP, now!") == "don't stop now"


@needs("phones")
def test_phones_of_a_copy_agree_and_those_of_noise_do_not(clip, noise):
    before, after = (judge_words.hear_phones(x) for x in (clip, noise))
    copy = judge_words.Phones(before, None, "")
    bad = judge_words.Phones(after, None, "")
    assert len(before) == len(clip) // 160
    assert judge_words.PHONES.verdict(Case(copy, copy))["agreement"] == 100
    assert judge_words.PHONES.verdict(Case(copy, bad))["agreement"] < 20


@needs("phones")
def test_what_was_heard_before_does_not_matter(clip, noise):
    part = clip[: 2 * RATE]
    before = judge_words.hear_phones(part)
    for other in (clip[2 * RATE :] * 0.2, part + 0.1 * noise[: len(part)]):
        judge_words.hear_phones(other)
        assert judge_words.hear_phones(part) == before


@needs("phones")
def test_known_words_are_aligned(clip, heard):
    aligned = judge_words.align_phones(clip, heard)
    assert len(aligned) == len(clip) // 160
    phones = judge_words.hear_phones(clip)
    side = judge_words.Phones(phones, aligned, "")
    found = judge_words.PHONES.verdict(Case(side, side))
    assert found["accuracy_source"] > 35  # chance is below 10
    assert found["accuracy_lost"] == 0
    assert 0 < found["error_source"] < 70
    with pytest.raises(NoReadingError, match="zzyzxq"):
        judge_words.align_phones(clip, "hello zzyzxq")


def test_phone_labels():
    found = [("SIL", 0, 2), ("AH", 2, 2), ("+SPN+", 4, 1), ("T", 5, 9), ("B", 20, 3)]
    labels = judge_words._labels(found, 7)
    assert labels == ["SIL", "SIL", "AH", "AH", "SIL", "T", "T"]
    assert judge_words.sequence(labels) == "AH T"
    heard = ["T", "SIL", "AH", "B", "AH", "T", "SIL"]
    assert judge_words.frame_accuracy(labels, heard) == 50
    with pytest.raises(NoReadingError):
        judge_words.frame_accuracy(["SIL"], ["T"])


# Sound


@pytest.mark.parametrize("rate", [16000, 32000, 48000])
@pytest.mark.parametrize("kind", ["impulse", "jump"])
def test_an_inserted_click_is_found(rate, kind):
    t = np.arange(2 * rate) / rate
    sound = vowel(140 * 2 ** (np.sin(2 * np.pi * 3 * t) / 12), rate).astype(float)
    sound += 1e-3 * np.random.default_rng(0).standard_normal(len(sound))
    assert len(clicks.find_clicks(sound, rate)) == 0
    at = round(1.1 * rate)
    if kind == "impulse":
        sound[at] += 0.1
    else:
        sound[at:] += 0.1 * np.exp(-np.arange(len(sound) - at) / (0.01 * rate))
    assert clicks.find_clicks(sound, rate) == pytest.approx([1.1], abs=0.001)


def test_clicks_in_real_speech(clip):
    assert len(clicks.find_clicks(clip, RATE)) == 0
    places = [round(second * RATE) for second in (1.0, 2.0, 3.0)]
    clip[places] += 0.5
    assert clicks.find_clicks(clip, RATE) == pytest.approx([1, 2, 3], abs=0.001)


def test_a_lost_stretch_clicks():
    sound = sung()
    peak = RATE + int(np.argmax(sound[RATE : RATE + 200]))
    sound[peak : peak + 160] = 0
    assert np.abs(clicks.find_clicks(sound, RATE) - peak / RATE).min() < 0.012


def test_bursts_tones_and_silence_do_not_click(rng):
    burst = np.zeros(RATE)
    burst[8000:8400] = 0.2 * rng.standard_normal(400)
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE)
    hiss = 0.1 * rng.standard_normal(5 * RATE)
    for sound in (burst, tone, hiss, np.zeros(RATE), np.zeros(10)):
        assert len(clicks.find_clicks(sound, RATE)) == 0


def test_only_clicks_that_the_source_lacks_are_new():
    case = Case(np.array([1.0, 2.0]), np.array([1.01, 3.0]))
    found = judge_sound.CLICKS.verdict(case)
    assert (found["clicks_source"], found["clicks_output"]) == (2, 2)
    assert (found["new_clicks"], found["new_at"]) == (1, [3.0])
    found = judge_sound.CLICKS.verdict(Case(np.empty(0), np.array([0.5])))
    assert found["new_clicks"] == 1
    assert found["clicks_at_joins"] == 1  # where the joins are not known
    assert judge_sound.CLICKS.summarize([found, found])["new_clicks"] == 2


def test_clicks_at_joins_are_told_from_others():
    case = Case(np.array([1.0]), np.array([1.0, 2.004, 3.1]), joins=(1.0, 2.0, 3.0))
    found = judge_sound.CLICKS.verdict(case)
    assert (found["joins"], found["new_clicks"], found["clicks_at_joins"]) == (3, 2, 1)
    found = judge_sound.CLICKS.verdict(Case(np.empty(0), np.array([2.0]), joins=()))
    assert (found["new_clicks"], found["clicks_at_joins"]) == (1, 0)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_loudness_of_the_calibration_tone(rate):
    tone = np.sin(2 * np.pi * 997 * np.arange(5 * rate) / rate)
    full = judge_sound.integrated_loudness(tone, rate)
    assert full == pytest.approx(-3.01, abs=0.05)  # ITU-R BS.1770, one channel
    padded = np.pad(tone / 2, 3 * rate)  # pauses do not count
    quiet = judge_sound.integrated_loudness(padded, rate)
    assert quiet == pytest.approx(full - 6.02, abs=0.3)


def test_silence_has_no_loudness():
    with pytest.raises(NoReadingError, match="silence"):
        judge_sound.integrated_loudness(np.zeros(RATE), RATE)


@needs("dnsmos")
def test_noise_costs_quality(clip, noise, tmp_path):
    heard = []
    for name, sound in (("clean", clip), ("noisy", clip + noise)):
        save_audio(tmp_path / f"{name}.wav", sound, RATE, "FLOAT")
        heard.append(judges.observe("dnsmos", Recording(tmp_path / f"{name}.wav")))
    assert judge_sound.DNSMOS.verdict(Case(heard[0], heard[0]))["overall_lost"] == 0
    found = judge_sound.DNSMOS.verdict(Case(*heard))
    assert 1 <= found["overall_output"] < found["overall_source"] - 0.5 <= 4.5


# All together


def test_means_leave_out_what_is_missing():
    rows = [{"a": 1.0, "b": True}, {"a": None, "b": False}, {"a": 4.0, "note": "x"}]
    assert mean_values(rows) == {"a": 2.5, "b": 50.0}


def test_a_missing_tool_is_named_with_its_extra(monkeypatch):
    lacking = Judge("f0", len, len, {"no_such_module": "no-such-package"})
    monkeypatch.setitem(judges.JUDGES, "f0", lacking)
    with pytest.raises(ValueError, match=r"f0 need no-such-package.*rvc-mlx\[eval\]"):
        judges.chosen_judges("loudness,f0")
    assert [judge.name for judge in judges.chosen_judges("loudness")] == ["loudness"]


def test_a_missing_tool_ends_the_program_in_one_line(monkeypatch, capsys):
    lacking = Judge("f0", len, len, {"no_such_module": "no-such-package"})
    monkeypatch.setitem(judges.JUDGES, "f0", lacking)
    with pytest.raises(SystemExit) as stop:
        evaluate_conversion.main(["clip.wav", "--converted", "x"])
    assert stop.value.code == 2
    assert "no-such-package" in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_judge_is_refused():
    with pytest.raises(ValueError, match="no judge tempo; there are words"):
        judges.chosen_judges("f0 tempo")


def test_transcripts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one.wav|Hello, you!\n\ntwo\tI'm here\n")
    assert evaluation_inputs.read_transcripts(path) == {
        "one.wav": "hello you",
        "two": "i'm here",
    }
    path.write_text("one hello\n")
    with pytest.raises(ValueError, match="line 1: expected 'name"):
        evaluation_inputs.read_transcripts(path)
    path.write_text("one|a\none|b\n")
    with pytest.raises(ValueError, match="second time"):
        evaluation_inputs.read_transcripts(path)


def test_a_limit_spreads_over_all_clips(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.wav").touch()
    found = evaluation_inputs.collect_sources([tmp_path], None, 4)
    assert [recording.path.stem for recording in found] == ["0", "2", "5", "7"]
    assert len(evaluation_inputs.sound_files(tmp_path)) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["--voices", "a.pth", "b.pth", "--pitch", "1", "2", "3"], "3 values for 2"),
        (["--voices", "a.pth", "--pitch", "auto"], "auto needs recordings"),
        (["--voices", "a.pth", "--pitch", "high"], "expected semitones"),
        (["--voices", "a/x.pth", "b/x.pth"], "its own name"),
    ],
)
def test_targets_that_do_not_fit(words, message):
    arguments = evaluate_conversion.build_parser().parse_args(["clip.wav", *words])
    with pytest.raises(ValueError, match=message):
        evaluation_inputs.collect_targets(arguments)


def test_bundled_voices_go_by_name_and_what_is_missing_is_told_at_once(tmp_path):
    def targets(*words):
        arguments = evaluate_conversion.build_parser().parse_args(["a.wav", *words])
        return evaluation_inputs.collect_targets(arguments)

    first, second = targets("--voices", "slt", "rms", "--index", "slt", "none")
    assert (first.name, first.voice) == ("slt", bundled_voice("slt"))
    assert (first.index, second.index) == (bundled_index("slt"), None)
    with pytest.raises(FileNotFoundError, match="bob: there is no such file"):
        targets("--voices", "slt", "bob")
    absent = tmp_path / "x.index"
    with pytest.raises(FileNotFoundError, match="no such index"):
        targets("--voices", "slt", "--index", str(absent))


def test_options_of_the_conversion():
    given = ["index_rate=0", "f0_autotune=true"]
    assert evaluation_inputs.parse_options(given) == {
        "index_rate": 0.0,
        "f0_autotune": True,
    }
    for wrong in ("pitch=3", "nonsense=1", "index_rate=7", "f0_autotune=2"):
        with pytest.raises(ValueError, match=r"option|index_rate"):
            evaluation_inputs.parse_options([wrong])


@pytest.mark.parametrize("workers", [1, 2])
def test_conversions_made_before_are_judged(
    workers, small_models, clip, tmp_path, capsys
):
    made = tmp_path / "copy"
    made.mkdir()
    shutil.copy(small_models.speech, made / "speech.flac")
    broken = tmp_path / "broken"
    broken.mkdir()
    clip[32000] += 0.5
    save_audio(broken / "speech.wav", clip, RATE, "FLOAT")
    words = [str(small_models.speech), "--converted", str(made), str(broken), "--check"]
    words += ["--judges", "loudness,clicks", "--workers", str(workers)]
    words += ["--output", str(tmp_path / "out"), "--label", "trial"]
    assert evaluate_conversion.main(words) == 1  # a goal is missed
    assert "MISSED: broken: clicks added at joins is 1" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "trial.json").read_text())
    first, second = facts["voices"]
    assert first["summary"]["clicks"]["new_clicks"] == 0
    assert first["clips"][0]["judged"]["loudness"]["loudness_gap"] == 0
    assert second["clips"][0]["judged"]["clicks"]["new_at"] == [2.0]
    assert len(facts["sources"][0]["sha256"]) == 64
    assert facts["environment"]["versions"]["mlx"]
    report = (tmp_path / "out" / "trial.md").read_text()
    assert re.search(r"broken +\| clicks added at joins.*\| 1 of 1 +\| missed", report)
    picture = (tmp_path / "out" / "trial.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20000


def test_a_voice_is_converted_and_judged(small_models, tmp_path, capsys):
    words = [
        str(small_models.speech),
        "--voices",
        str(small_models.voice),
        "--pitch",
        "3",
    ]
    words += [
        "--index",
        str(small_models.index),
        "--encoder",
        str(small_models.encoder),
    ]
    words += ["--rmvpe", str(small_models.rmvpe), "--device", "cpu", "--pictured", "0"]
    words += ["--judges", "loudness", "--audio", str(tmp_path / "made")]
    words += ["--output", str(tmp_path), "--option", "index_rate=0.5"]
    words += ["--option", "seed=4", "--seeds", "2"]
    assert evaluate_conversion.main(words) == 0
    facts = json.loads((tmp_path / "conversion.json").read_text())
    [voice] = facts["voices"]
    assert [clip["seed"] for clip in voice["clips"]] == [4, 5]
    judged = [clip["judged"]["loudness"]["loudness_gap"] for clip in voice["clips"]]
    assert judged[0] != judged[1]
    assert voice["summary"]["loudness"]["loudness_gap"] == pytest.approx(
        np.mean(judged)
    )
    assert "1 clips, converted with 2 seeds" in (tmp_path / "conversion.md").read_text()
    assert voice["files"]["voice"]["file"] == small_models.voice.name
    assert voice["clips"][0]["semitones"] == 3
    assert voice["clips"][0]["conversion_s"] > 0
    assert facts["options"] == {"index_rate": 0.5, "seed": 4}
    assert facts["seeds"] == 2
    [name, clip] = small_models.voice.stem, f"{small_models.speech.stem}.wav"
    folders = tmp_path / "made" / name, tmp_path / "made" / name / "seed-5"
    assert all((folder / clip).is_file() for folder in folders)
    assert not list(tmp_path.glob("*.png"))


def test_a_source_without_conversion_is_an_error(small_models, tmp_path, capsys):
    words = [
        str(small_models.speech),
        "--converted",
        str(tmp_path),
        "--judges",
        "clicks",
    ]
    assert evaluate_conversion.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no sound file speech.*" in error


def test_goals():
    shown = evaluation_report.Shown("f0", "rpa", "RPA", ">=", 95)
    assert shown.verdict(95.0) == "met"
    assert shown.verdict(94.9) == "missed"
    assert shown.verdict(None) == "not measured"
    assert evaluation_report.Shown("f0", "rpa", "RPA").verdict(90.0) == ""
    clips = [{"judged": {"f0": row}} for row in ({"rpa": 90.0}, {"note": "silence"})]
    voices = [{"name": "v", "summary": {"f0": {"rpa": 90.0}}, "clips": clips}]
    assert evaluation_report.missed_goals(voices) == [
        "v: F0 within 50 cents, % is 90, the goal is >= 95"
    ]
    assert "90 missed" in evaluation_report.summary_table(voices)
    [line] = evaluation_report.goals_table(voices).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    label = "F0 within 50 cents, %"
    assert cells == ["v", label, ">= 95", "90", "1 of 2", "missed"]


def test_a_goal_without_a_figure_is_missed():
    voices = [{"name": "v", "summary": {"words": {"word_drift": 3.0}}, "clips": []}]
    assert evaluation_report.missed_goals(voices) == [
        "v: character error added, points is -, the goal is <= 12"
    ]


def test_a_buzz_is_on_its_f0_and_as_loud_as_the_clip(clip):
    f0 = np.where(np.arange(len(clip) // 160 + 1) % 40 < 20, 120.0, 0.0)
    made = make_anchors.buzz(clip, f0, 160, 0)
    assert (made.dtype, made.shape) == (np.float32, clip.shape)
    levels = [make_anchors._loudness(x) for x in (made, clip)]
    assert np.corrcoef(levels)[0, 1] > 0.9

    def periodic(start):  # by a period of 120 Hz
        part = (made / levels[0])[start : start + 2400]
        return np.corrcoef(part[:-133], part[133:])[0, 1]

    voiced = range(400, len(clip) - 6400, 6400)
    assert np.median([periodic(start) for start in voiced]) > 0.9
    assert abs(np.median([periodic(start + 3200) for start in voiced])) < 0.2
    alone = make_anchors.buzz(clip, np.zeros(5), 160, 0)  # nothing is voiced
    assert np.isfinite(alone).all()


def test_melodies_are_of_the_network_and_of_the_judge(
    clip, small_models, tmp_path, monkeypatch
):
    heard = flat([150.0] * (len(clip) // 256), [1] * (len(clip) // 256))
    monkeypatch.setattr(judge_pitch, "track", lambda samples: heard)
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "one.wav", clip, 16000)
    words = [tmp_path / "clips", tmp_path / "out", "--melody", small_models.rmvpe]
    make_anchors.main([*map(str, words)])
    made = sorted((tmp_path / "out").glob("*/*.wav"))
    names = ["1 F0 of the network", "2 F0 of the judge"]
    assert [path.parent.name for path in made] == names
    samples, rate = soundfile.read(made[1], dtype="float32")
    assert (len(samples), rate) == (len(clip), 16000)
    part = (samples / make_anchors._loudness(samples))[4000:8000]
    assert np.corrcoef(part[:-320], part[320:])[0, 1] > 0.9  # three periods


def test_anchors_have_the_noise_they_are_named_after(clip):
    made = make_anchors.damaged(clip, seed=3)
    assert np.array_equal(made["0 source itself"], clip)
    for number, snr in ((1, 20), (2, 10), (3, 0)):
        noisy = made[f"{number} noise {snr} dB"].astype(np.float64)
        scale = (noisy @ clip) / (clip @ clip)
        noise = noisy / scale - clip
        ratio = np.square(clip).mean() / np.square(noise).mean()
        assert 10 * np.log10(ratio) == pytest.approx(snr, abs=0.3)
        assert np.abs(noisy).max() <= 0.9901
    assert abs(np.corrcoef(made["4 noise alone"], clip)[0, 1]) < 0.05
