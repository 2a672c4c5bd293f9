"""Damaged files of every kind that a command reads end in a sentence; what a campaign has found stays mended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import CHECKS, Files, read_examples
from small_study import PHASES, Bench, runner

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import parse_json
from snac_runner.batch_convert import JOURNAL
from snac_runner.code_files import read_item
from snac_runner.config import compose, read_values, with_overrides
from snac_runner.convert import Converter
from snac_runner.data.open_corpus import open_corpus
from snac_runner.report.page import build

DEEP = "[" * 100_000
SLOW = {
    "results (JSON) in a report",
    "audio of a corpus",
    "banks and indexes (JSON, npy, FAISS)",
    "audio to convert (wav, flac, ogg, mp3)",
}


@pytest.fixture(scope="module")
def converter(bench: Bench, finished: Path) -> Converter:
    return Converter(finished / PHASES[2] / "seed0", "cpu", base=str(bench.base))


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in SLOW])
def test_a_damaged_file_gives_a_sentence(
    name: str, bench: Bench, finished: Path, converter: Converter, tmp_path: Path
) -> None:
    run = finished / PHASES[2] / "seed0"
    files = Files(tmp_path, finished, run, bench.base, bench.speech, tmp_path / "no bank", converter)
    found = read_examples(CHECKS[name](files), tmp_path / "case", 12, 0)
    assert found.cases >= 12
    assert not found.faults
    assert "no words" not in found.outcomes


def test_json_that_is_nested_too_deeply_is_an_error_of_its_file(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    codec = SNAC.from_pretrained(str(bench.base))
    readers: dict[str, Callable[[Path], object]] = {
        "a.json": read_values,
        "a.toml": read_values,
        "a.jsonl": lambda path: read_item(path, codec),
        "manifest.jsonl": open_corpus,
    }
    for name, read in readers.items():
        path = tmp_path / name
        path.write_text(f"a = {DEEP}" if path.suffix == ".toml" else DEEP)
        with pytest.raises(UserError, match=name):
            read(path)
    assert with_overrides({}, [f"lr={DEEP}"]) == {"lr": DEEP}, "words, as all that is not TOML"


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_setting_that_is_no_finite_number_is_refused(number: float) -> None:
    """result.json could not hold it."""
    for key in ("grad_clip", "crop_seconds", "weights"):
        given = {key: {"a/b": number} if key == "weights" else number}
        of_arm = {} if key == "crop_seconds" else given
        with pytest.raises(UserError, match=key):
            compose(given if not of_arm else {}, [{"strategies": [PHASES[2]], **of_arm}], "a.toml")


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'shape': (2,", b"PK\x03\x04"])
def test_arrays_that_are_cut_are_named(bench: Bench, converter: Converter, tmp_path: Path, data: bytes) -> None:
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npy is not a file with one speaker embedding"):
        converter.target([tmp_path / "a.npy"])
    with pytest.raises(UserError, match=r"a\.npz is not a file of codes"):
        read_item(tmp_path / "a.npz", converter.model.codec)


def test_a_study_of_which_no_result_can_be_read_is_named(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(finished, study)
    for name, value in (("pairs.json", 3), ("study.json", {"schema": 2, "arms": 5, "seeds": 1})):
        (study / name).write_text(json.dumps(value))
    assert build(study).is_file()
    for path in study.rglob("result.json"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"no result\.json under .*study can be read; .*seed0: result\.json: "):
        build(study)


def test_a_record_of_a_conversion_that_a_full_disk_has_cut_hides_no_other(
    runs: dict[str, Path], voices: list[Path], tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    shutil.copy(voices[0], source / "a.flac")
    out.mkdir()
    (out / JOURNAL).write_text('{"out": "b.wav", "inp')
    embedding = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    np.save(tmp_path / "target.npy", embedding)
    command = ["convert", "--run", runs[PHASES[2]], "--source", source, "--target", tmp_path / "target.npy"]
    for _ in range(2):
        assert runner(*command, "--device", "cpu", "--out", out) == 0
