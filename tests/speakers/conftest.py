"""The built-in encoders, loaded once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder

ENCODERS = ("ecapa_tiny", "ge2e", "simple")


def _quietly(name: str) -> SpeakerEncoder:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "speaker encoder 'simple' is UNTRAINED", UserWarning)
        return load_speaker_encoder(name)


@pytest.fixture(scope="session", params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> SpeakerEncoder:
    """Each built-in encoder in turn."""
    return _quietly(request.param)


@pytest.fixture
def fresh_encoder(encoder: SpeakerEncoder) -> SpeakerEncoder:
    """Another instance of the encoder, to be changed by the test."""
    return _quietly(encoder.name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are small: on a busy machine threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
