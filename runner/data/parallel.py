"""Parallel speech: the same words from another speaker, where a corpus has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runner.data.crops import CropLoader


def parallel_speech(loader: CropLoader, step: int, targets: Sequence[str], items: int) -> tuple[Tensor, Tensor] | None:
    """Whole utterances in which targets say what the first items of a step's batch are cut from.

    Args:
        loader: of the batches.
        step: which batch.
        targets: N * items speakers, items fastest.
        items: how many of the batch count.

    Returns:
        audio (N * items, 1, T') padded with zeros, and lengths in samples (N * items,), 0 where a target never says it;
        None where no two speakers of the split say the same.
    """
    if not _is_parallel(loader):
        return None
    texts = [loader.utterances[name].text for name in loader.at(step).utterances[:items]]
    spoken = []
    for number, speaker in enumerate(targets):
        text = texts[number % items]
        same = next((u for u in loader.of[speaker] if text and u.text == text), None)
        spoken.append(loader.whole(same)[0] if same else torch.zeros(0))
    lengths = torch.tensor([len(wave) for wave in spoken])
    audio = torch.zeros(len(spoken), 1, max(1, int(lengths.max())))
    for row, wave in enumerate(spoken):
        audio[row, 0, : len(wave)] = wave
    return audio, lengths


def _is_parallel(loader: CropLoader) -> bool:
    said: dict[str, str] = {}
    return any(
        utterance.text and said.setdefault(utterance.text, utterance.speaker) != utterance.speaker
        for utterance in loader.utterances.values()
    )
