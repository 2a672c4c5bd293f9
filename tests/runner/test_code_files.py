"""`runner encode` and `runner decode`: files of codes and tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from small_study import Bench, runner

from snac_core import SNAC
from snac_runner.code_files import read_item
from snac_runner.data.audio import load_audio


@pytest.fixture
def voices(bench: Bench, tmp_path: Path) -> Path:
    """A folder of two recordings and a silent file."""
    folder = tmp_path / "voices"
    folder.mkdir()
    for name, speaker in zip("ab", sorted((bench.speech / "train").iterdir()), strict=False):
        shutil.copy(sorted(speaker.glob("*.flac"))[0], folder / f"{name}.flac")
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".jsonl"])
@pytest.mark.parametrize("layout", [[], ["--order", "interleaved", "--offsets", "position", "--first-token", 1000]])
def test_every_format_gives_back_the_codes_of_the_codec(
    bench: Bench, tmp_path: Path, voices: Path, suffix: str, layout: list[str]
) -> None:
    codec, out = SNAC.from_pretrained(bench.base), tmp_path / f"codes{suffix}"
    audio = load_audio(voices / "a.flac", codec.sampling_rate)[None]
    assert runner("encode", "--base", bench.base, "--source", voices / "a.flac", *layout, "--out", out) == 0
    item = read_item(out, codec)
    assert item.length == audio.shape[-1]
    assert all(torch.equal(a, b) for a, b in zip(item.codes, codec.encode(audio), strict=True))
    assert runner("decode", "--base", bench.base, "--codes", out, "--out", tmp_path / "d.wav") == 0
    assert soundfile.info(str(tmp_path / "d.wav")).frames == audio.shape[-1]


def test_codes_are_read_for_a_codec_on_another_device(
    bench: Bench, tmp_path: Path, voices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, out = SNAC.from_pretrained(bench.base), tmp_path / "codes.npz"
    assert runner("encode", "--base", bench.base, "--source", voices / "a.flac", "--out", out) == 0
    expected = read_item(out, codec)
    monkeypatch.setattr(SNAC, "digest", codec.digest)
    found = read_item(out, codec.to("meta"))
    assert all(map(torch.equal, found.codes, expected.codes))


def test_the_formats_are_readable_without_this_package(bench: Bench, tmp_path: Path, voices: Path) -> None:
    paths = {suffix: tmp_path / f"codes{suffix}" for suffix in (".safetensors", ".npz", ".jsonl")}
    for path in paths.values():
        assert runner("encode", "--base", bench.base, "--source", voices / "a.flac", "--out", path) == 0
    tensors = load_file(paths[".safetensors"])
    arrays = np.load(paths[".npz"])
    (line,) = paths[".jsonl"].read_text().splitlines()
    for name, tensor in tensors.items():
        assert arrays[name].tolist() == tensor.tolist() == [json.loads(line)[name]]
    assert str(arrays["source"]) == json.loads(line)["source"] == str(voices / "a.flac")


def test_a_folder_is_encoded_to_one_line_per_file_and_bad_files_are_named(
    bench: Bench, tmp_path: Path, voices: Path, refusal: Callable[..., str]
) -> None:
    out = tmp_path / "all.jsonl"
    assert runner("encode", "--base", bench.base, "--source", voices, "--out", out) == 0
    assert [Path(json.loads(line)["source"]).name for line in out.read_text().splitlines()] == ["a.flac", "b.flac"]
    decode = ["decode", "--base", bench.base, "--codes", out, "--out", tmp_path / "d.wav"]
    assert "has 2 items; choose one with --line 1 to 2" in refusal(*decode)
    assert "no line 3" in refusal(*decode, "--line", 3)
    assert runner(*decode, "--line", 2) == 0
    (voices / "c.wav").write_text("no audio")
    assert "1 of 3 files were not encoded" in refusal("encode", "--base", bench.base, "--source", voices, "--out", out)
    assert len(out.read_text().splitlines()) == 2


def test_bad_requests_are_refused(bench: Bench, tmp_path: Path, voices: Path, refusal: Callable[..., str]) -> None:
    encode = ["encode", "--base", bench.base, "--source", voices / "a.flac", "--out"]
    assert ".jsonl" in refusal(*encode, tmp_path / "codes.txt")
    assert "did you mean 'interleaved'" in refusal(*encode, tmp_path / "c.npz", "--order", "interleave")
    assert "give --order too" in refusal(*encode, tmp_path / "c.npz", "--first-token", 5)
    assert "2 sources into" in refusal("encode", "--base", bench.base, "--source", voices, "--out", tmp_path / "c.npz")
    assert not list(tmp_path.glob("c*"))


def test_tokens_that_a_language_model_cut_off_are_refused_with_advice(
    bench: Bench, tmp_path: Path, voices: Path, refusal: Callable[..., str]
) -> None:
    out = tmp_path / "codes.jsonl"
    assert runner("encode", "--base", bench.base, "--source", voices / "a.flac", "--order", "frame", "--out", out) == 0
    line = json.loads(out.read_text())
    line["tokens"] = line["tokens"][:-1]
    out.write_text(json.dumps(line))
    message = refusal("decode", "--base", bench.base, "--codes", out, "--out", tmp_path / "d.wav")
    assert "tokens of another; give the first" in message
