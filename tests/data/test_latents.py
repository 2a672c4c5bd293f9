"""The latent cache holds what the encoder computes on whole utterances, whoever builds it, and after damage."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snac_core.augment import long_term_envelope
from snac_core.codec import SNAC
from snac_core.codec.streaming import encoder_context
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.testing.fixtures import ToySpeakerEncoder
from snac_runner.data import latents as module
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus, Utterance
from snac_runner.data.crops import CropLoader
from snac_runner.data.latents import ImitationCache, LatentCache
from snac_runner.data.loading import PrefetchingLoader
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.utterances import Utterances

CODEC = {"sampling_rate": 16000, "encoder_dim": 4, "encoder_rates": [4, 5], "decoder_dim": 64, "decoder_rates": [5, 4],
         "attn_window_size": None, "codebook_size": 32, "codebook_dim": 4, "vq_strides": [4, 2, 1]}  # fmt: skip
HOP = 20
CROP = 11200  # a whole number of units: 80 samples, with attention 160


@pytest.fixture(params=[None, 8], ids=["without attention", "with attention"])
def codec(request: pytest.FixtureRequest) -> SNAC:
    torch.manual_seed(0)
    return SNAC(**{**CODEC, "encoder_dim": 16, "attn_window_size": request.param}).freeze()


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Noise: unlike a tone, no two frames are equal. The last utterance is shorter than a crop."""
    for number, seconds in enumerate([0.9, 1.4, 1.1, 0.53]):
        place = tmp_path / "speech" / "ab"[number % 2] / f"{number}.wav"
        place.parent.mkdir(parents=True, exist_ok=True)
        samples = 0.1 * torch.randn(round(seconds * 16000), generator=generator(number))
        soundfile.write(place, samples.numpy(), 16000)
    return open_corpus(tmp_path / "speech", dev=0.0, test=0.0)


def cache_of(corpus: Corpus, codec: SNAC) -> LatentCache:
    return LatentCache(corpus.split("train"), codec, CROP)


def encoded(codec: SNAC, audio: torch.Tensor) -> torch.Tensor:
    """The latent (C, F) of audio (1, T)."""
    with torch.no_grad():
        return codec.advance(codec.preprocess(audio.unsqueeze(0)), None, "latent")[0]


