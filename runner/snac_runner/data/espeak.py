"""Reproducible speech synthesis with espeak-ng, through ctypes: the same voice and texts give the same samples.

espeak-ng keeps state in global variables from utterance to utterance, even after it was terminated and initialized
again. Each voice therefore uses its own library, loaded from a private copy of the file. Breathy voices draw noise from
espeak-ng's random generator and from that of the C library; both are seeded when the voice is selected. The latter
belongs to the whole process, so voices must not be used from several threads at once.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from snac_core.errors import UserError

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS of speak_lib.h
_UTF8 = 1  # espeakCHARS_UTF8
_LANGUAGE = "en-us"
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_PHONEME_EVENTS = 1  # espeakINITIALIZE_PHONEME_EVENTS
_PHONEME, _END = 7, 0  # espeak_EVENT_TYPE: start of a phoneme; end of the list of events
_MARKS = "',%=;:-|!_"  # of stress, length and pauses, in names of phonemes
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


def _installed() -> tuple[Path, Path]:
    """The library's file and its data folder, from the espeakng-loader package."""
    try:
        import espeakng_loader
    except ImportError:
        raise UserError("speech synthesis needs the package espeakng-loader; pip install espeakng-loader") from None
    library, data = Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
    if not library.is_file():
        raise UserError(f"the package espeakng-loader has no library for this platform ({library} is missing)")
    return library, data


def variants() -> dict[str, str | None]:
    """Voice variant -> "F", "M", or None if its file does not state it."""
    _, data = _installed()
    sexes: dict[str, str | None] = {}
    for path in sorted((data / "voices" / "!v").iterdir()):
        gender = re.search(r"^gender\s+(\w+)", path.read_text(encoding="utf-8", errors="replace"), re.M)
        sexes[path.name] = {"female": "F", "male": "M"}.get(gender[1].lower() if gender else "")
    return sexes


class Voice:
    """A voice of espeak-ng with its own library; get one with `voice`.

    Attributes:
        sample_rate: of the speech, in Hz.
    """

    def __init__(self, library: ctypes.CDLL, name: str, data: Path, seed: int) -> None:
        self._library = library
        self._parts: list[bytes] = []
        self._phonemes: list[tuple[str, int]] = []  # names, and the samples at which they start
        self._callback = _CALLBACK(self._take)  # must outlive the calls
        self.sample_rate: int = library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data.parent), _PHONEME_EVENTS)
        if self.sample_rate <= 0:
            raise UserError(f"espeak-ng does not start with its data in {data} (code {self.sample_rate})")
        library.espeak_SetSynthCallback(self._callback)
        if library.espeak_SetVoiceByName(f"{_LANGUAGE}+{name}".encode()) != 0:
            raise UserError(f"this espeak-ng has no voice variant {name!r}")
        # seeded after the voice is selected, because selecting draws random numbers, too
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed & 0x7FFFFFFF))
        c_library = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)
        c_library.srand(ctypes.c_uint(seed & 0x7FFFFFFF))

    def _take(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: int | None) -> int:
        if samples and count > 0:
            self._parts.append(ctypes.string_at(samples, 2 * count))
        while events and (event := _Event.from_address(events)).type != _END:
            if event.type == _PHONEME:
                self._phonemes.append((event.name.decode(errors="replace"), event.sample))
            events += ctypes.sizeof(_Event)
        return 0

    def say(self, text: str) -> np.ndarray:
        """Synthesize a text: samples (T,), float32 in [-1, 1), at `sample_rate` Hz."""
        self._parts.clear()
        self._phonemes.clear()
        encoded = text.encode()
        # text, bytes with the final zero, from position 0, counted in characters (1), to the end (0), flags
        code = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _UTF8, None, None)
        if code != 0 or self._library.espeak_Synchronize() != 0:
            raise UserError(f"espeak-ng could not synthesize {text!r} (code {code})")
        return np.frombuffer(b"".join(self._parts), dtype="<i2").astype(np.float32) / 32768

    def adjust(self, *, rate: int = 175, pitch: int = 50, spread: int = 50) -> None:
        """Set the speaking rate in words per minute (80 to 450), the pitch and its range (both 0 to 100)."""
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, spread)):
            if self._library.espeak_SetParameter(parameter, value, 0) != 0:
                raise UserError(f"espeak-ng does not accept the value {value} for its parameter {parameter}")

    @property
    def phoneme_starts(self) -> list[tuple[str, int]]:
        """The phonemes of the last text, without stress marks, with the samples they start at; "" is a pause."""
        return [(name.strip(_MARKS), sample) for name, sample in self._phonemes]

    def phonemes(self, text: str) -> list[str]:
        """espeak-ng's names of the phonemes of a text, e.g. "aI", without stress marks; pauses are left out."""
        translate = self._library.espeak_TextToPhonemes
        translate.restype = ctypes.c_char_p
        encoded = ctypes.create_string_buffer(text.encode())
        rest = ctypes.c_void_p(ctypes.addressof(encoded))
        clauses = []
        while rest.value:  # each call translates a clause and moves the pointer behind it; NULL at the end
            clauses.append(translate(ctypes.byref(rest), _UTF8, ord("_") << 8) or b"")  # "_" between phonemes
        names = re.split(r"[ _\n]+", b" ".join(clauses).decode())
        return [name for name in (n.strip(_MARKS) for n in names) if name]


@contextmanager
def voice(name: str, seed: int = 0) -> Iterator[Voice]:
    """A voice variant with its own library, which is unloaded at the end. `seed` determines its noise."""
    installed, data = _installed()
    folder = tempfile.mkdtemp(prefix="espeak-")
    try:
        library = ctypes.CDLL(shutil.copy(installed, folder))
        try:
            yield Voice(library, name, data, seed)
        finally:
            library.espeak_Terminate()
            _unload(library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unload(library: ctypes.CDLL) -> None:
    """Unload the private library; otherwise, one per voice would stay in memory."""
    if os.name == "nt":
        ctypes.windll.kernel32.FreeLibrary(ctypes.c_void_p(library._handle))  # type: ignore[attr-defined, unused-ignore]
    else:
        import _ctypes

        _ctypes.dlclose(library._handle)
