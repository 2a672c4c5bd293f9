"""Loss terms that objectives are made of: differentiable functions of audio and embeddings."""

from snac_core.losses.aligned import aligned_distance, alignment
from snac_core.losses.codes import code_entropy
from snac_core.losses.commitment import commitment
from snac_core.losses.speaker import contrastive, cosine_distance, margin_ranking
from snac_core.losses.spectral import MultiScaleSTFT, mel_distance

__all__ = [
    "MultiScaleSTFT",
    "aligned_distance",
    "alignment",
    "code_entropy",
    "commitment",
    "contrastive",
    "cosine_distance",
    "margin_ranking",
    "mel_distance",
]
