"""A bank holds what training computes, bit for bit, however it came about; and only new audio is embedded."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from small_study import Bench, runner

from snac_core.errors import UserError
from snac_core.speakers.bank import open_bank
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.bank_build import EncoderSpec, Job, build_bank
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus, Segment, Utterance, Utterances
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.references import References, whole_segment
from snac_runner.embeddings import bank_folder, mean_embedding, segment_embedding, speaker_embeddings

ENCODER = '''
import os
import time

import torch
from torch import nn

from snac_core import hookimpl
from snac_core.speakers import SpeakerEncoder


class Slow(SpeakerEncoder):
    """Four band energies; logs to a file each segment that it embeds."""

    name, family, training_data = "slow", "slow", "none"

    def __init__(self, weights=None):
        super().__init__()
        self.dim, self.sample_rate = 4, 16000
        self.scale = nn.Parameter(torch.ones(1))
        self.freeze()

    def embed(self, audio):
        if "EMBED_LOG" in os.environ:
            with open(os.environ["EMBED_LOG"], "a") as file:
                file.write(f"{os.getpid()} {audio.shape[-1]}\\n")
            time.sleep(float(os.environ["SECONDS"]))
        if os.environ.get("BROKEN") == str(audio.shape[-1]):
            return audio[:, :4] * float("nan")
        power = torch.fft.rfft(audio).abs()[:, :4000]
        return self.scale * torch.stack([part.mean(1) for part in power.chunk(4, dim=1)], dim=1)


@hookimpl
def register_speaker_encoders(register):
    register(Slow)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "slow.py"
    path.write_text(ENCODER)
    return path


@pytest.fixture
def embedded_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of the segments that the slow encoder embeds."""
    path = tmp_path / "embedded.txt"
    path.touch()
    monkeypatch.setenv("EMBED_LOG", str(path))
    monkeypatch.setenv("SECONDS", "0")
    return path


