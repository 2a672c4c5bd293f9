"""Speech: finding it, checking it, splitting it by speaker, and drawing from it.

Names are imported on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.data.audio import load_audio as load_audio
    from runner.data.corpus import Corpus as Corpus
    from runner.data.corpus import Segment as Segment
    from runner.data.corpus import Utterance as Utterance
    from runner.data.crops import Batch as Batch
    from runner.data.crops import CropLoader as CropLoader
    from runner.data.fetching import fetch as fetch
    from runner.data.opening import open_corpus as open_corpus
    from runner.data.pairlist import Pair as Pair
    from runner.data.pairlist import PairList as PairList
    from runner.data.pairs import conversion_pairs as conversion_pairs
    from runner.data.references import References as References
    from runner.data.scanning import scan as scan
    from runner.data.synth import synthesize as synthesize

_HOMES = {
    "Batch": "crops",
    "Corpus": "corpus",
    "CropLoader": "crops",
    "Pair": "pairlist",
    "PairList": "pairlist",
    "References": "references",
    "Segment": "corpus",
    "Utterance": "corpus",
    "conversion_pairs": "pairs",
    "fetch": "fetching",
    "load_audio": "audio",
    "open_corpus": "opening",
    "scan": "scanning",
    "synthesize": "synth",
}
__all__ = [
    "Batch",
    "Corpus",
    "CropLoader",
    "Pair",
    "PairList",
    "References",
    "Segment",
    "Utterance",
    "conversion_pairs",
    "fetch",
    "load_audio",
    "open_corpus",
    "scan",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
