"""What a corpus can be made of: formats that need a decoder, CSV, long recordings, data sets; and what is not taken."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tones import write_tone

from snac_core.errors import UserError
from snac_runner.cli import main
from snac_runner.data import decode
from snac_runner.data.audio import load_audio, load_stretch
from snac_runner.data.checks import LONG_SECONDS, PIECE_SECONDS, check_audio
from snac_runner.data.decode import has_decoder, seekable
from snac_runner.data.open_corpus import open_corpus, scan
from snac_runner.data.utterances import Utterance

Speech = Callable[..., Path]
needs_decoder = pytest.mark.skipif(not has_decoder(), reason="needs PyAV or ffmpeg")


def write_media(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """An m4a file (AAC), by PyAV."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def test_files_that_cannot_be_decoded_are_counted_by_suffix_with_the_remedy(
    speech: Speech, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("snac_runner.data.formats.has_decoder", lambda: False)
    root = speech({"ann": 2, "bob": 2})
    for number in range(3):
        (root / "ann" / f"{number}.m4a").write_bytes(b"x")
        (root / "bob" / f"{number}.WMA").write_bytes(b"x")
    (root / "bob" / "clip.mp4").write_bytes(b"x")
    (root / "bob" / "samples.raw").write_bytes(b"x")
    (root / "bob" / "notes.txt").write_text("x")
    said: list[str] = []
    assert len(open_corpus(root, warn=said.append).parts["train"]) == 4
    assert said == [
        "3 .m4a files are not taken: decoding needs PyAV or ffmpeg; expected pip install 'snac-conditioning[media]', "
        "or wav, flac, ogg, mp3, opus",
        "1 .mp4 file is" + said[0][16:],
        "1 .raw file is not taken: samples without a header have no sample rate; expected wav or flac, as `ffmpeg -f "
        "s16le -ar 16000 -i a.raw a.wav` writes it (for 16 bits at 16 kHz)",
        "3 .wma files are" + said[0][16:],
    ]
    again: list[str] = []
    open_corpus(root, warn=again.append)
    assert again == said, "also when the corpus comes from the cache"
    with pytest.raises(SystemExit) as ended:
        main(["data", "scan", str(root)])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert " ".join(shown.err.split()).count("files are not taken") == 2
    assert "4 utterances" in shown.out
    for path in root.rglob("*.wav"):
        path.unlink()
    (root / "manifest.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no audio file; 3 \.m4a files are not taken: decoding needs PyAV"):
        open_corpus(root)


@needs_decoder
def test_media_files_are_taken_and_decoded_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = 0.2 * np.sin(2 * np.pi * 300 * np.arange(32000) / 16000)
    for number, speaker in enumerate("ab"):
        write_media(tmp_path / speaker / "x.m4a", samples * (1 - 0.1 * number))
    corpus = open_corpus(tmp_path)
    (utterance,) = corpus.of_speaker("a")
    audio = load_audio(utterance, 16000)[0].numpy()
    spectrum = np.abs(np.fft.rfft(audio[8000:24000]))
    assert spectrum.argmax() == 300
    assert float(np.sqrt(np.mean(audio[8000:24000] ** 2))) == pytest.approx(0.2 / np.sqrt(2), rel=0.02)
    assert len(list((cache / "decoded").rglob("*.flac"))) == 2
    monkeypatch.setattr(decode, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load_stretch(utterance, 16000, 100, 500), torch.from_numpy(audio[None, 100:600]))


def aiff_speech(root: Path) -> Path:
    """Two speakers in a format that the corpus decodes while it checks the files."""
    for hz, speaker in ((200, "ann"), (300, "bob")):
        path = write_tone(root / speaker / "x.wav", hz=hz)
        soundfile.write(path.with_suffix(".aiff"), soundfile.read(path)[0], 16000)
        path.unlink()
    return root


def test_a_full_disk_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = aiff_speech(tmp_path / "speech")
    monkeypatch.setattr(decode, "AUDIO_SUFFIXES", (*decode.AUDIO_SUFFIXES, ".aiff"))  # by libsndfile
    monkeypatch.setattr("snac_runner.data.formats.has_decoder", lambda: True)

    def full(*_: object) -> None:
        raise soundfile.LibsndfileError(2)

    with monkeypatch.context() as disk:
        disk.setattr(soundfile.SoundFile, "write", full)
        with pytest.raises(UserError, match=r"cannot write what is decoded of .*\(\d+ MB free\)"):
            open_corpus(root)
    assert len(open_corpus(root).parts["train"]) == 2


