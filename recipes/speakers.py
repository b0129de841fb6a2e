"""Who speaks in the corpus, under which licence, and who is kept for tests.

Bundled weights are trained on voices under permissive licences and on espeak-ng; voices
under the LGPL or GPL only serve as test speakers that no training has heard.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speaker:
    """One voice of the corpus.

    Attributes:
        name: of its shards.
        engine: ``"festival"``, ``"russian"``, ``"flite"``, ``"hts"``, ``"espeak"``,
            ``"kokoro"`` or ``"mapped"`` (English by the phones of another language).
        voice: the engine's name for it, or a variant of espeak-ng.
        minutes: audio in the corpus.
        licence: of the voice.
        package: Debian package that holds it; of Kokoro's voices, that of npm.
        f0: the voice's own mean in Hz where the engine is told one, else 0.
        test: never in a training corpus.
    """

    name: str
    engine: str
    voice: str
    minutes: float
    licence: str
    package: str
    f0: float = 0.0
    test: bool = False


_CMU = "CMU permissive"
_TRAINING = (
    Speaker("kal", "festival", "kal_diphone", 130, _CMU, "festvox-kallpc16k", 105),
    Speaker(
        "ked", "festival", "ked_diphone", 130, "Edinburgh", "festvox-kdlpc16k", 105
    ),
    Speaker("slt_hts", "hts", "0", 100, _CMU, "festvox-us-slt-hts"),
    Speaker("slt_hts_long", "hts", "0.53", 50, _CMU, "festvox-us-slt-hts"),
    Speaker("awb", "flite", "awb", 120, _CMU, "flite", 128),
    Speaker("slt", "flite", "slt", 80, _CMU, "flite", 172),
    Speaker("rms", "flite", "rms", 100, _CMU, "flite"),
    Speaker("nsh", "russian", "msu_ru_nsh_clunits", 50, "Festvox", "festvox-ru"),
)

# Variants that differ from one another and are no robots, whispers or jokes.
_VARIANTS = (
    *("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8"),
    *("klatt", "klatt2", "klatt3", "klatt4", "klatt6", "Alex", "Alicia", "Andrea"),
    *("Annie", "Denis", "Diogo", "Gene", "Jacky", "Lee", "Marco", "Michael", "Nguyen"),
    *("adam", "anika", "aunty", "belinda", "benjamin", "david", "ed", "gustave"),
    *("linda", "max", "michel", "quincy", "rob", "sandro", "steph", "travis"),
)
ESPEAK = tuple(
    Speaker(f"espeak-{v}", "espeak", v, 10, "GPL-3+", "espeak-ng") for v in _VARIANTS
)
ENGLISH = (
    *("gmw/en-US", "gmw/en-US", "gmw/en-US", "gmw/en", "gmw/en-GB-scotland"),
    *("gmw/en-029", "gmw/en-GB-x-rp", "gmw/en-GB-x-gbclan", "gmw/en-US-nyc"),
)
OTHER_LANGUAGES = (
    *("gmw/de", "gmw/nl", "gmq/sv", "roa/es", "roa/it", "roa/fr", "roa/pt"),
    *("zlw/pl", "zlw/cs", "urj/fi", "trk/tr", "poz/id"),
)


def _mapped(name: str, voice: str, licence: str, package: str, f0: float) -> Speaker:
    return Speaker(name, "mapped", voice, 5, licence, package, f0, test=True)


_MAPPED = (
    _mapped("ph", "czech_ph", "GPL-2+", "festvox-czech-ph", 130),
    _mapped("krb", "czech_krb", "GPL-3+", "festvox-czech-krb", 250),
    _mapped("dita", "czech_dita", "GPL-3+", "festvox-czech-dita", 215),
    _mapped("machac", "czech_machac", "GPL-3+", "festvox-czech-machac", 85),
    _mapped("lp", "lp_diphone", "GPL-2+", "festvox-italp16k", 200),
    _mapped("pc", "pc_diphone", "GPL-2+", "festvox-itapc16k", 110),
    _mapped("lj", "suo_fi_lj_diphone", "LGPL-2+", "festvox-suopuhe-lj", 160),
    _mapped("mv", "hy_fi_mv_diphone", "LGPL-2+", "festvox-suopuhe-mv", 90),
    _mapped("nsk", "hindi_NSK_diphone", "GPL-2+", "festvox-hi-nsk", 130),
)
# Neural voices, the nearest to people.
_KOKORO_VOICES = (
    *("af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore"),
    *("af_nicole", "af_nova", "af_river", "af_sarah", "af_sky", "am_adam", "am_echo"),
    *("am_eric", "am_fenrir", "am_liam", "am_michael", "am_onyx", "am_puck"),
    *("am_santa", "bf_alice", "bf_emma", "bf_isabella", "bf_lily", "bm_daniel"),
    *("bm_fable", "bm_george", "bm_lewis", "ef_dora", "em_alex", "em_santa"),
    *("ff_siwis", "hf_alpha", "hf_beta", "hm_omega", "hm_psi", "if_sara", "im_nicola"),
    *("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo", "pf_dora"),
    *("pm_alex", "pm_santa", "zf_xiaobei", "zf_xiaoni", "zf_xiaoxiao", "zf_xiaoyi"),
    *("zm_yunjian", "zm_yunxi", "zm_yunxia", "zm_yunyang"),
)
_KOKORO_TESTS = ("af_heart", "am_michael", "bf_emma")
KOKORO = tuple(
    Speaker(v, "kokoro", v, 5, "Apache-2.0", "kokoro-js", test=v in _KOKORO_TESTS)
    for v in _KOKORO_VOICES
)
TRAINING = (*_TRAINING, *ESPEAK, *(s for s in KOKORO if not s.test))
TEST = (*_MAPPED, *(s for s in KOKORO if s.test))
SPEAKERS = {speaker.name: speaker for speaker in (*TRAINING, *TEST)}

# What the recordings of a voice need beside its own package, by its engine.
ENGINE_PACKAGES = {
    "hts": ("htsengine", "festival", "festlex-cmu", "festlex-poslex"),
    "flite": ("flite",),
}

# Everything that the recipes install; the voices' own packages come with their needs.
PACKAGES = (
    *("espeak-ng", "libespeak-ng1", "flite", "festival", "festlex-cmu", "htsengine"),
    *("festlex-poslex", "festival-czech", "festival-hi", "festlex-ifd"),
    *sorted({s.package for s in (*_TRAINING, *_MAPPED)} - {"flite"}),
)
