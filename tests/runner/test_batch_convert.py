"""Folders, lists, pipes and formats of conversions."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from small_study import PHASES, contents, full_disk, runner

from snac_core.errors import UserError
from snac_runner.batch_convert import JOURNAL, Outcome, convert_all, jobs_of_sources
from snac_runner.console import Console
from snac_runner.convert import Converter
from snac_runner.data import media
from snac_runner.data.audio import load_audio
from snac_runner.data.media import AudioFormat, decodable
from snac_runner.run_folder import CHECKPOINT


@pytest.fixture
def sources(tmp_path: Path, voices: list[Path]) -> Path:
    """A folder with speech of three kinds at two depths, a text and a silent file."""
    folder = tmp_path / "in"
    (folder / "x" / "y").mkdir(parents=True)
    shutil.copy(voices[0], folder / "x" / "y" / "one.flac")
    samples, rate = soundfile.read(voices[1])
    soundfile.write(folder / "x" / "two.wav", np.stack([samples, 0.8 * samples], 1), rate)
    soundfile.write(folder / "three.mp3", samples[::2], rate // 2)
    (folder / "text.wav").write_text("not audio")
    soundfile.write(folder / "silent.wav", np.zeros(rate), rate)
    return folder


@pytest.fixture
def good_sources(sources: Path) -> Path:
    """The folder without the files that cannot be converted."""
    for bad in ("text.wav", "silent.wav"):
        (sources / bad).unlink()
    return sources


def convert(run: Path, *arguments: object) -> int:
    return runner("convert", "--run", run, *arguments)


def test_a_folder_is_mirrored_and_bad_files_are_named(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(runs[PHASES[2]], "--source", sources, "--target", voices[2], "--out", out) == 2
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == [JOURNAL, "three.wav", "x/two.wav", "x/y/one.wav"]
    shown = capsys.readouterr()
    assert "3 of 5 files converted" in shown.out
    assert "text.wav cannot be decoded" in shown.err
    assert "silent.wav is silent" in shown.err
    assert shown.err.count("channels are averaged") == 1
    # the result of one file does not depend on the folder it lies in
    alone = tmp_path / "alone.wav"
    assert convert(runs[PHASES[2]], "--source", sources / "x" / "two.wav", "--target", voices[2], "--out", alone) == 0
    assert alone.read_bytes() == (out / "x" / "two.wav").read_bytes()


def test_a_stopped_batch_continues_and_nothing_finished_is_written_again(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], good_sources: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = ["--source", good_sources, "--target", voices[2], "--out", out]
    convert_one, calls = Converter.convert, []

    def interrupted(self: Converter, *arguments: object, **options: object) -> list[Path]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return convert_one(self, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Converter, "convert", interrupted)
        assert convert(runs[PHASES[2]], *command) == 130
    assert "give the same command again" in capsys.readouterr().err
    first = contents(out)
    assert len(first) == 2  # a conversion and the journal
    assert convert(runs[PHASES[2]], *command) == 0
    assert "2 of 3 files converted" in capsys.readouterr().out
    done = contents(out)
    assert all(done[name] == first[name] for name in first if name != JOURNAL)
    assert convert(runs[PHASES[2]], *command) == 0
    assert contents(out) == done
    # another target does not overwrite them
    assert convert(runs[PHASES[2]], *command[:2], "--target", voices[3], "--out", out) == 2
    assert "exists and is not the conversion" in capsys.readouterr().err
    assert contents(out) == done


def test_a_stop_before_the_next_line_of_code_loses_no_finished_file(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], good_sources: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["--source", good_sources, "--target", voices[2], "--out", tmp_path / "out"]
    convert_one = Converter.convert

    def stopped(self: Converter, *arguments: object, **options: object) -> None:
        convert_one(self, *arguments, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(Converter, "convert", stopped)
            assert convert(runs[PHASES[2]], *command) == 130
    capsys.readouterr()
    assert convert(runs[PHASES[2]], *command) == 0
    assert "3 were finished" in capsys.readouterr().out


def test_files_that_are_converted_together_are_those_that_each_gives_alone(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], sources: Path
) -> None:
    class Warnings(Console):
        def warning(self, text: str) -> None:
            shown.append(text)

    shown: list[str] = []
    converter = Converter(runs[PHASES[2]], "cpu", console=Warnings())
    folders, outcomes = [tmp_path / "alone", tmp_path / "together"], []
    shutil.copy(sources / "three.mp3", sources / "again.mp3")  # of equal length
    for out, rows in zip(folders, (1, 3), strict=True):
        out.mkdir()
        jobs = jobs_of_sources([str(sources)], [str(voices[2])], out, ".wav")
        outcomes.append(convert_all(jobs, converter, out, AudioFormat(bits=32), rows))
    assert outcomes[0] == outcomes[1] == Outcome(converted=4, failed=2)
    assert len(shown) == 2 * 2, "each bad file is named once"
    for file in folders[0].rglob("*.wav"):
        alone, together = (load_audio(out / file.relative_to(folders[0]), 16000) for out in folders)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_disk_that_is_full_in_the_middle_ends_a_batch_and_keeps_what_is_done(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], good_sources: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = ["--source", good_sources, "--target", voices[2], "--out", out]
    encode, calls = AudioFormat._encode, []

    def filling(self: AudioFormat, path: Path, pieces: Iterable[torch.Tensor], *rest: Any) -> None:
        """The second file cannot grow past 2 kB, as if the disk were full."""
        calls.append(path)
        if len(calls) == 1:
            encode(self, path, pieces, *rest)
            return
        whole = torch.cat(list(pieces))
        with full_disk(2000), monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
            encode(self, path, [whole], *rest)

    with monkeypatch.context() as patch:
        patch.setattr(AudioFormat, "_encode", filling)
        assert convert(runs[PHASES[2]], *command) == 2
    assert "error: No space left on device" in capsys.readouterr().err
    first = contents(out)
    assert len(first) == 2  # a conversion and the journal: nothing half written
    assert convert(runs[PHASES[2]], *command) == 0
    done = contents(out)
    assert len(done) == 4
    assert all(done[name] == first[name] for name in first if name != JOURNAL)


def test_a_list_gives_each_source_its_target(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    for name, voice in zip("abc", voices, strict=False):
        shutil.copy(voice, tmp_path / f"{name}.flac")
    pairs, out = tmp_path / "pairs.csv", tmp_path / "out"
    pairs.write_text("source,target,out\na.flac,b.flac,\na.flac,b.flac;c.flac,sub/both\n")
    assert convert(runs[PHASES[2]], "--pairs", pairs, "--out", out, "--format", "flac") == 0
    one, both = (soundfile.read(out / name)[0] for name in ("a_to_b.flac", "sub/both.flac"))
    assert len(one) == len(both) == soundfile.info(tmp_path / "a.flac").frames
    assert not np.array_equal(one, both)
    command = ["convert", "--run", runs[PHASES[2]], "--pairs", pairs, "--out", out]
    for text, words in (
        ("from,to\na,b\n", "has columns from, to; expected source,target"),
        ("source,target\na.flac,\n", "line 2: source is 'a.flac' and target ''"),
        ("source,target,out\na.flac,b.flac,../../x\n", "lies outside of the output folder"),
    ):
        pairs.write_text(text)
        assert words in refusal(*command)
    pairs.write_text("source,target\n")
    assert "has no conversions" in refusal(*command)
    pairs.write_text("source,target\na.flac,b.flac\n")
    assert "do not give --source" in refusal(*command, "--source", tmp_path / "a.flac")


def test_one_source_is_written_into_a_folder_that_is_there(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    aim = ["--source", voices[0], "--target", voices[1]]
    assert convert(runs[PHASES[1]], *aim, "--out", folder) == 0
    assert convert(runs[PHASES[1]], *aim, "--out", f"{tmp_path}/new/", "--format", ".FLAC") == 0
    names = [f"out/{voices[0].stem}.wav", f"new/{voices[0].stem}.flac"]
    assert all((tmp_path / name).is_file() for name in names)
    command = ["convert", "--run", runs[PHASES[1]]]
    beside = tmp_path / voices[0].name
    shutil.copy(voices[0], beside)
    into_itself = ["--source", beside, "--target", voices[1], "--out", tmp_path, "--format", "flac"]
    assert "is also an input" in refusal(*command, *into_itself)
    assert "different formats" in refusal(*command, *aim, "--out", tmp_path / "a.wav", "--format", "flac")
    assert "takes one source" in refusal(*command, *aim, "--source", voices[2], "--out", "-")
    assert "are both standard input" in refusal(*command, "--source", "-", "--target", "-", "--out", tmp_path / "a.wav")


def test_folders_patterns_and_expanded_patterns_are_the_same_targets(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path]
) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    for number, voice in enumerate(voices[1:4]):
        shutil.copy(voice, folder / f"{number}.flac")
    (tmp_path / "list.txt").write_text("\n".join(f"target/{number}.flac" for number in range(3)))
    ways = [[folder], [folder / "*.flac"], sorted(folder.iterdir()), [tmp_path / "list.txt"]]
    found = []
    for number, names in enumerate(ways):
        out = tmp_path / f"{number}.wav"
        assert convert(runs[PHASES[1]], "--target", *names, "--source", voices[0], "--out", out) == 0
        found.append(out.read_bytes())
    assert len(set(found)) == 1


def test_a_name_that_is_not_utf8_is_refused(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    file = Path(shutil.copy(voices[0], folder / "caf\udce9.flac"))
    reason = "caf\\xe9.flac has a name, or a folder's name, that is not UTF-8: rename it"
    command = ["convert", "--run", runs[PHASES[1]], "--target", voices[1], "--out", tmp_path / "out", "--source"]
    assert reason in refusal(*command, folder)
    assert reason in refusal("evaluate", "--converted", folder, "--target", voices[1], "--source", voices[0].parent)
    single = ["convert", "--run", runs[PHASES[1]], "--target", voices[1], "--out", tmp_path / "out.wav", "--source"]
    assert "not UTF-8" in refusal(*single, file)


def test_stored_embeddings_are_targets(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    converter = Converter(runs[PHASES[1]], "cpu")
    speaker = converter.target([voices[1]]).speaker
    np.save(tmp_path / "e.npy", 3 * speaker[0].numpy())  # the norm does not matter
    save_file({"embedding": speaker}, tmp_path / "e.safetensors")
    for name in ("e.npy", "e.safetensors"):
        assert torch.allclose(converter.target([tmp_path / name]).speaker, speaker, atol=1e-6)
    np.save(tmp_path / "short.npy", np.zeros(3, dtype=np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    command = ["convert", "--run", runs[PHASES[1]], "--source", voices[0], "--out", tmp_path / "c.wav", "--target"]
    assert f"expected finite ({speaker.shape[1]},)" in refusal(*command, tmp_path / "short.npy")
    assert "is not a file with one speaker embedding" in refusal(*command, tmp_path / "objects.npy")
    assert "expected only one of the two" in refusal(*command, tmp_path / "e.npy", voices[0])


@pytest.mark.parametrize("container", ["wav", "ogg"])
def test_standard_input_to_standard_output(
    runs: dict[str, Path], voices: list[Path], capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch, container: str,
) -> None:  # fmt: skip
    samples, rate = soundfile.read(voices[0])
    piped = io.BytesIO()
    soundfile.write(piped, samples, rate, format=container)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.getvalue())))
    assert convert(runs[PHASES[2]], "--source", "-", "--target", voices[1], "--out", "-", "--bits", 24) == 0
    converted, written = soundfile.read(io.BytesIO(capfdbinary.readouterr().out))
    assert written == 16000
    assert len(converted) == len(samples)


@pytest.mark.parametrize(
    ("suffix", "bits", "tolerance"),
    [(".wav", 16, 2**-15), (".wav", 24, 2**-23), (".wav", 32, 0), (".flac", 24, 2**-23)],
)
def test_formats_keep_the_samples_to_their_resolution(tmp_path: Path, suffix: str, bits: int, tolerance: float) -> None:
    audio = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    AudioFormat(suffix, bits).write(tmp_path / f"a{suffix}", audio.split(3000), 44100)
    samples, rate = soundfile.read(tmp_path / f"a{suffix}", dtype="float64")
    assert rate == 44100
    assert np.abs(samples - audio.double().numpy()).max() <= tolerance


@pytest.mark.parametrize("rate", [16000, 44100])
def test_opus_keeps_a_tone_at_any_rate(tmp_path: Path, rate: int) -> None:
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(12 * rate) / rate)
    AudioFormat(".opus").write(tmp_path / "a.opus", tone.split(9999), rate)
    samples, written = soundfile.read(tmp_path / "a.opus")
    assert abs(len(samples) / written - 12) < 0.1
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.fft.rfftfreq(len(samples), 1 / written)[spectrum.argmax()] == pytest.approx(440, abs=1)


def test_rate_and_level_of_the_source_are_kept_on_request(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path]
) -> None:
    samples, rate = soundfile.read(voices[0])
    soundfile.write(tmp_path / "quiet.wav", 0.05 * samples[::2], rate // 2)
    out = tmp_path / "c.wav"
    command = ["--source", tmp_path / "quiet.wav", "--target", voices[1], "--out", out, "--bits", 32]
    assert convert(runs[PHASES[2]], *command, "--keep-rate", "--keep-level") == 0
    converted, written = soundfile.read(out)
    source, _ = soundfile.read(tmp_path / "quiet.wav")
    assert (written, len(converted)) == (rate // 2, len(source))
    power = np.square(converted).mean() / np.square(source).mean()
    assert 10 * np.log10(power) == pytest.approx(0, abs=0.1)


def test_an_m4a_file_is_decoded_or_what_is_missing_is_named(
    tmp_path: Path, voices: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    av = pytest.importorskip("av", reason="writing an m4a file needs PyAV")
    samples, rate = soundfile.read(voices[0], dtype="float32")
    path = tmp_path / "clip.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.rate, queue = rate, av.AudioFifo()
        queue.write(frame)
        parts = iter(lambda: queue.read(1024, partial=True), None)
        for part in [*parts, None]:
            container.mux(stream.encode(part))
    with decodable(path) as decoded:
        found, decoded_rate = soundfile.read(decoded)
    assert decoded_rate == rate
    assert abs(len(found) - len(samples)) <= 4096  # the encoder's delay and padding
    assert np.abs(np.fft.rfft(found[: 4 * rate])).argmax() == pytest.approx(
        np.abs(np.fft.rfft(samples[: 4 * rate])).argmax(), rel=0.05
    )
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(media.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"clip\.m4a needs PyAV or ffmpeg"), decodable(path):
        pass


def test_channels_that_cancel_are_refused_or_warned_about(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    samples, rate = soundfile.read(voices[0])
    for name, other in (("cancel", -samples), ("one", 0 * samples)):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([samples, other], 1), rate)
    command = ["convert", "--run", runs[PHASES[1]], "--target", voices[1], "--out", tmp_path / "c.wav", "--source"]
    assert "they cancel each other" in refusal(*command, tmp_path / "cancel.wav")
    assert runner(*command, tmp_path / "one.wav") == 0
    assert "6 dB below the louder one" in capsys.readouterr().err


def test_a_cut_off_source_is_refused_as_a_target_is(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], refusal: Callable[..., str]
) -> None:
    samples, rate = soundfile.read(voices[0])
    soundfile.write(tmp_path / "cut.wav", samples, rate)
    data = (tmp_path / "cut.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    command = ["convert", "--run", runs[PHASES[1]], "--out", tmp_path / "c.wav"]
    for given in ((tmp_path / "cut.wav", voices[0]), (voices[0], tmp_path / "cut.wav")):
        assert "cut.wav is cut off" in refusal(*command, "--source", given[0], "--target", given[1])


def test_outputs_that_would_be_lost_or_converted_again_are_refused(
    tmp_path: Path, runs: dict[str, Path], voices: list[Path], sources: Path, refusal: Callable[..., str]
) -> None:
    command = ["convert", "--run", runs[PHASES[1]], "--target", voices[0], "--source", sources]
    assert "lies inside --source" in refusal(*command, "--out", sources / "out")
    assert "is a file; expected a folder" in refusal(*command, "--out", sources / "text.wav")
    assert "expected 16 or 24" in refusal(*command, "--out", tmp_path / "o", "--format", "flac", "--bits", 32)
    assert "cannot write .ogg" in refusal(*command, "--out", tmp_path / "o", "--format", "ogg")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no files" in refusal(*command[:-1], empty, "--out", tmp_path / "o")
    same = tmp_path / "same"
    same.mkdir()
    for suffix in (".wav", ".flac"):
        soundfile.write(same / f"a{suffix}", *soundfile.read(voices[1]))
    assert "1 of 2 files were not converted" in refusal(*command[:-1], same, "--out", tmp_path / "o")


def test_an_unfinished_run_says_how_to_continue_and_converts_by_its_checkpoint(
    tmp_path: Path, bench: object, voices: list[Path], refusal: Callable[..., str], finished: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / PHASES[2] / "seed0", run)
    whole = tmp_path / "whole.wav"
    base = json.loads((run / "config.json").read_text())["study"]["base"]
    command = ["convert", "--run", run, "--base", base, "--source", voices[0], "--target", voices[1], "--out"]
    assert runner(*command, whole) == 0
    shutil.rmtree(run / "model")
    message = refusal(*command, tmp_path / "c.wav")
    assert "is at step 2 of 2 and has no finished model" in message
    assert f"runner train --resume {run}" in message
    assert runner(*command, tmp_path / "c.wav", "--checkpoint") == 0
    assert (tmp_path / "c.wav").read_bytes() == whole.read_bytes()
    (run / CHECKPOINT).write_bytes(b"torn")
    assert "is not a complete checkpoint" in refusal(*command, tmp_path / "d.wav", "--checkpoint")