def source(plugin: Path) -> EncoderSpec:
    return EncoderSpec("slow", plugins=(str(plugin),))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def noise(path: Path, seconds: float, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * torch.randn(round(16000 * seconds), generator=torch.Generator().manual_seed(seed))
    soundfile.write(path, samples.numpy(), 16000)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Three train speakers with four utterances, one long among them; two dev speakers with one utterance."""
    for number, speaker in enumerate("abc"):
        for take in range(4):
            noise(
                tmp_path / "speech" / "train" / speaker / f"{take}.wav",
                9.5 if take == 2 else 1.1 + 0.1 * number,
                10 * number + take,
            )
    for number, speaker in enumerate("de"):
        noise(tmp_path / "speech" / "dev" / speaker / "0.wav", 2.3, 100 + number)
    return tmp_path / "speech"


def test_a_bank_holds_bit_for_bit_what_training_computes(bench: Bench, tmp_path: Path) -> None:
    corpus, encoder = open_corpus(bench.speech), load_speaker_encoder("ecapa_tiny")
    bank = build_bank(corpus, tmp_path / "bank", EncoderSpec("ecapa_tiny"), workers=1).bank
    resources = bench.resources(bench.study(speaker_encoder="ecapa_tiny"))
    vars(resources).pop("speaker_encoder")
    vars(resources).pop("table")
    trained = resources.table
    first, last = bank.header.speaker_splits["train"]
    assert tuple(bank.names[first:last]) == trained.names
    assert bank.header.encoder_digest == trained.encoder
    assert np.array_equal(bank.conditioning[first:last], trained.conditioning.numpy())
    assert np.array_equal(bank.reference[first:last], trained.reference.numpy())
    rows = {u: row for row, u in enumerate(bank.ids)}
    for utterance in corpus.split("train")[:5]:
        wave = load_audio(utterance, encoder.sample_rate, seconds=whole_segment(utterance).seconds)
        row = torch.from_numpy(np.array(bank.embeddings[rows[utterance.id]]))
        assert torch.equal(row, mean_embedding(encoder, [wave]))


def test_training_reads_the_bank_where_several_parts_of_a_speaker_are_one_segment(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache"))
    corpus, encoder = open_corpus(bench.speech), load_speaker_encoder("ecapa_tiny")
    resources = bench.resources(bench.study(speaker_encoder="ecapa_tiny"))
    vars(resources).pop("speaker_encoder")
    vars(resources).pop("table")
    computed = resources.table
    for path in (tmp_path / "cache" / "embeddings").iterdir():
        path.unlink()
    build_bank(corpus, bank_folder(corpus, encoder), EncoderSpec("ecapa_tiny"), workers=1)
    del resources.table
    assert torch.equal(resources.table.parts, computed.parts)
    assert any(len(set(map(tuple, parts.tolist()))) < len(parts) for parts in computed.parts), "some parts coincide"


def test_the_number_of_threads_changes_no_bit(bench: Bench) -> None:
    corpus, encoder = open_corpus(bench.speech), load_speaker_encoder("ecapa_tiny")
    utterance = corpus.split("train")[0]
    embeddings = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        embeddings.append(segment_embedding(encoder, utterance, whole_segment(utterance)))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    assert torch.equal(*embeddings)


def test_training_reads_the_bank_instead_of_the_audio(
    speech: Path, plugin: Path, embedded_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache"))
    corpus, encoder = open_corpus(speech), source(plugin).load()
    references = References(corpus, "train")
    segments = {speaker: references.scoring(speaker) for speaker in references.speakers}
    computed = speaker_embeddings(corpus, segments, encoder)
    shutil.rmtree(tmp_path / "cache" / "embeddings")
    build_bank(corpus, bank_folder(corpus, encoder), source(plugin), workers=1)
    embedded_log.write_text("")
    read = speaker_embeddings(corpus, segments, encoder)
    assert lines(embedded_log) == []
    assert all(torch.equal(read[speaker], computed[speaker]) for speaker in segments)


def test_a_stretch_of_a_recording_is_embedded_again_where_it_begins_elsewhere(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache"))
    noise = np.random.default_rng(0).normal(size=64000)
    soundfile.write(tmp_path / "talk.wav", noise * np.linspace(0.1, 0.3, 64000), 16000)
    soundfile.write(tmp_path / "b.wav", 0.1 * noise, 16000)
    encoder, found = source(plugin).load(), []
    for start in (0.0, 1.0):
        rows = [
            {"id": "a", "path": "talk.wav", "speaker": "ann", "start": start, "seconds": 1.0},
            {"id": "b", "path": "b.wav", "speaker": "bob"},
        ]
        (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
        corpus = open_corpus(tmp_path / "m.jsonl")
        segments = {"ann": [Segment("a", 0.0, 1.0)]}
        found.append(speaker_embeddings(corpus, segments, encoder)["ann"])
        assert torch.equal(found[-1], segment_embedding(encoder, corpus.utterance("a"), segments["ann"][0]))
    assert not torch.equal(*found)


def test_a_speaker_with_one_utterance_conditions_and_scores_with_its_halves(
    speech: Path, plugin: Path, tmp_path: Path
) -> None:
    corpus, encoder = open_corpus(speech), source(plugin).load()
    bank = build_bank(corpus, tmp_path / "bank", source(plugin), workers=1).bank
    row = bank.header.speaker_splits["dev"][0]
    wave = load_audio(corpus.of_speaker("d")[0], 16000)
    half = round(1.15 * 16000)
    assert np.array_equal(bank.conditioning[row], mean_embedding(encoder, [wave[:, :half]]).numpy())
    assert np.array_equal(bank.reference[row], mean_embedding(encoder, [wave[:, half:]]).numpy())


def test_only_new_files_are_embedded_and_the_result_is_that_of_a_fresh_build(
    speech: Path, plugin: Path, embedded_log: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bank"
    build_bank(open_corpus(speech), folder, source(plugin), workers=1)
    embedded_log.write_text("")
    again = build_bank(open_corpus(speech), folder, source(plugin), workers=1)
    assert (lines(embedded_log), again.embedded) == ([], 0)
    noise(speech / "train" / "b" / "9.wav", 1.77, 77)
    (speech / "train" / "a" / "0.wav").unlink()
    more = build_bank(open_corpus(speech), folder, source(plugin), workers=1)
    assert [line.split()[1] for line in lines(embedded_log)] == [str(round(1.77 * 16000))]
    assert (more.embedded, len(more.bank)) == (1, 14)
    fresh = build_bank(open_corpus(speech), tmp_path / "fresh", source(plugin), workers=1)
    assert files(folder) == files(fresh.bank.folder)


def test_a_killed_build_continues_and_ends_identical(
    bench: Bench, plugin: Path, embedded_log: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bank"
    command = [
        sys.executable,
        "-c",
        "from snac_runner.cli import main; main()",
        "index",
        "build",
        "--data",
        str(bench.speech),
    ]
    command += ["--encoder", "slow", "--plugin", str(plugin), "--out", str(folder), "--workers", "1"]
    process = subprocess.Popen(  # one worker: two would end their halves at the same time, with nothing left to do
        command, env={**os.environ, "SECONDS": "0.1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    started = time.monotonic()
    while not any(path.stat().st_size for path in folder.glob("partial-*/embeddings.bin")):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() - started < 120
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "bank.json").exists()
    for pid in {int(line.split()[0]) for line in lines(embedded_log)}:
        _wait_for_the_end_of(pid)
    embedded_log.write_text("")
    resumed = build_bank(open_corpus(bench.speech), folder, source(plugin), workers=1)
    assert resumed.reused >= 16
    assert len(lines(embedded_log)) == resumed.embedded > 0
    whole = build_bank(open_corpus(bench.speech), tmp_path / "whole", source(plugin), workers=1)
    assert files(folder) == files(whole.bank.folder)
    assert not list(folder.glob("partial-*"))


def _wait_for_the_end_of(pid: int) -> None:
    """A worker does not outlive a parent that was killed."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"worker {pid} is still there")


def test_a_folder_with_another_encoders_bank_is_refused(speech: Path, plugin: Path, tmp_path: Path) -> None:
    built = build_bank(open_corpus(speech), tmp_path / "bank", source(plugin), workers=1)
    before = files(built.bank.folder)
    with pytest.raises(UserError, match=r"is a bank of speaker encoder 'slow' .*expected 'ecapa_tiny'"):
        build_bank(open_corpus(speech), tmp_path / "bank", EncoderSpec("ecapa_tiny"), workers=1)
    assert files(built.bank.folder) == before


def test_two_builds_of_one_bank_do_not_write_at_the_same_time(speech: Path, plugin: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="needs POSIX locks")
    (tmp_path / "bank").mkdir()
    with (tmp_path / "bank" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is building the bank"):
            build_bank(open_corpus(speech), tmp_path / "bank", source(plugin), workers=1)


def test_an_encoder_that_gives_nan_names_the_file_and_keeps_what_is_done(
    speech: Path, plugin: Path, embedded_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN", str(round(1.3 * 16000)))
    with pytest.raises(UserError, match=r"'slow' returns NaN or infinite values for .*/c/0\.wav; exclude the file"):
        build_bank(open_corpus(speech), tmp_path / "bank", source(plugin), workers=1)
    assert not (tmp_path / "bank" / "bank.json").exists()


def test_a_full_disk_ends_a_build_with_a_sentence_and_the_next_one_continues(
    speech: Path, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of mapped files, space is reserved before they are written: the first write would end in a signal."""
    options = ["--data", speech, "--encoder", "slow", "--plugin", plugin, "--out", tmp_path / "bank", "--workers", 1]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    unnumbered = OSError("12800 requested and 4064 written")  # as numpy raises it
    for module, name, error in ((os, "posix_fallocate", full), (np, "save", unnumbered)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, Mock(side_effect=error))
            assert runner("index", "build", *options) == 2
        assert "error: No space left on device" in capsys.readouterr().err
    assert runner("index", "build", *options) == 0
    assert "embedded: 0; reused: 18" in capsys.readouterr().out


def test_the_command_builds_shows_and_refuses_what_is_stale(
    speech: Path, plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", speech, "--encoder", "slow", "--plugin", plugin, "--out", tmp_path / "bank"]
    assert runner("index", "show", *options) == 2
    assert "make one with `runner index build`" in capsys.readouterr().err
    assert runner("index", "build", *options) == 0
    output = capsys.readouterr().out
    assert "embedded: 18; reused: 0" in output, "14 utterances, and the halves of two single ones"
    assert "14 utterances, 5 speakers, 4 dimensions by slow" in output
    assert "index: Flat" in output
    assert "recall@100 1.000, built in" in output
    assert runner("index", "show", *options) == 0
    noise(speech / "train" / "c" / "new.wav", 1.5, 5)
    capsys.readouterr()
    assert runner("index", "show", *options) == 2
    assert "is stale: it was made of other audio" in capsys.readouterr().err
    assert runner("index", "build", *options) == 0
    assert "embedded: 1; reused: 14" in capsys.readouterr().out
    assert len(open_bank(tmp_path / "bank")) == 15


def test_a_build_holds_few_utterances_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [(f"s{n // 50:02d}", n) for n in range(2000)]
    many = (Utterance(f"{s}/{n:04d}", tmp_path / "none.wav", s, 2.0, 16000, digest=f"{n:064x}") for s, n in names)
    corpus = Corpus(tmp_path, "many", {"train": Utterances.of(many, tmp_path)})
    calls = most = 0

    def embedded(encoder: SpeakerEncoder, jobs: Sequence[Job]) -> NDArray[np.float32]:
        nonlocal calls, most
        calls += 1
        if calls % 40 == 0:
            most = max(most, sum(type(one) is Utterance for one in gc.get_objects()))
        values = np.zeros((len(jobs), encoder.dim), np.float32)
        values[np.arange(len(jobs)), [int(utterance.digest, 16) % encoder.dim for utterance, _ in jobs]] = 1
        return values

    monkeypatch.setattr("snac_runner.bank_build._embed", embedded)
    bank = build_bank(corpus, tmp_path / "bank", EncoderSpec("simple"), workers=1).bank
    assert np.array_equal(bank.embeddings.argmax(1), np.arange(2000) % bank.header.dim)
    assert bank.ids == [utterance.id for utterance in corpus.split("train")]
    assert 0 < most < 100


def test_records_that_a_loss_of_power_has_left_are_embedded_again(
    speech: Path, plugin: Path, embedded_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, corpus = tmp_path / "bank", open_corpus(speech)
    with monkeypatch.context() as patch:
        patch.setattr("snac_runner.bank_build.write_bank", lambda *_, **__: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            build_bank(corpus, folder, source(plugin), workers=1)
    (file,) = folder.glob("partial-*/embeddings.bin")
    data = bytearray(file.read_bytes())
    size = 32 + 4 * 4  # a key and four numbers
    data[size + 32 : 2 * size] = bytes(16)  # the second embedding was not written
    file.write_bytes(data[:-7])  # nor the end of the last record
    embedded_log.write_text("")
    resumed = build_bank(corpus, folder, source(plugin), workers=1)
    assert (len(lines(embedded_log)), resumed.embedded) == (2, 2)
    whole = build_bank(corpus, tmp_path / "whole", source(plugin), workers=1)
    assert files(folder) == files(whole.bank.folder)