def test_a_decoder_that_is_installed_later_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = aiff_speech(tmp_path) / "list.csv"
    manifest.write_text("path,speaker\nann/x.aiff,ann\nbob/x.aiff,bob\n")
    for module in ("checks", "decode", "open_corpus"):
        monkeypatch.setattr(f"snac_runner.data.{module}.has_decoder", lambda: False)
    with pytest.raises(UserError, match="needs PyAV or ffmpeg"):
        open_corpus(manifest)
    for module in ("checks", "open_corpus"):
        monkeypatch.setattr(f"snac_runner.data.{module}.has_decoder", lambda: True)
    monkeypatch.setattr(decode, "AUDIO_SUFFIXES", (*decode.AUDIO_SUFFIXES, ".aiff"))
    assert len(open_corpus(manifest).parts["train"]) == 2


@pytest.mark.parametrize("suffix", [".ogg", ".mp3", ".opus"])
def test_formats_without_seeking_are_decoded_once(tmp_path: Path, suffix: str) -> None:
    rate = 24000
    path = tmp_path / f"x{suffix}"
    noise = np.random.default_rng(0).normal(size=3 * rate) * 0.1
    kind = {".ogg": ("OGG", "VORBIS"), ".mp3": ("MP3", "MPEG_LAYER_III"), ".opus": ("OGG", "OPUS")}[suffix]
    soundfile.write(path, noise, rate, format=kind[0], subtype=kind[1])
    check = check_audio(path)
    utterance = Utterance("x", path, "a", check.seconds, check.sample_rate, digest=check.digest)
    copy = seekable(path, check.digest)
    assert copy.suffix == ".flac"
    assert seekable(path, check.digest) == copy
    plain = load_audio(path, rate)
    assert load_audio(utterance, rate).shape == plain.shape
    assert float((load_audio(utterance, rate) - plain).abs().max()) < 2e-5, "16 bits"


@settings(max_examples=40, deadline=None)
@example(rate=16000, target=24000, start=0.0078125, first=14382, count=14231)  # ends at half a sample
@given(
    rate=st.sampled_from([8000, 16000, 22050, 24000, 44100, 48000]),
    target=st.sampled_from([16000, 24000, 44100]),
    start=st.floats(0, 0.5),
    first=st.integers(0, 30_000),
    count=st.integers(1, 20_000),
)
def test_a_stretch_is_that_part_of_the_whole(rate: int, target: int, start: float, first: int, count: int) -> None:
    path = Path(soundfile_of(rate))
    seconds = round((1.2 - start) * rate) / rate
    utterance = Utterance("x", path, "a", seconds, rate, round(start * rate) / rate, digest="0")
    whole = load_audio(utterance, target)[:, first : first + count]
    part = load_stretch(utterance, target, first, count)
    assert part.shape == whole.shape
    assert torch.allclose(part, whole, atol=1e-6)


_FOLDER: list[Path] = []


def soundfile_of(rate: int) -> str:
    """A file of noise of 1.2 s, made once."""
    if not _FOLDER:
        import tempfile

        _FOLDER.append(Path(tempfile.mkdtemp()))
    path = _FOLDER[0] / f"{rate}.wav"
    if not path.is_file():
        soundfile.write(path, np.random.default_rng(rate).normal(size=round(1.2 * rate)) * 0.1, rate, subtype="FLOAT")
    return str(path)


def speech_with_pauses(seconds: float, rate: int, seed: int) -> np.ndarray:
    """Noise in phrases of 1 to 4 s, with pauses of 0.4 s at -50 dB between them."""
    draw = np.random.default_rng(seed)
    level = np.full(round(seconds * rate), 0.1)
    place = 0.0
    while place < seconds:
        place += draw.uniform(1, 4)
        level[round(place * rate) : round((place + 0.4) * rate)] = 3e-4
        place += 0.4
    return draw.normal(size=len(level)) * level


