"""Small corpora of tones, and a cache of their own, for the tests of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tones import write_tone


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SNAC_CACHE", str(folder))
    return folder


@pytest.fixture
def speech(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of speakers: `speech({"ann": 2, "bob": 1})` has two tones by ann and one by bob."""

    def make(speakers: dict[str, int], below: str = "", seconds: float = 1.0, name: str = "speech") -> Path:
        root = tmp_path / name
        for speaker, count in speakers.items():
            for number in range(count):
                write_tone(root / below / speaker / f"{speaker}_{number}.wav", seconds)
        return root

    return make
