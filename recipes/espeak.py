"""espeak-ng through its C interface: samples, and phonemes with the sample they start at.

Source: ``speak_lib.h`` of espeak-ng.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from recipes.engines import Run, Utterance
from recipes.phones import ipa_class


class _EventId(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class EspeakNG:
    """espeak-ng through its C interface; one per process (see ``espeak_ng``)."""

    _SYNCHRONOUS, _PHONEME_EVENTS, _IPA, _DONT_EXIT = 2, 1, 2, 0x8000
    _PHONEME, _UTF8 = 7, 1
    _PARAMETERS = (("rate", 1), ("volume", 2), ("pitch", 3), ("range", 4))

    def __init__(self):
        try:
            self._library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError as error:
            raise FileNotFoundError(
                "libespeak-ng.so.1: not installed; recipes/README.md lists the packages"
            ) from error
        flags = self._PHONEME_EVENTS | self._IPA | self._DONT_EXIT
        self.rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, None, flags)
        self._blocks: list[np.ndarray] = []
        self._events: list[tuple[int, str]] = []
        self._callback = _CALLBACK(self._receive)  # must outlive the library's use
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == self._PHONEME:
                name = bytes(events[i].id.string).split(b"\0")[0]
                self._events.append((events[i].sample, name.decode("utf-8", "ignore")))
            i += 1
        return 0

    def say(self, text: str, voice: str, **parameters: int) -> Utterance:
        """Speak.

        Args:
            text: what.
            voice: a file of espeak-ng's ``lang`` folder, with ``+variant``.
            parameters: ``rate`` (words per minute), ``pitch`` and ``range`` (0 to 99).

        Raises:
            ValueError: there is no such voice.
        """
        self._blocks.clear()
        self._events.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"{voice}: espeak-ng has no such voice")
        for name, number in self._PARAMETERS:
            default = {"rate": 175, "volume": 60}.get(name, 50)
            value = parameters.get(name, default)
            self._library.espeak_SetParameter(number, int(value), 0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 1, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate([np.zeros(0, np.int16), *self._blocks])
        return Utterance(
            samples.astype(np.float32) / 32768,
            self.rate,
            self._runs(len(samples), english="gmw/en" in voice),
        )

    def _runs(self, length: int, english: bool) -> list[Run]:
        if not self._events:
            return []
        starts = [start for start, _ in self._events]
        ends = [*starts[1:], length]
        runs = [(0, starts[0] / self.rate)] if starts[0] else []
        for (_, symbol), end in zip(self._events, ends, strict=True):
            runs.append((ipa_class(symbol, english), end / self.rate))
        return runs


@cache
def espeak_ng() -> EspeakNG:
    """The process's espeak-ng."""
    return EspeakNG()
