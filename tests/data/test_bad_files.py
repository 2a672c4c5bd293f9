"""Every bad file is named, every mistake gets a sentence that says what is expected."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tones import write_tone

from snac_core.errors import UserError
from snac_runner.data.audio import load_audio
from snac_runner.data.checks import check_audio
from snac_runner.data.open_corpus import open_corpus

Speech = Callable[..., Path]


def test_bad_files_are_named_and_skipped_never_silently(speech: Speech, caplog: pytest.LogCaptureFixture) -> None:
    root = speech({"ann": 2, "bob": 2})
    bad = root / "bob"
    (bad / "empty.wav").write_bytes(b"")
    (bad / "noise.flac").write_bytes(b"this is no audio")
    soundfile.write(bad / "nan.wav", np.full(16000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    soundfile.write(bad / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(bad / "two.wav", np.full(2, 0.5), 16000)
    hiss = np.random.default_rng(0).normal(size=48000) * 0.1
    for suffix in ("wav", "ogg", "flac"):
        soundfile.write(bad / f"cut.{suffix}", hiss, 16000)
        whole = (bad / f"cut.{suffix}").read_bytes()
        (bad / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (bad / "copy.wav").write_bytes((root / "ann" / "ann_0.wav").read_bytes())
    write_tone(root / "loose.wav")
    with caplog.at_level(logging.WARNING):
        corpus = open_corpus(root)
    reasons = {path.name: reason for path, reason in corpus.skipped}
    expected = {
        "empty.wav": "is empty (0 bytes)",
        "noise.flac": "cannot be decoded",
        "nan.wav": "holds 16000 samples that are NaN or infinite",
        "silent.wav": "is silent",
        "two.wav": "is too short: 2 samples",
        "cut.wav": "is cut off: 47978 of 96000 bytes",
        "cut.ogg": "is cut off",
        "cut.flac": "cannot be decoded",
        "copy.wav": "is the same audio as",
        "loose.wav": "lies outside any speaker folder",
    }
    assert set(reasons) == set(expected)
    for name, beginning in expected.items():
        assert reasons[name].startswith(beginning), (name, reasons[name])
        assert any(name in line.message for line in caplog.records)
    assert len(corpus.of_speaker("bob")) == 2
    messages: list[str] = []
    open_corpus(root, warn=messages.append)
    assert len(messages) == len(expected)


def test_stereo_and_other_rates_are_used_not_skipped(speech: Speech) -> None:
    root = speech({"ann": 1, "bob": 1})
    write_tone(root / "bob" / "stereo.wav", channels=2)
    write_tone(root / "bob" / "telephone.wav", rate=8000)
    corpus = open_corpus(root)
    assert corpus.skipped == ()
    assert [load_audio(u, 24000).shape for u in corpus.of_speaker("bob")] == [(1, 24000)] * 3


def test_an_unreadable_file_is_skipped_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "is_a_folder.wav"
    folder.mkdir()
    assert check_audio(folder).problem == "cannot be read: Is a directory"
    assert check_audio(tmp_path / "gone.wav").problem == "cannot be read: No such file or directory"


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "no speakers", "one speaker", "copies", "nothing usable"])
def test_a_wrong_folder_is_an_error_that_says_what_is_expected(tmp_path: Path, speech: Speech, kind: str) -> None:
    root = tmp_path / "data"
    expected = r"expected <root>/<speaker>"
    if kind == "missing":
        message = "no folder .*data; " + expected
    elif kind == "file":
        write_tone(tmp_path / "data.wav")
        root, message = tmp_path / "data.wav", "is a file, not a folder; " + expected
    elif kind == "empty":
        root.mkdir()
        message = "holds no audio file; " + expected
    elif kind == "no speakers":
        write_tone(root / "a.wav")
        message = "holds 1 audio files outside any speaker folder; " + expected
    elif kind == "one speaker":
        root, message = speech({"ann": 3}), "holds one speaker, 'ann'; conversion needs at least two; " + expected
    elif kind == "copies":
        root = speech({"ann": 3})
        shutil.copytree(root / "ann", root / "bob")
        message = r"holds one speaker, 'ann' \(3 of the files cannot be used: .*bob.*is the same audio as .*ann.*\)"
    else:
        for speaker in ("a", "b"):
            (root / speaker).mkdir(parents=True)
            (root / speaker / "x.wav").write_bytes(b"")
        message = "none of 2 audio files is usable; the first, .*x.wav, is empty"
    with pytest.raises(UserError, match=message):
        open_corpus(root)