def test_long_recordings_are_cut_at_pauses(tmp_path: Path) -> None:
    rate = 8000
    for number, speaker in enumerate("ab"):
        (tmp_path / speaker).mkdir()
        samples = speech_with_pauses(400, rate, number)
        if speaker == "b":
            samples[100 * rate : 200 * rate] = 0
        soundfile.write(tmp_path / speaker / "talk.wav", samples, rate)
        (tmp_path / speaker / "talk.txt").write_text("the text of all of it")
    write_tone(tmp_path / "a" / "short.wav", seconds=LONG_SECONDS - 1, rate=rate)
    corpus = open_corpus(tmp_path)
    pieces = [u for u in corpus.of_speaker("a") if "@" in u.id]
    assert [u.start for u in pieces] == sorted(u.start for u in pieces)
    assert sum(u.seconds for u in pieces) == pytest.approx(400), "nothing is lost"
    for u, following in zip(pieces, [*pieces[1:], None], strict=True):
        assert following is None or u.start + u.seconds == pytest.approx(following.start)
        assert PIECE_SECONDS[0] - 1e-6 <= u.seconds <= PIECE_SECONDS[1] + 1e-6
        assert u.text is None
        edge = load_audio(u, rate)[0, -400:]
        assert following is None or float(edge.square().mean().sqrt()) < 1e-3, "a cut is in a pause"
        assert float(load_audio(u, rate).square().mean().sqrt()) == pytest.approx(u.level, rel=0.01)
    kept = [(u.start, u.start + u.seconds) for u in corpus.of_speaker("b")]
    assert all(end <= 125 or start >= 175 for start, end in kept), "silence is left out"
    assert [u.id for u in corpus.of_speaker("a") if "@" not in u.id] == ["a/short"]
    assert "2 files of more than 60 s were cut at pauses" in corpus.notes[0]
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    assert open_corpus(tmp_path.with_name("copy")).digest == corpus.digest
    scan(tmp_path)
    written = open_corpus(tmp_path)
    assert not written.skipped
    assert written.digest == corpus.digest, "also where it is read from the manifest"


def test_a_csv_file_is_a_manifest(speech: Speech, tmp_path: Path) -> None:
    root = speech({"ann": 2, "bob": 1})
    lines = ["path,speaker,text,split,start"]
    lines += [f'{p.relative_to(root)},{p.parent.name},"one, two",,0.1' for p in sorted(root.rglob("*.wav"))]
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    corpus = open_corpus(root / "list.csv")
    assert [u.text for u in corpus.of_speaker("ann")] == ["one, two"] * 2
    assert corpus.of_speaker("bob")[0].seconds == pytest.approx(0.9)
    for bad, message in {
        "path,speaker\na.wav": "line 2: no 'speaker'",
        "path,speakr\na.wav,ann": "line 2: unknown key 'speakr'; did you mean 'speaker'",
        "path,speaker,text\na.wav,ann,one, two": "line 2: more cells than columns",
        "path,speaker,start\na.wav,ann,soon": "line 2: start is 'soon'; expected a number",
        "path,speaker\n": "is empty",
    }.items():
        (root / "bad.csv").write_text(bad)
        with pytest.raises(UserError, match=message):
            open_corpus(root / "bad.csv")


