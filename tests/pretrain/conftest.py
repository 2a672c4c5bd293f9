"""A corpus and a codec that are small enough to train in seconds."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from snac_runner.console import Console
from snac_runner.data.corpus import Corpus
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import synthesize

SMALL: dict[str, Any] = {
    "sampling_rate": 8000,
    "encoder_dim": 8,
    "encoder_rates": [2, 4, 4],
    "decoder_dim": 96,
    "decoder_rates": [4, 4, 2],
    "attn_window_size": None,
    "codebook_size": 64,
    "codebook_dim": 8,
    "vq_strides": [2, 1],
    "noise": False,
    "depthwise": False,
}


class Recorder(Console):
    """Keeps lines, and sends SIGINT to this process after a step, as Ctrl-C does."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.interrupt_after = interrupt_after

    def line(self, text: str) -> None:
        self.lines.append(text)

    def show_progress(self, title: str, done: int, total: int, note: str = "") -> None:
        if done == self.interrupt_after:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight synthetic speakers."""
    return synthesize(tmp_path_factory.mktemp("speech") / "synthetic", speakers=8, sentences=6)


@pytest.fixture(scope="session")
def corpus(speech: Path) -> Corpus:
    return open_corpus(speech)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a small codec's arguments."""
    path = tmp_path_factory.mktemp("codec") / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are slowed down by a second thread, on a busy machine a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
