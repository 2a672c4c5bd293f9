"""The recipe of the speaker encoder: margin, perturbations, classes, training, trials."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from perturb import mask_features, perturb
from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.speakers.ecapa import EcapaTiny
from snac_runner.data.open_corpus import open_corpus
from snac_runner.evaluate.statistics import equal_error_rate
from snac_runner.evaluate.verification import Verification, embed_parts, pair_scores, parts_of
from speaker_encoder import AngularMargin, SpeakerClasses, load_classes, train, training_batch


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven "speakers" who buzz at their own pitch, two utterances of 2.5 s each: four train, two dev, one test."""
    root = tmp_path_factory.mktemp("speech")
    time = torch.arange(40000) / 16000
    for number, pitch in enumerate((90, 120, 150, 190, 105, 240, 130)):
        for take in range(2):
            swing = 0.3 * torch.sin(2 * math.pi * (2 + take) * time)
            buzz = (1.5 * torch.sin(2 * math.pi * pitch * time + swing)).exp() - 1.6
            noise = torch.randn(len(time), generator=generator("test speech", number, take))
            path = (
                root
                / ("train" if number < 4 else "dev" if number < 6 else "test")
                / f"s{number}"
                / f"s{number}_{take}.wav"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, (0.05 * buzz + 0.005 * noise).numpy(), 16000)
    return root


@pytest.fixture(scope="module")
def classes(speech: Path) -> SpeakerClasses:
    return load_classes([(open_corpus(speech), 1.0)], 16000, speeds=(1.0, 1.25))


def test_without_a_margin_the_loss_is_the_softmax_of_scaled_cosines() -> None:
    head = AngularMargin(8, 5, scale=10.0, generator=generator(0))
    embedding, label = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    cosine = torch.cosine_similarity(embedding[:, None], head.centres[None], dim=-1)
    loss, accuracy = head(embedding, label, 0.0)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(10 * cosine, label).item(), rel=1e-4)
    assert accuracy.item() == pytest.approx((cosine.argmax(1) == label).float().mean().item())


def test_the_margin_is_an_angle_added_to_the_own_class_only() -> None:
    head = AngularMargin(2, 2, scale=1.0, generator=generator(0))
    head.centres.data = torch.eye(2)
    angle, margin = 0.6, 0.25
    embedding = torch.tensor([[math.cos(angle), math.sin(angle)]]) * 3
    loss, _ = head(embedding, torch.tensor([0]), margin)
    own, other = math.cos(angle + margin), math.sin(angle)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(other - own)), rel=1e-5)


def test_a_larger_margin_never_lowers_the_loss_even_beyond_the_half_turn() -> None:
    head = AngularMargin(2, 2, scale=5.0, generator=generator(0))
    head.centres.data = torch.eye(2)
    for angle in torch.linspace(0, math.pi, 30).tolist():
        embedding = torch.tensor([[math.cos(angle), math.sin(angle)]])
        losses = [head(embedding, torch.tensor([0]), m)[0].item() for m in (0.0, 0.1, 0.2, 0.3)]
        assert losses == sorted(losses)


