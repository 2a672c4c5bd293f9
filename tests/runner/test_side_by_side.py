"""Arms trained together are the arms trained alone, and share what is frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import PHASES, Bench, arm, contents, records, result, weights

from snac_core.codec import SNAC
from snac_core.codec.vq import ResidualVectorQuantize
from snac_core.frozen import FrozenActivations
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.speakers.simple import Simple
from snac_runner.arm import Arm
from snac_runner.config import ArmSettings
from snac_runner.distributed import ALONE
from snac_runner.resources import TrainingBatch
from snac_runner.train_step import train_step


def judged(folder: Path) -> list[dict[str, Any]]:
    """The dev evaluations of a run."""
    return [record["dev"] for record in records(folder) if "dev" in record]


def logged(folder: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps, but for the time."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit: weights, logs, dev and test scores."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert logged(one) == logged(other)
    assert judged(one) == judged(other)
    assert judged(one)
    for key in ("metrics", "utterances", "codes", "noise_floor", "config_hash"):
        assert result(one)[key] == result(other)[key], key


def test_an_arm_beside_others_is_bit_equal_to_itself_alone_and_may_be_added_later(bench: Bench, tmp_path: Path) -> None:
    both = "+".join((PHASES[2], PHASES[1]))
    arms = [arm(PHASES[0]), arm(PHASES[2]), arm(PHASES[2], PHASES[1])]
    together = bench.train(arms, tmp_path / "together", steps=3)
    alone = bench.train(arms[2:], tmp_path / "later", steps=3)
    before = contents(tmp_path / "later")
    apart = bench.train(arms[::-1], tmp_path / "later", steps=3)  # in another order, too
    after = contents(tmp_path / "later")
    assert {name: after[name] for name in before} == before  # finished runs are not touched
    assert_same_run(alone[both], together[both])
    for title in together:
        assert_same_run(apart[title], together[title])


def norm_of_gradients(parameters: list[torch.nn.Parameter]) -> float:
    """L2, over all of them."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def test_arms_side_by_side_keep_discriminators_of_their_own_clipped_by_a_bound_of_their_own(
    bench: Bench, tmp_path: Path
) -> None:
    resources = bench.resources(bench.study())
    free, tight = (
        Arm.new(
            ArmSettings(strategies=(PHASES[2],), objectives=("adversarial",), discriminator_grad_clip=clip),
            0,
            tmp_path / str(clip),
            resources,
        )
        for clip in (1e3, 1e-3)
    )
    loose, bound = ([parameter for _, parameter in arm.model.discriminator_parameters()] for arm in (free, tight))
    before = [parameter.detach().clone() for parameter in bound]
    assert not {id(parameter) for parameter in loose} & {id(parameter) for parameter in bound}
    assert all(torch.equal(one, other) for one, other in zip(loose, before, strict=True)), "of the same seed"
    batch = resources.draw(1, resources.batches(0), free.sampler)
    train_step([free], [batch], ALONE).checked()
    assert not all(torch.equal(one, other) for one, other in zip(loose, before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(bound, before, strict=True))
    train_step([tight], [batch], ALONE).checked()
    assert norm_of_gradients(loose) > 0.01
    assert norm_of_gradients(bound) == pytest.approx(1e-3, rel=0.01)


def test_seeds_differ_in_everything_that_is_drawn(bench: Bench, tmp_path: Path) -> None:
    bench.train([arm(PHASES[2])], tmp_path, seeds=[0, 1], steps=2)
    zero, one = (tmp_path / PHASES[2] / f"seed{seed}" for seed in (0, 1))
    assert result(zero)["seed"] == 0
    assert result(one)["seed"] == 1
    ours, theirs = weights(zero), weights(one)
    drawn = [key for key in ours if ours[key].ndim > 1]
    assert not any(torch.equal(ours[key], theirs[key]) for key in drawn)
    assert [pair["pair"] for pair in result(zero)["utterances"]] == [pair["pair"] for pair in result(one)["utterances"]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """(part of the work, rows) to how often it is done from now on."""
    counted: Counter[tuple[str, int]] = Counter()

    def count(cls: type, method: str, part: Callable[..., str], rows: Callable[..., int]) -> None:
        before = getattr(cls, method)

        def counting(self: Any, *given: Any, **named: Any) -> Any:
            counted[part(*given, **named), rows(*given, **named)] += 1
            return before(self, *given, **named)

        monkeypatch.setattr(cls, method, counting)

    def side(x: Any, after: str | None, upto: str) -> str:
        if after is None:
            return "encoder"
        return "decoder" if upto == "audio" else f"{after} to {upto}"

    count(SNAC, "advance", side, lambda x, *_: len(x))
    count(ResidualVectorQuantize, "forward", lambda z: "quantiser", lambda z: len(z))
    count(Simple, "forward", lambda *_: "speaker_encoder", lambda audio, *_: len(audio))
    return counted


@pytest.mark.parametrize("targets", [1, 2])
def test_a_step_of_three_arms_makes_exactly_the_passes_it_needs(
    bench: Bench, tmp_path: Path, passes: Counter[tuple[str, int]], targets: int
) -> None:
    study = bench.study(targets_per_item=targets)
    resources = bench.resources(study)
    arms = [Arm.new(arm(name), 0, tmp_path / name, resources) for name in PHASES]
    batch = resources.batches(0).at(1)
    speakers = resources.table.indices(batch.speakers)
    drawn = arms[0].sampler.targets(speakers, 1, targets)
    rows, all_rows = study.batch_size, (1 + targets) * study.batch_size
    passes.clear()
    bare = FrozenActivations(resources.codec, batch.audio)
    for one in arms:
        train_step([one], [TrainingBatch(1, bare, speakers, drawn)], ALONE).checked()
    of = {kind: {n: count for (what, n), count in passes.items() if what == kind} for kind, _ in passes}
    assert of["encoder"] == {rows: 1}  # the frozen encoder's work once for all arms
    assert of["quantiser"] == {rows: 1, all_rows: 1}  # bare for those after VQ; the adapter before VQ its own
    assert of["speaker_encoder"] == {all_rows: len(arms)}  # targets' embeddings come from the table
    assert of["decoder"] == {all_rows: len(arms)}  # identity and conversions of an arm in one batch


def test_with_a_latent_cache_no_step_encodes_its_crops_and_a_run_does_not_depend_on_who_built_it(
    bench: Bench, tmp_path: Path, passes: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [arm(PHASES[2], weights={"voice_conversion/spk_vc": 1.0}), arm(PHASES[1])]
    folders = []
    for name in ("one", "two"):
        monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache" / name))
        study = bench.study(latent_cache=True)
        resources = bench.resources(study)
        trained = [Arm.new(one, 0, tmp_path / name / one.title, resources) for one in arms]
        loader = resources.batches(0)  # builds the cache
        passes.clear()
        for index in (1, 2):
            batch = resources.draw(index, loader, trained[0].sampler)
            for one in trained:
                train_step([one], [batch], ALONE).checked()
        assert passes["decoder", 2 * study.batch_size] == 4
        assert not [rows for what, rows in passes if what == "encoder"]
        folders.append(trained)
    for one, other in zip(*folders, strict=True):
        assert all(
            torch.equal(a, b)
            for (_, a), (_, b) in zip(*(m.model.trained_parameters() for m in (one, other)), strict=True)
        )


def test_targets_are_drawn_as_the_study_says(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    targets = SpeakerSampler.targets

    def noting(self: SpeakerSampler, *given: Any, **options: Any) -> Any:
        asked.append(options.get("choice", "random"))
        return targets(self, *given, **options)

    monkeypatch.setattr(SpeakerSampler, "targets", noting)
    bench.train([arm(PHASES[1])], tmp_path, steps=2, target_choice="in_batch")
    assert asked.count("in_batch") == 2


def test_the_shared_pass_hands_out_activations_without_gradient(bench: Bench) -> None:
    resources = bench.resources(bench.study())
    bare = FrozenActivations(resources.codec, resources.batches(0).at(1).audio)
    assert not bare.at("latent").requires_grad
    assert not bare.output.requires_grad
    assert bare.at("decoder_2") is bare.at("decoder_2")
