"""Every layout is understood; a manifest stands for what it names; the second look is quick."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from tones import write_tone

from snac_core.errors import UserError
from snac_runner.data.checks import AudioCheck
from snac_runner.data.formats import Candidate, CorpusFiles
from snac_runner.data.open_corpus import _Usable, open_corpus, scan
from snac_runner.data.utterances import Packed

Speech = Callable[..., Path]


def test_a_folder_of_speakers_is_split_by_speaker(speech: Speech) -> None:
    corpus = open_corpus(speech({f"s{i}": 2 for i in range(10)}))
    assert sum(len(corpus.splits[s]) for s in corpus.splits) == 20
    sides = [set(corpus.speakers(s)) for s in ("train", "dev", "test")]
    assert all(len(side) >= 2 for side in sides)
    assert len(set.union(*sides)) == 10


def test_a_pre_split_root_is_taken_as_it_is(speech: Speech) -> None:
    for split, names in {"train": "abc", "dev": "de", "test": "fg"}.items():
        root = speech(dict.fromkeys(names, 1), below=split)
    corpus = open_corpus(root)
    assert corpus.speakers("train") == ["a", "b", "c"]
    assert corpus.speakers("dev") == ["d", "e"]
    assert corpus.utterance("test/f/f_0").seconds == 1.0


def test_a_missing_dev_part_is_taken_from_the_training_speakers_and_said(speech: Speech) -> None:
    speech({f"s{i}": 1 for i in range(8)}, below="train")
    root = speech({"x": 1, "y": 1}, below="test")
    corpus = open_corpus(root)
    assert corpus.speakers("test") == ["x", "y"]
    assert len(corpus.speakers("dev")) >= 2
    assert any("no dev part" in note for note in corpus.notes)


def test_a_speaker_on_both_sides_is_refused_by_name(speech: Speech) -> None:
    speech({"ann": 1, "bob": 1}, below="train")
    root = speech({"ann": 1, "cid": 1}, below="test")
    for number, path in enumerate(sorted(root.rglob("*.wav"))):
        write_tone(path, hz=200 + number)
    with pytest.raises(UserError, match=r"more than one split: 'ann'"):
        open_corpus(root)


def test_librispeech_brings_its_parts_texts_and_sexes(tmp_path: Path) -> None:
    root = tmp_path / "LibriSpeech"
    for subset, speakers in {"train-clean-100": ["14", "16"], "dev-clean": ["17", "20"], "test-other": ["22"]}.items():
        for speaker in speakers:
            write_tone(root / subset / speaker / "9" / f"{speaker}-9-0000.flac")
            (root / subset / speaker / "9" / f"{speaker}-9.trans.txt").write_text(f"{speaker}-9-0000 HELLO THERE\n")
    (root / "SPEAKERS.TXT").write_text(
        ";ID |SEX| SUBSET\n14   | F | train-clean-100 | 25.0 | Kristin\n22 | M | x | 1 | y\n"
    )
    corpus = open_corpus(tmp_path)
    assert corpus.speakers("dev") == ["17", "20"]
    assert corpus.speakers("test") == ["22"]
    assert corpus.of_speaker("14")[0].text == "HELLO THERE"
    assert (corpus.sex("14"), corpus.sex("22"), corpus.sex("17")) == ("F", "M", None)
    alone = open_corpus(root / "dev-clean")
    assert alone.of_speaker("17")[0].text == "HELLO THERE"


def test_vctk_takes_one_microphone_and_reads_texts_and_sexes(tmp_path: Path) -> None:
    for speaker in ("p225", "p226"):
        for mic in ("mic1", "mic2"):
            write_tone(tmp_path / "wav48_silence_trimmed" / speaker / f"{speaker}_001_{mic}.flac", rate=48000)
        (tmp_path / "txt" / speaker).mkdir(parents=True)
        (tmp_path / "txt" / speaker / f"{speaker}_001.txt").write_text("Please call Stella.\n")
    (tmp_path / "speaker-info.txt").write_text(
        "ID  AGE  GENDER  ACCENTS\np225  23  F    English\np226  22  M  English\n"
    )
    corpus = open_corpus(tmp_path)
    assert [u.path.stem for u in corpus.of_speaker("p225")] == ["p225_001_mic1"]
    assert corpus.of_speaker("p226")[0].text == "Please call Stella."
    assert (corpus.sex("p225"), corpus.sex("p226")) == ("F", "M")
    assert any("second microphone" in note for note in corpus.notes)


def test_texts_lie_beside_the_audio_of_libritts(tmp_path: Path) -> None:
    for speaker in ("1", "2"):
        path = write_tone(tmp_path / speaker / "7" / f"{speaker}_7_0.wav")
        path.with_suffix(".normalized.txt").write_text("Two cats.")
        path.with_suffix(".original.txt").write_text("2 cats.")
    assert open_corpus(tmp_path).of_speaker("1")[0].text == "Two cats."


def test_a_written_manifest_opens_as_the_same_corpus(speech: Speech, tmp_path: Path) -> None:
    root = speech({f"s{i}": 2 for i in range(6)})
    before = scan(root, tmp_path / "elsewhere" / "m.jsonl")
    after = open_corpus(tmp_path / "elsewhere" / "m.jsonl")
    assert (before.name, after.name) == ("speech", "m")
    assert after.digest == before.digest
    scan(root)
    assert open_corpus(root).digest == before.digest
    with pytest.raises(UserError, match="exists already"):
        scan(root)


def test_a_manifest_fixes_the_split_when_speakers_come(speech: Speech) -> None:
    before = scan(speech({f"s{i}": 1 for i in range(6)}))
    root = speech({"new": 1})
    assert open_corpus(root).digest == before.digest


def test_a_manifest_can_name_stretches_of_a_long_recording(tmp_path: Path) -> None:
    long = tmp_path / "talk.wav"
    rate = 16000
    soundfile.write(long, np.random.default_rng(0).normal(size=6 * rate).astype(np.float32) * 0.1, rate)
    rows = [
        {"id": "a", "path": "talk.wav", "speaker": "ann", "start": 0.0, "seconds": 2.0},
        {"id": "b", "path": "talk.wav", "speaker": "bob", "start": 2.0, "seconds": 2},
        {"id": "c", "path": "talk.wav", "speaker": "bob", "start": 3.5, "seconds": 1.0},
        {"id": "d", "path": "talk.wav", "speaker": "bob", "start": 5.5, "seconds": 1.0},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = open_corpus(tmp_path / "m.jsonl")
    assert corpus.utterance("b").start == 2.0
    reasons = sorted(reason for _, reason in corpus.skipped)
    assert "ends at 6.00 s" in reasons[0]
    assert "overlaps 'b': 3.500 to 4.500 s, and 2.000 to 4.000 s" in reasons[1]


@given(edges=st.lists(st.integers(1, 40), min_size=2, max_size=12))
def test_stretches_that_touch_do_not_overlap(edges: list[int]) -> None:
    """The end of a stretch, start + seconds, is often a rounding error behind the start of the next one."""
    starts = [sum(edges[:number]) / 10 for number in range(len(edges) + 1)]
    files = CorpusFiles()
    for number, (start, seconds) in enumerate(zip(starts, edges, strict=False)):
        files.candidates.append(Candidate(f"{number}", "talk.wav", "ann", start=start, seconds=seconds / 10))
    usable = _Usable(files)
    usable.add(AudioCheck(seconds / 10, 16000, "same file") for seconds in edges)
    assert not usable.skipped
    assert len(list(usable.utterances())) == len(edges)
    usable.close()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "line 1: not JSON"),
        ('{"path": "a.wav"}', "no 'speaker'"),
        ('{"path": "a.wav", "speaker": "x", "splt": "dev"}', "did you mean 'split'"),
        ('{"path": "a.wav", "speaker": "x", "split": "tests"}', "did you mean 'test'"),
        ('{"path": "a.wav", "speaker": 3}', "speaker is 3; expected text"),
        ('{"path": "a.wav", "speaker": "x", "start": "0"}', "start is '0'; expected a number"),
        ('{"path": "a.wav", "speaker": "x", "sex": "female"}', "expected F, M, or nothing"),
        ("", "is empty"),
    ],
)
def test_a_wrong_manifest_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "m.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=complaint):
        open_corpus(tmp_path / "m.jsonl")


def test_a_file_that_differs_from_its_manifest_is_skipped(speech: Speech) -> None:
    root = speech({"a": 2, "b": 2})
    scan(root)
    write_tone(root / "a" / "a_0.wav", hz=50)
    assert [reason for _, reason in open_corpus(root).skipped] == [
        "is not the file of the manifest: its bytes have changed"
    ]


def test_the_second_look_decodes_nothing(speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    root = speech({"a": 2, "b": 2})
    seen: list[tuple[int, int]] = []
    first = open_corpus(root, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)
    monkeypatch.setattr("snac_runner.data.checks.check_audio", lambda *_: pytest.fail("decoded again"))
    assert open_corpus(root).digest == first.digest


def test_a_damaged_or_unwritable_cache_only_costs_time(
    speech: Speech, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = speech({"a": 1, "b": 1})
    first = open_corpus(root)
    damaged = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.suffix for path in damaged} == {".sqlite", ".safetensors"}
    for file in damaged:
        file.write_text("{")
    assert open_corpus(root).digest == first.digest
    (cache / "a_file").write_text("")
    monkeypatch.setenv("SNAC_CACHE", str(cache / "a_file" / "below"))
    assert open_corpus(root).digest == first.digest


def test_real_speech_opens_fast_and_the_second_time_at_once(librispeech_mini: Path) -> None:
    corpus = open_corpus(librispeech_mini)
    assert {split: len(us) for split, us in corpus.splits.items()} == {"train": 211, "dev": 50, "test": 40}
    assert corpus.sex("3080") == "F"
    assert corpus.skipped == ()
    assert any("one utterance" in note for note in corpus.notes)
    begun = time.perf_counter()
    open_corpus(librispeech_mini)
    assert time.perf_counter() - begun < 1


def test_a_name_that_is_not_utf8_is_skipped_and_ids_are_sorted_as_texts(speech: Speech) -> None:
    root = speech({"ann": 2, "bob": 1})
    for stem in ("é", "\uffee", "\U0001d11e", "caf\udce9"):
        write_tone(root / "new.wav", hz=100 + ord(stem[-1]) % 997).rename(root / "bob" / f"{stem}.wav")
    said: list[str] = []
    corpus = open_corpus(root, dev=0.0, test=0.0, warn=said.append)
    assert said == [f"skipped {root}/bob/caf\\xe9.wav: has a name, or a folder's name, that is not UTF-8: rename it"]
    train = corpus.parts["train"]
    assert len(train) == 6
    assert list(train.ids()) == sorted(train.ids())
    assert all(train.find(id) == train[row] for row, id in enumerate(train.ids()))
    assert open_corpus(root, dev=0.0, test=0.0, warn=said.append).skipped == corpus.skipped


@given(
    st.lists(st.builds(Candidate, st.text(), st.text(), st.text(), seconds=st.none() | st.floats(0, 1e6)), max_size=9)
)
def test_packed_items_are_those_that_were_added(items: list[Candidate]) -> None:
    packed = Packed(Candidate)
    packed.extend(items)
    assert list(packed) == items
    assert packed[:3] == items[:3]
    assert len(packed) == len(items)
