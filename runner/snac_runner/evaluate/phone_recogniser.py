"""The phone recogniser, the offline judge of content: from audio, or from text, to phones.

Phones are the 39 of the CMU Pronouncing Dictionary (ARPAbet without stress). Texts get theirs from espeak-ng: its
phonemes of American English are mapped to ARPAbet, a reduced vowel to the nearest full one, a vowel with r to two
phones, a flapped t to D. Audio gets its phones from a small network with weights in this package. The network only
judges: no plugin may import the runner, and names of phones have no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from hashlib import sha256
from itertools import groupby, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snac_core.errors import UserError
from snac_core.speakers.features import LogMel
from snac_runner.data.audio import resample
from snac_runner.data.espeak import voice

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
    "?": "",  # the glottal stop does not distinguish English words
}  # fmt: skip

_VOICE = "m1"  # a variant changes the voice, not the pronunciation


def from_espeak(names: Iterable[str]) -> tuple[str, ...]:
    """espeak-ng's phonemes as phones. Two equal phones in a row, where two words meet, count as one.

    Raises:
        UserError: for a phoneme that is not in American English.
    """
    phones: list[str] = []
    for name in names:
        phones += [phone for phone in _mapped(name) if phones[-1:] != [phone]]
    return tuple(phones)


def spans(phonemes: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Phones as (phone, start, end), without pauses.

    Args:
        phonemes: (name, start), from `Voice.phoneme_starts`; the last is the end of speech.

    Returns:
        in the unit of `phonemes`. The time of a phoneme that is two phones is divided evenly.
    """
    found = []
    for (name, start), (_, end) in pairwise(phonemes):
        phones = _mapped(name) if name else []
        edges = [start + (end - start) * i // max(1, len(phones)) for i in range(len(phones) + 1)]
        found += list(zip(phones, edges, edges[1:], strict=False))
    return found


def _mapped(name: str) -> list[str]:
    if name not in _OF_ESPEAK:
        raise UserError(f"espeak-ng's phoneme {name!r} is not in American English")
    return _OF_ESPEAK[name].split()


@lru_cache(maxsize=4096)
def phones_of(text: str) -> tuple[str, ...]:
    """The phones of an English text, as espeak-ng pronounces it.

    Raises:
        UserError: if the text has no phones, or phonemes that are not in American English.
    """
    with voice(_VOICE) as speaker:
        phones = from_espeak(speaker.phonemes(text))
    if not phones:
        raise UserError(f"{text!r} has no phones: it contains nothing that can be pronounced")
    return phones


SAMPLE_RATE = 16000  # Hz
BLANK = 0  # of CTC; phone i of PHONES is class i + 1
BANDS = 80
FRAME = 480  # samples between two frames of the output; frame f is centred on sample 480 f


class Residual(nn.Module):
    """x + relu(norm(conv(x))) over time: (B, C, F) to (B, C, F)."""

    def __init__(self, channels: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        out: Tensor = x + nn.functional.relu(self.norm(self.conv(x)))
        return out


class PhoneNetwork(nn.Module):
    """Log-mel bands to phones every 30 ms: convolutions for the sound of a phone, a bidirectional LSTM for its context.

    In eval mode an item does not depend on its batch: features are normalised per item, batch norms use stored
    statistics.
    """

    def __init__(self, channels: int = 176, blocks: int = 6, hidden: int = 176, dropout: float = 0.1) -> None:
        super().__init__()
        self.features = LogMel(BANDS, SAMPLE_RATE)
        self.stem = nn.Sequential(
            nn.Conv1d(BANDS, 128, 5, padding=2),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Conv1d(128, channels, 5, stride=3, padding=2),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(*[Residual(channels, 5, 1 + i % 2) for i in range(blocks)])
        self.context = nn.LSTM(channels, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * hidden, len(PHONES) + 1)

    def read(self, features: Tensor) -> Tensor:
        """Features (B, 80, F) to logits (B, ceil(F / 3), 40)."""
        x = self.blocks(self.stem(features)).transpose(1, 2)
        x, _ = self.context(self.dropout(x))
        logits: Tensor = self.classify(self.dropout(x))
        return logits

    def forward(self, audio: Tensor) -> Tensor:
        """Audio (B, T) at 16 kHz to logits (B, F, 40), 100 frames in 3 s. Class 0 is the blank of CTC."""
        return self.read(self.features(audio))


ASSET = Path(__file__).resolve().parent / "assets" / "phones_tiny" / "model.safetensors"


class PhoneRecogniser:
    """Recognises the phones in speech. The result does not depend on what was recognised before.

    Args:
        weights: safetensors of a PhoneNetwork; None: those in this package.

    Attributes:
        digest: sha256 (hex) of the file of weights.

    Raises:
        UserError: if there is no such file, or its weights do not fit the network.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        path = Path(weights) if weights is not None else ASSET
        if not path.is_file():
            raise UserError(
                f"no weights of the phone recogniser at {path}: reinstall this package, "
                "or train them with `python recipes/phone_recogniser.py train`"
            )
        self.network = PhoneNetwork()
        try:
            self.network.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path} does not load as weights of the phone recogniser: {reason}") from error
        self.network.eval().requires_grad_(False)
        self.digest = sha256(path.read_bytes()).hexdigest()

    def __call__(self, audio: Tensor, sample_rate: int) -> tuple[str, ...]:
        """Phones in audio (T,) or (1, T)."""
        wave = resample(audio.reshape(1, -1).float(), sample_rate, SAMPLE_RATE)
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            return decode(self.network(wave)[0])


@cache
def bundled() -> PhoneRecogniser:
    """The recogniser with the weights in this package, loaded once."""
    return PhoneRecogniser()


def decode(logits: Tensor) -> tuple[str, ...]:
    """Best path decoding of logits (F, 40): repeated classes merged, blanks removed (Graves et al. 2006, eq. 4)."""
    best = (index for index, _ in groupby(logits.argmax(-1).tolist()))
    return tuple(PHONES[index - 1] for index in best if index != BLANK)
