"""Things to say: many different sentences, from the words and the bigrams of pocketsphinx's English model.

Each word is one of a few drawn by how often they are said (evened out, so that rare words come up), chosen by how well
it follows the word before. What comes out reads like English without meaning, and no two sentences are alike: a
recogniser that learns from it hears every phone in many surroundings.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from runner.data.sentences import SENTENCES
from snac_core.errors import UserError
from snac_core.seeding import derive

_EVENED = 0.7  # exponent on a word's frequency
_CANDIDATES = 12
_LOG_BASE = 1.0001  # of the scores of pocketsphinx


class Writer:
    """Writes sentences; those it is told to avoid, the built-in ones, never come out.

    Raises:
        UserError: if pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder, get_model_path
        except ImportError:
            raise UserError(
                "sentences need the words of the package pocketsphinx: install the extra [judges]"
            ) from None
        self._model = Decoder(samprate=16000, loglevel="FATAL").get_lm("_default")
        lines = Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines()
        words = sorted(
            {w for w in (line.partition(" ")[0] for line in lines) if re.fullmatch(r"[a-z]{2,}('[a-z]+)?|[ai]", w)}
        )
        scores = np.array([self._model.prob([word]) for word in words], dtype=np.float64)
        known = scores > scores.min()
        self.words = [word for word, is_known in zip(words, known, strict=True) if is_known]
        share = np.exp(_EVENED * np.log(_LOG_BASE) * scores[known])
        self._share = np.cumsum(share / share.sum())
        self._avoided = {text.lower().rstrip(".?!") for text in SENTENCES}

    def write(self, count: int, seed: int, shortest: int = 4, longest: int = 10) -> list[str]:
        """`count` different sentences of `shortest` to `longest` words; a pure function of the arguments."""
        draw = np.random.default_rng(derive(seed, "sentences"))
        texts: dict[str, None] = {}
        while len(texts) < count:
            length = int(draw.integers(shortest, longest + 1))
            sentence: list[str] = []
            for _ in range(length):
                places = np.searchsorted(self._share, draw.random(_CANDIDATES)).clip(max=len(self.words) - 1)
                sentence.append(self._following(sentence, [self.words[i] for i in places], float(draw.random())))
            text = " ".join(sentence)
            if text not in self._avoided:
                texts[text] = None
        return list(texts)

    def _following(self, before: list[str], candidates: list[str], chance: float) -> str:
        """One of the candidates, by how likely it is after the last word relative to by itself."""
        if not before:
            return candidates[0]
        gain = np.array([self._model.prob([w, before[-1]]) - self._model.prob([w]) for w in candidates])
        likely = np.exp(np.log(_LOG_BASE) * (gain - gain.max()))
        return candidates[int(np.searchsorted(np.cumsum(likely / likely.sum()), chance).clip(max=len(candidates) - 1))]
