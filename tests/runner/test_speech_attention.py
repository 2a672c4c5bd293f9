"""Arms that attend to speech of the target: what they train on, and what evaluation and conversion give them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_study import PHASES, Bench, arm, records, result, runner, weights

from snac_core.conditioning import REFERENCE
from snac_core.errors import UserError
from snac_core.testing.probes import perturbed
from snac_runner.arm import Arm
from snac_runner.config import NOISE_SEED, ArmSettings
from snac_runner.distributed import ALONE
from snac_runner.evaluate.systems import conditioned
from snac_runner.train_step import make_step, train_step

CACHED: dict[str, Any] = {"latent_cache": True, "imitations": 2, "batch_size": 4}


def attending(objectives: tuple[str, ...] = ("code_prediction",), **changes: Any) -> ArmSettings:
    settings = {
        PHASES[2]: {"adapter_type": "codes", "hidden_dim": 16, "attention_heads": 2, "source_bias": 0.0},
        **({"code_prediction": {"imitate": True}} if "code_prediction" in objectives else {}),
    }
    return arm(PHASES[2], objectives=objectives, settings=settings, **changes)


@pytest.fixture(scope="module")
def trained(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; its model was moved so that speech has an effect."""
    folder = bench.train([attending()], tmp_path_factory.mktemp("attending"), **CACHED)[PHASES[2]]
    one = Arm.new(attending(), 0, folder, bench.resources(bench.study(**CACHED)))
    perturbed(one.model, seed=1).save_pretrained(folder / "model")
    return folder


def test_it_trains_and_is_judged_and_a_stopped_run_ends_as_one_that_was_not(bench: Bench, tmp_path: Path) -> None:
    one = bench.train([attending()], tmp_path / "one", **CACHED)[PHASES[2]]
    assert result(one)["status"] == "success"
    assert result(one)["metrics"]["secs"]["mean"] is not None
    first, *_, last = (record for record in records(one) if "dev" not in record)
    assert last["loss"] != first["loss"]

    def stop(title: str, done: int, *_: object) -> None:
        if "training" in title and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.train([attending()], tmp_path / "two", step=stop, **CACHED)
    two = bench.train([attending()], tmp_path / "two", **CACHED)[PHASES[2]]
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


def test_a_batch_in_parts_trains_like_the_whole(bench: Bench, tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 4):
        resources = bench.resources(bench.study(accumulate=accumulate, **CACHED))
        one = Arm.new(attending(("code_prediction", "voice_conversion")), 0, tmp_path, resources)
        batches = resources.batches(0)
        parts = [resources.draw(1, batches, one.sampler, rows) for rows in resources.parts]
        logged = train_step([one], parts, ALONE).checked()
        found.append([logged[one.settings.title][name] for name in ("loss", "spk_vc", "code_prediction/crossed")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_each_voice_comes_with_its_own_speech_and_never_with_the_crop(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study(**CACHED))
    one = Arm.new(attending(), 0, tmp_path, resources)
    step = make_step(one, resources.draw(1, resources.batches(0), one.sampler))
    targets, table = step.target.extras[REFERENCE], resources.table
    for row, target in enumerate(step.target_ids.tolist()):
        speech = resources.speech_of(torch.tensor([target]))[0]
        assert torch.equal(targets[row], speech)
        part = resources._train_references.conditioning(table.names[target])[0]
        whole = resources.latents._whole(resources.corpus.utterance(part.utterance))  # type: ignore[union-attr]
        assert (speech.T[0] == whole).all(1).any()
    own = step.own.extras[REFERENCE]
    assert own.shape[0] == len(step.audio)
    latent = step.frozen_activations.at("latent")
    for row in range(len(own)):
        same = (own[row].T.unsqueeze(1) == latent[row].T).all(2).any(1)
        assert not same.all(), "more than the crop"
    shuffled = Arm.new(attending(shuffled_speakers=True), 0, tmp_path, resources)
    step = make_step(shuffled, resources.draw(1, resources.batches(0), shuffled.sampler))
    assert torch.equal(step.own.extras[REFERENCE], step.target.extras[REFERENCE][: len(step.audio)])
    imitated = step.conditioning_on(lambda: step.own.speaker, step.imitations[0].speech)
    assert torch.equal(imitated.extras[REFERENCE], step.target.extras[REFERENCE][: len(step.audio)])


def test_an_arm_beside_it_trains_as_if_alone(bench: Bench, tmp_path: Path) -> None:
    other = arm(PHASES[1])
    alone = bench.train([other], tmp_path / "alone", **CACHED)[PHASES[1]]
    beside = bench.train([attending(), other], tmp_path / "beside", **CACHED)[PHASES[1]]
    assert all(torch.equal(value, weights(beside)[name]) for name, value in weights(alone).items())


def test_what_it_needs_is_asked_for(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attends to latents of speech, .*; expected latent_cache = true"):
        Arm.new(attending(), 0, tmp_path, bench.resources(bench.study()))
    with pytest.raises(UserError, match="expected voices from the latent cache: set imitations = 2"):
        bench.train([attending()], tmp_path / "none", **{**CACHED, "imitations": 0})


def test_a_conversion_is_evaluated_with_the_conditioning_speech_of_its_target(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study(**CACHED))
    model = perturbed(Arm.new(attending(), 0, tmp_path, resources).model, seed=1).eval()
    test, item = resources.test, resources.test.items[0]
    segment = test.pairs.references[item.pair.target]["conditioning"][0]
    speech = test.segment_audio(segment).unsqueeze(0)
    expected = model.target(test.conditioning[item.pair.target], speech)
    cond = test.target(model, item.pair.target)
    assert torch.equal(cond.extras[REFERENCE], expected.extras[REFERENCE])
    assert test.target(model, item.pair.target) is cond, "encoded once"
    with torch.no_grad(), model.codec.fixed_noise(NOISE_SEED):
        audio = model.reconstruct(item.audio.unsqueeze(0), expected).audio[0, 0]
    assert torch.equal(conditioned(model)(test, item).converted, audio)


def test_files_are_converted_with_the_speech_of_their_target(
    bench: Bench, trained: Path, voices: list[Path], tmp_path: Path, refusal: Callable[..., str]
) -> None:
    command = ["convert", "--run", trained, "--base", bench.base, "--source", voices[0]]
    assert runner(*command, "--target", voices[1], "--target", voices[2], "--out", tmp_path / "c.wav", "--stages") == 0
    assert (tmp_path / "c.identity.wav").is_file()
    codes = ["encode", "--run", trained, "--base", bench.base, "--source", voices[0], "--target", voices[1]]
    assert runner(*codes, "--out", tmp_path / "c.npz") == 0
    sources = tmp_path / "sources"
    sources.mkdir()
    for voice in voices[:2]:
        shutil.copy(voice, sources / f"{voice.parent.name}.flac")
    batch = ["convert", "--run", trained, "--base", bench.base, "--source", sources, "--target", voices[2]]
    assert runner(*batch, "--out", tmp_path / "batch") == 0
    assert len(list((tmp_path / "batch").rglob("*.wav"))) == 2
    np.save(tmp_path / "target.npy", np.ones(512, dtype=np.float32))
    message = refusal(*command, "--target", tmp_path / "target.npy", "--out", tmp_path / "d.wav")
    assert "target.npy is an embedding, and this run attends to speech of the target; expected speech" in message
