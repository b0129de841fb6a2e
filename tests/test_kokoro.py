"""The recipes' neural engine: its symbols, their classes, and what it says."""

# ruff: noqa: RUF001 - letters of the phonetic alphabet

import numpy as np
import pytest

from recipes import kokoro, make_content_corpus, phones, speakers, text


def names(classes):
    return ["?" if c == phones.UNKNOWN else phones.PHONES[c] for c in classes]


@pytest.mark.parametrize(
    ("ipa", "accent", "wanted"),
    [
        ("ðə bˈoʊt", "en-us", "ðə bˈOt"),
        ("bˈəʊt", "en-gb", "bˈQt"),
        ("tʃˈɜːtʃ dʒˈʌdʒ", "en-us", "ʧˈɜɹʧ ʤˈʌʤ"),
        ("hˈɑːɹbɚ lˈɪɾəl", "en-us", "hˈɑɹbəɹ lˈɪTᵊl"),
        ("hˈɑːbə", "en-gb", "hˈɑːbə"),
        ("pˈɔːrto", "it", "pˈɔːrto"),
    ],
)
def test_symbols_are_those_of_the_network(ipa, accent, wanted):
    assert kokoro.symbols(ipa, accent) == wanted


def test_every_symbol_has_the_class_of_its_sound():
    found = names(kokoro.symbol_classes("hˈɑɹbəɹ, ʧˈɜɹʧ lˈɪTᵊl."))
    assert found == [
        *("hh", "?", "aa", "r", "b", "er", "er", "sil", "?", "ch", "?", "er", "er"),
        *("ch", "?", "l", "?", "ih", "t", "ah", "l", "sil"),
    ]
    assert names(kokoro.symbol_classes("ɑːb")) == ["aa", "aa", "b"]
    assert names(kokoro.symbol_classes("aʁ", english=False)) == ["aa", "?"]


def test_runs_are_early_by_the_lead_and_never_before_the_start():
    runs = kokoro._runs([0, 3, 5], np.array([1, 4, 8]))
    ends = [end for _, end in runs]
    assert ends == pytest.approx([0, 0.125 - 0.065, 0.325 - 0.065])


def test_silence_at_the_ends_is_cut_with_its_frames():
    samples, frames = kokoro._trimmed(np.arange(20 * 600), np.array([10, 3, 7]))
    assert frames.tolist() == [6, 3, 6]
    assert (len(samples), samples[0]) == (15 * 600, 4 * 600)


def test_missing_voices_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"set KOKORO_VOICES .*kokoro-js"):
        kokoro.voice_names(tmp_path)


def test_held_out_voices_are_not_trained_on():
    assert "af_heart" in kokoro.HELD_OUT  # the judge's clips are by its pupil
    assert {s.voice for s in speakers.TRAINING}.isdisjoint(kokoro.HELD_OUT)


def test_the_engine_speaks(monkeypatch):
    try:
        kokoro.voice_names(kokoro.voice_folder())
        kokoro.kokoro()
        kokoro.clauses("yes", "en-us")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(text, "dictionary_words", lambda: ("table", "market", "window"))
    spoken = make_content_corpus.speak(
        speakers.SPEAKERS["am_adam"], np.random.default_rng(0)
    )
    clip = next(spoken)
    assert len(clip.samples) > 16000
    assert abs(clip.ends[-1] - len(clip.samples)) < 0.15 * 16000


def test_symbols_become_words_of_phones():
    words = kokoro.words_of("hˈWʧən skˈIndləɹ, ðə fˈɜːst.")
    assert words == [
        ["hh", "aw1", "ch", "ah0", "n"],
        ["s", "k", "ay1", "n", "d", "l", "er0"],
        ["sil"],
        ["dh", "ah0"],
        ["f", "er1", "s", "t"],
        ["sil"],
    ]
