"""Which phones there are, and which of them a text is made of.

The 39 phones of the CMU Pronouncing Dictionary (ARPAbet without stress). espeak-ng's own phonemes of American English
are mapped to them: reduced vowels to their nearest full one, a vowel with its r to two phones, a flapped t to D.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

from runner.data.espeak import voice
from snac_core.errors import UserError

PHONES = (
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH", "K",
    "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH",
)  # fmt: skip

_OF_ESPEAK = {
    # vowels
    "0": "AA", "A": "AA", "A~": "AA", "aa": "AE", "a": "AE", "a#": "AH", "@": "AH", "@2": "AH", "V": "AH", "3": "ER",
    "O": "AO", "O2": "AO", "O~": "AO", "E": "EH", "I": "IH", "I#": "IH", "I2": "IH", "i": "IY", "U": "UH", "u": "UW",
    "o": "OW", "aI": "AY", "aU": "AW", "eI": "EY", "oU": "OW", "OI": "OY",
    # vowels with an r, or with a glide to a neutral vowel
    "A@": "AA R", "O@": "AO R", "o@": "AO R", "e@": "EH R", "U@": "UH R", "i@3": "IY R", "aI3": "AY ER",
    "i@": "IY AH", "aI@": "AY AH", "@L": "AH L",
    # consonants
    "b": "B", "tS": "CH", "d": "D", "t#": "D", "D": "DH", "f": "F", "g": "G", "h": "HH", "dZ": "JH", "k": "K", "x": "K",
    "l": "L", "m": "M", "n": "N", "N": "NG", "p": "P", "r": "R", "s": "S", "S": "SH", "t": "T", "t2": "T", "T": "TH",
    "v": "V", "w": "W", "j": "Y", "z": "Z", "Z": "ZH",
    "?": "",  # the glottal stop, which English does not tell words apart by
}  # fmt: skip

_SPOKEN_BY = "m1"  # a variant changes the voice, not the pronunciation; this one adds nothing of its own


def from_espeak(names: Iterable[str]) -> tuple[str, ...]:
    """espeak-ng's phonemes as phones; two equal ones in a row, at the seam of two words, are one sound.

    Raises:
        UserError: for a phoneme that American English does not have.
    """
    phones: list[str] = []
    for name in names:
        phones += [phone for phone in _mapped(name) if phones[-1:] != [phone]]
    return tuple(phones)


def spans(begun: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """(phone, start, end) from the phonemes of `Voice.begun`, the last of which is where speech ends; pauses left out.

    A phoneme that makes two phones is shared out evenly.
    """
    found = []
    for (name, start), (_, end) in pairwise(begun):
        phones = _mapped(name) if name else []
        edges = [start + (end - start) * i // max(1, len(phones)) for i in range(len(phones) + 1)]
        found += list(zip(phones, edges, edges[1:], strict=False))
    return found


def _mapped(name: str) -> list[str]:
    if name not in _OF_ESPEAK:
        raise UserError(f"espeak-ng's phoneme {name!r} is none of American English's")
    return _OF_ESPEAK[name].split()


@lru_cache(maxsize=4096)
def phones_of(text: str) -> tuple[str, ...]:
    """The phones of an English text, as espeak-ng would say it.

    Raises:
        UserError: if nothing of it can be said, or it holds foreign sounds.
    """
    with voice(_SPOKEN_BY) as speaker:
        phones = from_espeak(speaker.phonemes(text))
    if not phones:
        raise UserError(f"{text!r} has no phones: nothing of it can be said")
    return phones