def test_a_perturbation_depends_on_its_generator_alone_and_stays_finite() -> None:
    audio = torch.randn(12, 16000) * 0.1
    audio[3] = 0
    first, again = (perturb(audio, 16000, generator(1, "x")) for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()
    assert first.shape == audio.shape
    assert not torch.equal(first, perturb(audio, 16000, generator(2, "x")))


def test_masks_hide_one_block_of_bands_and_one_of_frames() -> None:
    masked = mask_features(torch.ones(50, 64, 100), generator(0))
    hidden_bands = (masked == 0).all(2).sum(1)
    hidden_frames = (masked == 0).all(1).sum(1)
    assert hidden_bands.max() <= 9
    assert hidden_frames.max() <= 21
    assert hidden_bands.float().mean() > 2
    assert hidden_frames.float().mean() > 5


def test_every_speed_of_a_train_speaker_is_a_class_and_dev_speakers_are_none(classes: SpeakerClasses) -> None:
    assert classes.names == [
        f"{classes.names[0].split('/')[0]}/s{i}@{speed}" for i in range(4) for speed in ("1", "1.25")
    ]
    assert sum(classes.share) == pytest.approx(1)
    slow, fast = classes.recorded[0][0], classes.recorded[1][0]
    assert len(fast) == pytest.approx(len(slow) / 1.25, abs=2)
    peak = [torch.fft.rfft(w[:16000].float()).abs()[50:200].argmax().item() + 50 for w in (slow, fast)]
    assert peak[1] / peak[0] == pytest.approx(1.25, rel=0.03)


def test_a_batch_is_a_function_of_seed_and_step(classes: SpeakerClasses) -> None:
    audio, label = training_batch(classes, 6, (1.0, 2.5), 0, 3)
    again, same = training_batch(classes, 6, (1.0, 2.5), 0, 3)
    assert torch.equal(audio, again)
    assert torch.equal(label, same)
    other, other_label = training_batch(classes, 6, (1.0, 2.5), 0, 4)
    assert not torch.equal(label, other_label) or audio.shape != other.shape


def test_training_is_repeatable(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speaker_encoder.LOG_EVERY", 3)
    short = {"steps": 6, "batch_size": 4, "min_seconds": 0.3, "max_seconds": 0.4}
    for name in ("first", "second"):
        train(tmp_path / name, [speech], synthetic=0, codec="none", **short)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert EcapaTiny(tmp_path / "first" / "model.safetensors").dim == 192
    records = [json.loads(line) for line in (tmp_path / "first" / "training.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6]
    assert all(math.isfinite(record["loss"]) for record in records)
    result = json.loads((tmp_path / "first" / "result.json").read_text())
    assert result["classes"] == 3 * 4
    assert 1 <= result["best"]["step"] <= 6
    with pytest.raises(UserError, match="holds a trained encoder"):
        train(tmp_path / "first", [speech], synthetic=0, codec="none", steps=1)


def test_a_training_that_was_stopped_does_not_look_finished(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(audio: torch.Tensor, *_: object) -> torch.Tensor:
        if (tmp_path / "best.safetensors").is_file():
            raise KeyboardInterrupt
        return audio

    monkeypatch.setattr("speaker_encoder.perturb", stopped)
    short = {"steps": 6, "batch_size": 4, "min_seconds": 0.3, "max_seconds": 0.4}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [speech], synthetic=0, codec="none", **short)
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    train(tmp_path, [speech], synthetic=0, codec="none", **short)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_equal_error_rate_of_known_scores() -> None:
    assert equal_error_rate(np.array([0.8, 0.9, 0.7]), np.array([0.1, 0.2])) == (0.0, pytest.approx(0.7))
    eer, _ = equal_error_rate(np.arange(100) / 100 + 0.5, np.arange(100) / 100)
    assert eer == pytest.approx(0.25, abs=0.01)
    eer, _ = equal_error_rate(*np.random.default_rng(0).random((2, 3000)))
    assert eer == pytest.approx(0.5, abs=0.05)


def test_parts_of_one_utterance_meet_only_where_there_is_no_other(speech: Path) -> None:
    parts = parts_of(open_corpus(speech), ("dev",), 16000, seconds=1.0, least=0.4)
    assert len(parts) == 2 * 2 * 3
    pitch = {"s4": torch.tensor([1.0, 0.0]), "s5": torch.tensor([0.0, 1.0])}
    found = Verification.of(*pair_scores(parts, torch.stack([pitch[p.speaker] for p in parts])))
    assert found.eer == 0
    assert (found.same, found.different) == (1, 0)
    assert found.trials == (2 * 9, 36)  # of 2 x 15 pairs of one speaker 2 x 6 are within an utterance
    single = [p for p in parts if p.utterance.endswith("_0")]
    alone = pair_scores(single, torch.stack([pitch[p.speaker] for p in single]))
    assert Verification.of(*alone).trials == (2 * 3, 9)


def test_embeddings_come_back_in_the_order_of_the_parts(speech: Path) -> None:
    parts = parts_of(open_corpus(speech), ("dev",), 16000, seconds=1.0, least=0.4)
    levels = embed_parts(parts, lambda audio, rate: audio.abs().mean(-1), 16000, batch=2)
    assert torch.allclose(levels[:, 0], torch.tensor([p.audio.abs().mean() for p in parts]))