def test_a_corpus_is_stored_once_and_read_again_until_a_file_changes(
    speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = speech({"ann": 2, "bob": 2})
    (root / "ann" / "ann_0.txt").write_text("one")
    first = open_corpus(root)
    with monkeypatch.context() as patch:
        patch.setattr("snac_runner.data.open_corpus.find_files", lambda _: pytest.fail("looked for files again"))
        again = open_corpus(root)
        assert list(again.parts["train"]) == list(first.parts["train"])
        assert (again.digest, again.notes, again.name) == (first.digest, first.notes, first.name)
        patch.chdir(root.parent)
        assert open_corpus(root.name).digest == first.digest
    write_tone(root / "bob" / "bob_1.wav", hz=77)
    (root / "ann" / "ann_0.txt").write_text("two")
    changed = open_corpus(root)
    assert changed.digest != first.digest
    assert changed.of_speaker("ann")[0].text == "two"
    rows = [{"path": str(p.relative_to(root)), "speaker": p.parent.name} for p in sorted(root.rglob("*.wav"))]
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = open_corpus(root / "m.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("snac_runner.data.open_corpus.read_manifest", lambda _: pytest.fail("read again"))
        assert open_corpus(root / "m.jsonl").digest == listed.digest
        write_tone(root / "bob" / "bob_1.wav", hz=78)
        with pytest.raises(pytest.fail.Exception):
            open_corpus(root / "m.jsonl")


def test_an_interrupted_scan_continues(speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    root = speech({"ann": 3, "bob": 3}, seconds=0.6)
    monkeypatch.setattr("snac_runner.data.checks._FILES_AT_ONCE", 2)
    seen: list[int] = []

    def interrupt(done: int, _total: int) -> None:
        seen.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_corpus(root, progress=interrupt)
    seen.clear()
    assert len(open_corpus(root, progress=lambda done, _: seen.append(done)).parts["train"]) == 6
    assert seen == [3, 4, 5, 6], "the first two are known"


def saved_dataset(folder: Path, speakers: dict[str, str], *, split: str = "train", names: bool = True) -> Any:
    """Rows of tones: `{"0": "ann"}` has one row by ann."""
    datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")
    import pyarrow

    tones = [write_tone(folder / "tones" / f"{split}{number}.wav").read_bytes() for number in speakers]
    audio = [{"bytes": tone, "path": f"{n}.wav" if names else None} for n, tone in zip(speakers, tones, strict=True)]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {
        "audio": pyarrow.array(audio, kind),
        "speaker_id": list(speakers.values()),
        "text": [f"text {n}" for n in speakers],
    }
    return datasets.Dataset(pyarrow.table(columns)).cast_column("audio", datasets.Audio())


def test_a_saved_data_set_is_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = saved_dataset(tmp_path, {"0": "ann", "1": "ann", "2": "bob", "3": "cid"}, names=False)
    part.save_to_disk(tmp_path / "saved")
    corpus = open_corpus(tmp_path / "saved")
    assert corpus.speakers("train") == ["ann", "bob", "cid"]
    assert [u.text for u in corpus.of_speaker("ann")] == ["text 0", "text 1"]
    tone, _ = soundfile.read(tmp_path / "tones" / "train2.wav", dtype="float32")
    assert np.array_equal(load_audio(corpus.of_speaker("bob")[0], 16000)[0].numpy(), tone)
    monkeypatch.setattr("snac_runner.data.hugging_face._rows", lambda *_: pytest.fail("exported again"))
    assert open_corpus(f"hf:{tmp_path / 'saved'}?text=text").digest == corpus.digest
    with pytest.raises(SystemExit):
        main(["data", "scan", f"hf:{tmp_path / 'saved'}", "--out", str(tmp_path / "m.jsonl")])
    assert "3 speakers, 4 utterances" in capsys.readouterr().out


def test_the_splits_of_a_data_set_count_if_no_speaker_is_in_two(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")
    train = saved_dataset(tmp_path, {"0": "ann", "1": "bob"})
    other = saved_dataset(tmp_path, {"0": "cid", "1": "dan"}, split="test")
    same = saved_dataset(tmp_path, {"0": "ann", "1": "dan"}, split="validation")
    datasets.DatasetDict(train=train, test=other).save_to_disk(tmp_path / "disjoint")
    corpus = open_corpus(tmp_path / "disjoint", dev=0.0)
    assert [corpus.speakers(split) for split in ("train", "test")] == [["ann", "bob"], ["cid", "dan"]]
    datasets.DatasetDict(train=train, validation=same).save_to_disk(tmp_path / "shared")
    assert open_corpus(tmp_path / "shared", dev=0.0, test=0.0).speakers("train") == ["ann", "bob", "dan"]
    assert open_corpus(f"hf:{tmp_path / 'shared'}?split=validation").speakers("train") == ["ann", "dan"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?speaker=speakr_id", "no column 'speakr_id'; did you mean 'speaker_id'"),
        ("?audio=text", "column 'text' of .* has no audio; expected one of audio"),
        ("?split=tests", "no split 'tests'; known: train"),
        ("?columns=3", "unknown option 'columns'; known: audio, config"),
    ],
)
def test_a_wrong_option_of_a_data_set_is_an_error(tmp_path: Path, options: str, message: str) -> None:
    saved_dataset(tmp_path, {"0": "ann", "1": "bob"}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=message):
        open_corpus(f"hf:{tmp_path / 'saved'}{options}")


def test_a_data_set_that_does_not_exist_or_names_no_speaker_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")
    saved_dataset(tmp_path, {"0": "ann"}).rename_column("speaker_id", "who").save_to_disk(tmp_path / "s")
    with pytest.raises(UserError, match=r"no column of speaker that is known; its columns are audio, who, text"):
        open_corpus(tmp_path / "s")
    with pytest.raises(UserError, match="names no data set"):
        open_corpus("hf:")

    def missing(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("x")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    monkeypatch.setattr(
        "huggingface_hub.list_datasets", lambda **_: [type("Info", (), {"id": "openslr/librispeech_asr"})]
    )
    with pytest.raises(UserError, match=r"no data set 'openslr/librispech'.*did you mean openslr/librispeech_asr\?"):
        open_corpus("hf:openslr/librispech")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets library; expected pip install"):
        open_corpus("hf:openslr/librispeech_asr")