def test_a_crop_has_the_frames_of_its_utterance_and_those_of_the_crop_alone_but_at_its_ends(
    corpus: Corpus, codec: SNAC
) -> None:
    loader = CropLoader(corpus, "train", 16000, CROP / 16000, 2, 0, latents=cache_of(corpus, codec))
    context = encoder_context(ConditionedCodec(codec))
    ends = [int(units) * context.unit // HOP for units in (context.before, context.after)]
    inner = slice(ends[0], CROP // HOP - ends[1])
    assert inner.stop - inner.start > 100
    for step in range(6):
        batch = loader.at(step)
        assert batch.latents is not None
        assert batch.latents.shape == (2, 64, CROP // HOP)
        for row, name in enumerate(batch.utterances):
            first = round(batch.starts[row] * 16000) / HOP
            assert first == int(first), "crops start at whole frames"
            whole = load_audio(corpus.utterance(name), 16000)
            padded = torch.nn.functional.pad(whole, (0, CROP))
            cut = encoded(codec, padded)[:, int(first) : int(first) + CROP // HOP]
            # audio of other lengths: kernels of some CPUs round differently
            torch.testing.assert_close(batch.latents[row], cut, rtol=1e-4, atol=1e-5)
            if codec.attn_window_size is None or first % codec.attn_window_size == 0:
                alone = encoded(codec, batch.audio[row])
                torch.testing.assert_close(batch.latents[row, :, inner], alone[:, inner], rtol=1e-4, atol=1e-5)
            if first == 0 and whole.shape[-1] <= CROP:
                of_crop = encoded(codec, batch.audio[row])  # the crop is the whole
                torch.testing.assert_close(batch.latents[row], of_crop, rtol=1e-4, atol=1e-5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(start=st.integers(0, 100), crop=st.integers(9000, 20000))
def test_a_crop_of_any_length_has_as_many_frames_as_its_padded_audio(corpus: Corpus, start: int, crop: int) -> None:
    torch.manual_seed(0)
    codec = SNAC(**CODEC).freeze()
    utterance = corpus.split("train")[0]
    last = max(0, round(utterance.seconds * 16000) - crop) // HOP
    latent = LatentCache(corpus.split("train"), codec, crop).at(utterance, HOP * min(start, last))
    assert latent.shape[-1] == codec.preprocess(torch.zeros(1, 1, crop)).shape[-1] // HOP


def test_long_utterances_are_encoded_in_windows(corpus: Corpus, codec: SNAC, monkeypatch: pytest.MonkeyPatch) -> None:
    utterance = max(corpus.split("train"), key=lambda u: u.seconds)
    whole = cache_of(corpus, codec).at(utterance, 0)
    monkeypatch.setattr(module, "CHUNK_SECONDS", 0.2)
    torch.testing.assert_close(cache_of(corpus, codec).at(utterance, 0), whole, rtol=1e-4, atol=1e-5)


def contents(cache: LatentCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


def test_what_was_built_is_kept_and_what_is_missing_is_built(corpus: Corpus, codec: SNAC) -> None:
    cache = cache_of(corpus, codec)
    calls: list[tuple[int, int]] = []
    cache.build(lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)], "a shard for each speaker"
    built = contents(cache)
    assert sum(map(len, built.values())) == pytest.approx(cache.size, rel=0.1)
    next(cache.folder.iterdir()).unlink()
    cache.build(lambda done, total: calls.append((done, total)))
    assert calls[2:] == [(1, 1)]
    cache.build(lambda done, total: calls.append((done, total)))
    assert len(calls) == 3
    assert contents(cache) == built


def test_other_weights_other_audio_and_a_longer_crop_have_other_entries(corpus: Corpus, codec: SNAC) -> None:
    cache = cache_of(corpus, codec)
    cache.build()
    with torch.no_grad():
        codec.quantizer.quantizers[0].codebook.weight += 1
    assert cache_of(corpus, codec).folder != cache.folder
    utterances = corpus.split("train")
    louder = Utterance(**{**vars(utterances[0]), "digest": "0" * 64})
    files = set(cache._shards)
    assert len(files & set(LatentCache([louder, *utterances[1:]], codec, CROP)._shards)) == 0, "other weights"


def test_a_half_written_or_deleted_shard_is_computed_again(corpus: Corpus, codec: SNAC) -> None:
    cache = cache_of(corpus, codec)
    utterance = corpus.split("train")[0]
    wanted = cache.at(utterance, HOP)
    (path,) = cache.folder.iterdir()
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-100]), path.unlink, lambda: path.write_bytes(b"")):
        module._opened.cache_clear()
        damage()
        assert torch.equal(cache_of(corpus, codec).at(utterance, HOP), wanted)


def test_an_interrupted_build_leaves_no_part_of_a_file(
    corpus: Corpus, codec: SNAC, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(corpus, codec)
    monkeypatch.setattr(module, "save", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        cache.build()
    assert list(cache.folder.iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_computed(
    corpus: Corpus, codec: SNAC, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(UserError, match=r"the latent cache needs 0\.0 GB more, .* has 0\.0 GB free; set .*SNAC_CACHE"):
        cache_of(corpus, codec).build()


def test_processes_that_build_at_once_give_the_bits_of_one(corpus: Corpus, cache: Path) -> None:
    program = """
import sys, torch
from snac_core.codec import SNAC
from snac_runner.data.latents import LatentCache
from snac_runner.data.open_corpus import open_corpus
torch.set_num_threads(int(sys.argv[2]))
utterances = open_corpus(sys.argv[1], dev=0.0, test=0.0).split("train")
cache = LatentCache(utterances, SNAC.from_pretrained("tiny").freeze(), 16000)
cache.build()
print(cache.folder)
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(corpus.root), str(threads)],
            env={**os.environ, "SNAC_CACHE": str(cache / "both")}, stdout=subprocess.PIPE, text=True,
        )
        for threads in (1, 2)
    ]  # fmt: skip
    alone = LatentCache(corpus.split("train"), SNAC.from_pretrained("tiny").freeze(), 16000)
    alone.build()
    (folder,) = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == contents(alone)


def test_processes_that_read_ahead_have_no_codec_and_say_what_to_do_without_a_file(corpus: Corpus, codec: SNAC) -> None:
    cache = cache_of(corpus, codec)
    cache.build()
    plain = CropLoader(corpus, "train", 16000, CROP / 16000, 2, 0, latents=cache)
    prefetched = PrefetchingLoader(plain, 20, 1)
    try:
        for step in (0, 1):
            expected, found = plain.at(step), prefetched.at(step)
            assert expected.latents is not None
            assert found.latents is not None
            assert torch.equal(expected.latents, found.latents)
        shutil.rmtree(cache.folder)
        prefetched.close()  # processes keep files open
        with pytest.raises(UserError, match="was deleted or damaged during training; run the same command again"):
            prefetched.at(2)
    finally:
        prefetched.close()


def imitations_of(corpus: Corpus, codec: SNAC, voice: int = 0) -> ImitationCache:
    encoder = ToySpeakerEncoder(16, 16000).freeze()
    return ImitationCache(corpus.split("train"), codec, CROP, encoder=encoder, voice=voice)


def test_an_imitation_has_the_spectrum_of_another_speaker_and_its_latent_and_embedding_are_kept(
    corpus: Corpus, codec: SNAC
) -> None:
    cache = imitations_of(corpus, codec)
    cache.build()
    for utterance in corpus.split("train"):
        reference = cache.reference(utterance)
        assert reference.speaker != utterance.speaker
        wave = cache.imitation(utterance)
        sources = [load_audio(one, 16000) for one in (utterance, reference)]
        assert wave.shape == sources[0].shape, "the timing is that of the source"
        own, wanted = (
            float((long_term_envelope(wave.unsqueeze(0), 16000) - long_term_envelope(one.unsqueeze(0), 16000)).norm())
            for one in sources
        )
        assert wanted < own
        silence = max(0, CROP - wave.shape[-1]) + codec.padding_multiple
        whole = encoded(codec, torch.nn.functional.pad(wave, (0, silence)))
        torch.testing.assert_close(cache.at(utterance, 0), whole[:, : CROP // HOP], rtol=1e-4, atol=1e-5)
        embedding = ToySpeakerEncoder(16, 16000).freeze()(wave.unsqueeze(0), 16000)[0]
        torch.testing.assert_close(cache.embedding_of(utterance), embedding)


def test_other_voices_and_other_encoders_have_other_entries_and_a_copy_in_a_process_reads_the_same(
    corpus: Corpus, codec: SNAC
) -> None:
    cache, utterance = imitations_of(corpus, codec), corpus.split("train")[0]
    chosen = {imitations_of(corpus, codec, voice).reference(utterance).id for voice in range(20)}
    assert chosen == {one.id for one in corpus.split("train") if one.speaker != utterance.speaker}
    other = ImitationCache(corpus.split("train"), codec, CROP, encoder=ToySpeakerEncoder(8, 16000).freeze(), voice=0)
    assert not set(cache._shards) & (set(other._shards) | set(cache_of(corpus, codec)._shards))
    cache.build()
    copy = pickle.loads(pickle.dumps(cache))
    assert copy._encoder is None
    assert torch.equal(copy.at(utterance, 0), cache.at(utterance, 0))
    assert torch.equal(copy.embedding_of(utterance), cache.embedding_of(utterance))
    (path,) = {cache._shard_of[utterance.id]}
    module._opened.cache_clear()
    path.unlink()
    with pytest.raises(UserError, match="was deleted or damaged during training"):
        copy.at(utterance, 0)


def test_crops_are_read_in_voices_drawn_for_each_item(corpus: Corpus, codec: SNAC) -> None:
    caches = [imitations_of(corpus, codec, voice) for voice in range(2)]
    plain = CropLoader(corpus, "train", 16000, CROP / 16000, 2, 0, latents=cache_of(corpus, codec))
    loader = CropLoader(corpus, "train", 16000, CROP / 16000, 2, 0, latents=cache_of(corpus, codec), imitations=caches)
    seen = set()
    for step in range(8):
        batch, without = loader.at(step), plain.at(step)
        (first, second), () = batch.imitations, without.imitations
        assert torch.equal(batch.audio, without.audio), "imitations do not change the crops"
        for row, name in enumerate(batch.utterances):
            utterance, start = corpus.utterance(name), round(batch.starts[row] * 16000)
            known = [(cache.at(utterance, start), cache.embedding_of(utterance)) for cache in caches]
            read, other = ([torch.equal(voice[0][row], z) and torch.equal(voice[1][row], e) for z, e in known]
                           for voice in (first, second))  # fmt: skip
            same = torch.equal(known[0][0], known[1][0])  # both voices may be of one speaker
            assert same or sorted([read, other]) == [[False, True], [True, False]], "two different voices"
            seen.add(read.index(True))
    assert seen == {0, 1}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1), number=st.integers(0, 3), frames=st.integers(1, 1500), seed=st.integers(0, 9))
def test_speech_beside_a_crop_is_of_the_same_utterance_and_not_of_the_crop(
    corpus: Corpus, codec: SNAC, place: float, number: int, frames: int, seed: int
) -> None:
    cache, utterance = cache_of(corpus, codec), corpus.split("train")[number]
    total = int(utterance.seconds * 16000) // HOP
    numbered = torch.arange(total + 8.0).unsqueeze(1).expand(-1, codec.latent_dim)  # a frame holds its own number
    cache._whole = lambda _: numbered[:total]  # type: ignore[method-assign]
    first = round(place * max(0, total - cache.crop_frames))
    speech = cache.speech_outside(utterance, first * HOP, frames, generator(seed))
    assert speech.shape == (codec.latent_dim, frames)
    found = speech[0].long()
    allowed = [f for f in range(total) if not first - module._NEAR <= f < first + cache.crop_frames + module._NEAR]
    if len(allowed) < module._LEAST_SPEECH:
        allowed = list(range(total))
    assert set(found.tolist()) <= set(allowed)
    if frames >= len(allowed):
        assert set(found.tolist()) == set(allowed), "all of it is used before any is repeated"
    start = cache.speech(utterance, frames, first * HOP / 16000)[0].long()
    assert start.tolist() == [(first + f) % total for f in range(frames)]


def test_speech_is_read_beside_the_crops_and_changes_nothing_else(corpus: Corpus, codec: SNAC) -> None:
    caches = [imitations_of(corpus, codec, voice) for voice in range(2)]
    length = CROP / 16000
    plain, loader = (
        CropLoader(
            corpus, "train", 16000, length, 2, 0,
            latents=cache_of(corpus, codec), imitations=caches, speech_frames=frames,
        )
        for frames in (0, 30)
    )  # fmt: skip
    for step in range(3):
        batch, without = loader.at(step), plain.at(step)
        assert without.speech is None
        assert batch.starts == without.starts
        for one, other in zip(batch.imitations, without.imitations, strict=True):
            assert other.speech is None
            assert torch.equal(one.latent, other.latent)
            assert one.speech is not None
            assert one.speech.shape == (2, codec.latent_dim, 30)
        assert batch.speech is not None
        for row, name in enumerate(batch.utterances):
            whole = loader.latents._whole(corpus.utterance(name))  # type: ignore[union-attr]
            same = (batch.speech[row].T.unsqueeze(1) == whole).all(2)
            assert same.any(1).all(), "frames of the utterance"


def test_one_speaker_cannot_imitate_another(corpus: Corpus, codec: SNAC) -> None:
    utterances = corpus.split("train")
    alone = Utterances.of([one for one in utterances if one.speaker == utterances.speakers[0]], corpus.root)
    with pytest.raises(UserError, match="imitations need speech of at least 2 training speakers"):
        ImitationCache(alone, codec, CROP, encoder=ToySpeakerEncoder(8, 16000).freeze(), voice=0)
