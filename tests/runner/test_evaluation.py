"""Controls and planted systems get the expected scores, and metrics agree with their formulas."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import PHASES, Bench, arm, result

from snac_core.frozen import FrozenActivations
from snac_core.metric import Conversion, Metric
from snac_core.plugins import discover
from snac_core.taps import is_before_vq
from snac_runner.arm import Arm
from snac_runner.distributed import DistributedContext
from snac_runner.evaluate import metrics as measures
from snac_runner.evaluate import systems
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.model_figures import noise_floor
from snac_runner.evaluate.scoring import available, score, worst_conversions
from snac_runner.evaluate.systems import Rendering
from snac_runner.resources import StudyResources


@pytest.fixture(scope="module")
def resources(bench: Bench) -> StudyResources:
    """Speech, codec and encoders."""
    return bench.resources(bench.study())


def usable(resources: StudyResources) -> dict[str, Metric]:
    """The metrics that can be measured here, on crops: the targets have no recordings of the same words."""
    metrics = available(resources.catalogue)[0]
    return {name: metric for name, metric in metrics.items() if "parallel" not in metric.references}


def planted(change: Any) -> systems.System:
    """The source, with its audio changed."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        audio = change(item.audio[0])
        return Rendering(converted=audio, identity=audio, other=audio, synthetic=audio)

    return render


def test_the_source_control_is_the_source_and_scores_as_identical(resources: StudyResources) -> None:
    scores = score(systems.source(), resources.test, usable(resources), keep=2)
    for item in resources.test.items:
        kept = scores.renderings[item.pair.id]
        assert torch.equal(kept.converted, item.audio[0])
        assert kept.identity is not None
        assert torch.equal(kept.identity, item.audio[0])
    pooled = scores.pooled
    assert pooled["mel"]["mean"] == pooled["stft"]["mean"] == 0
    assert pooled["si_sdr"]["mean"] > 60
    for row in scores.utterances:
        assert row["metrics"]["secs_source"] == pytest.approx(1 - row["metrics"]["spk_id"], abs=1e-6)
        assert row["metrics"]["secs"] == pytest.approx(1 - row["metrics"]["spk_vc"], abs=1e-12)
        assert row["metrics"]["gap"] == pytest.approx(row["metrics"]["spk_vc"] - row["metrics"]["spk_id"], abs=1e-12)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_conversions_scored_on_several_cores_have_the_scores_of_one(
    resources: StudyResources, tmp_path: Path, two_threads: None
) -> None:
    model = Arm.new(arm(*PHASES[1:]), 0, tmp_path, resources).model.eval()
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter += 0.02
    metrics = usable(resources)
    several = score(systems.conditioned(model), resources.test, metrics, keep=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one = score(systems.conditioned(model), resources.test, metrics, keep=2)
    assert several.utterances == one.utterances
    assert several.codes == one.codes
    for pair, rendering in one.renderings.items():
        assert rendering.edits.keys() == several.renderings[pair].edits.keys() > set()
        assert torch.equal(rendering.converted, several.renderings[pair].converted)


def test_the_audio_that_is_kept_does_not_depend_on_the_number_of_processes(resources: StudyResources) -> None:
    system, metrics = systems.floor(resources.codec, ("converted",)), {"secs": resources.catalogue.metrics["secs"]()}
    alone = score(system, resources.test, metrics, keep=3).renderings

    class First(DistributedContext):
        def agree(self, value: Any) -> Any:
            return value

        def share(self, produce: Any) -> Any:
            return produce()

    context = First(torch.device("cpu"), rank=0, world=len(resources.test.items))
    kept = score(system, resources.test, metrics, keep=3, context=context).renderings
    assert list(kept) == list(alone)
    assert all(torch.equal(kept[pair].converted, alone[pair].converted) for pair in kept)


def test_a_metric_measures_one_conversion_at_a_time(resources: StudyResources, two_threads: None) -> None:
    class Alone(measures.SECS):
        busy, calls = False, 0

        def __call__(self, conversion: Conversion) -> float | None:
            assert not self.busy
            self.busy = True
            time.sleep(0.05)
            self.busy, self.calls = False, self.calls + 1
            return super().__call__(conversion)

    metric = Alone()
    pooled = score(systems.source(), resources.test, {"secs": metric}).pooled
    assert metric.calls == pooled["secs"]["n_ok"] == len(resources.test.items)


def test_only_outputs_that_a_metric_judges_are_rendered(resources: StudyResources, tmp_path: Path) -> None:
    model = Arm.new(arm(PHASES[1]), 0, tmp_path, resources).model
    item = resources.test.items[0]
    whole = systems.conditioned(model)(resources.test, item)
    assert systems.needed_outputs([measures.Gap(), measures.STOI()]) == {"converted", "identity"}
    part = systems.conditioned(model, outputs={"identity"})(resources.test, item)
    assert part.other is None
    assert part.synthetic is None
    for name in ("converted", "identity"):
        assert torch.equal(getattr(part, name), getattr(whole, name))
    assert model.training


def test_the_audio_of_the_worst_conversions_is_not_rendered_again(resources: StudyResources) -> None:
    rendered: list[str] = []

    def system(conversions: Conversions, item: Item) -> Rendering:
        rendered.append(item.pair.id)
        return systems.source()(conversions, item)

    scores = score(system, resources.test, {"secs": measures.SECS()})
    worst = worst_conversions(scores, system, resources.test, 1)
    ((pair, audio),) = worst.items()
    secs = {row["pair"]: row["metrics"]["secs"] for row in scores.utterances}
    assert secs[pair] == min(secs.values())
    assert torch.equal(audio["converted"], audio["source"])
    assert len(rendered) == len(resources.test.items)


def test_the_floor_is_the_bare_codec_on_the_source(resources: StudyResources) -> None:
    item = resources.test.items[0]
    rendering = systems.floor(resources.codec)(resources.test, item)
    with torch.no_grad(), resources.codec.fixed_noise(systems.NOISE_SEED):
        audio, _ = resources.codec(item.audio.unsqueeze(0))
    assert torch.equal(rendering.converted, audio[0, 0])
    assert rendering.identity is rendering.converted


def test_the_ceiling_is_another_real_utterance_of_the_target(resources: StudyResources) -> None:
    for item in resources.test.items:
        part = resources.test.pairs.references[item.pair.target]["ceiling"][0]
        assert resources.corpus.utterance(part.utterance).speaker == item.pair.target
        assert part.utterance != item.pair.source.utterance
        rendering = systems.ceiling(resources.codec)(resources.test, item)
        assert rendering.identity is None
        assert len(rendering.converted) == resources.test.ceiling_audio(item).shape[-1]
    scores = score(systems.ceiling(resources.codec), resources.test, usable(resources))
    assert "spk_id" not in scores.pooled  # there is no own-embedding output: not applicable, and not a failure
    assert scores.pooled["secs"]["n_ok"] == scores.pooled["secs"]["n"] == 2


def test_the_target_itself_scores_higher_than_the_source(resources: StudyResources) -> None:
    real = score(lambda c, item: Rendering(c.ceiling_audio(item)[0]), resources.test, usable(resources))
    source = score(systems.source(), resources.test, usable(resources))
    assert real.pooled["secs"]["mean"] > source.pooled["secs"]["mean"] + 0.05


@pytest.mark.parametrize("change", [lambda a: a * float("nan"), torch.zeros_like, lambda a: a * float("inf")])
def test_broken_output_scores_worst_and_is_not_missing(resources: StudyResources, change: Any) -> None:
    scores = score(planted(change), resources.test, usable(resources))
    for name, metric in usable(resources).items():
        assert scores.pooled[name]["mean"] == metric.worst, name
        assert scores.pooled[name]["n_ok"] == scores.pooled[name]["n"] == 2
    # no metric's worst is better than what real output got
    real = score(planted(lambda audio: audio), resources.test, usable(resources))
    for name, metric in usable(resources).items():
        sign = 1 if metric.direction == "up" else -1
        assert sign * metric.worst <= sign * real.pooled[name]["mean"], name


def test_a_shifted_source_is_farther_from_its_speaker_and_repeatable(
    resources: StudyResources,
) -> None:
    pooled = score(systems.source(), resources.test, usable(resources)).pooled
    assert pooled["spk_synth"]["mean"] > pooled["spk_id"]["mean"] + 0.02
    item = resources.test.items[0]
    again = Conversions(
        resources.corpus, resources.test.pairs, resources.test.sample_rate, resources.speaker_encoder, resources.judges
    )
    assert torch.equal(again.shifted(again.items[0]), resources.test.shifted(item))
    assert again.shifted(item).shape == item.audio.shape


def test_silence_under_one_embedding_affects_only_its_metrics(resources: StudyResources) -> None:
    whole = score(planted(lambda audio: audio), resources.test, usable(resources))

    def silent_itself(conversions: Any, item: Any) -> Rendering:
        return replace(planted(lambda audio: audio)(conversions, item), identity=torch.zeros_like(item.audio[0]))

    found = score(silent_itself, resources.test, usable(resources))
    for name, metric in usable(resources).items():
        value = metric.worst if "identity" in metric.outputs else whole.pooled[name]["mean"]
        assert found.pooled[name]["mean"] == pytest.approx(value, rel=1e-5), name


class Raises(Metric):
    """A metric whose tool fails on the first pair."""

    name, unit, direction = "raises", "", "up"
    calls = 0

    def __call__(self, conversion: Conversion) -> float | None:
        type(self).calls += 1
        if type(self).calls == 1:
            raise RuntimeError("tool failed")
        return float("nan") if type(self).calls == 2 else 1.0


class NotApplicable(Metric):
    """A metric that applies to nothing."""

    name = "nothing"

    def __call__(self, conversion: Conversion) -> float | None:
        return None


def test_a_metric_that_fails_counts_as_not_ok_and_other_metrics_are_measured(resources: StudyResources) -> None:
    only = {"raises": Raises(), "nothing": NotApplicable(), "secs": measures.SECS()}
    pooled = score(systems.source(), resources.test, only).pooled
    assert (pooled["raises"]["n_ok"], pooled["raises"]["n"], pooled["raises"]["mean"]) == (0, 2, None)
    assert "nothing" not in pooled
    assert pooled["secs"]["n_ok"] == 2


def test_a_metric_whose_package_is_missing_is_listed_with_what_it_needs() -> None:
    found = discover()
    found.metrics.classes["nothing"] = type("Needy", (NotApplicable,), {"requires": ("no_such_package",)})
    metrics, missing = available(found)
    assert missing["nothing"] == "needs no_such_package"
    assert "nothing" not in metrics


def test_the_other_speaker_is_neither_source_nor_target(bench: Bench, resources: StudyResources) -> None:
    assert all(item.other == "" for item in resources.test.items)  # two speakers: there is no third
    from snac_runner.data.pairs import conversion_pairs

    pairs = conversion_pairs(resources.corpus, "train", n=12, seed=0, seconds=0.6)
    wide = Conversions(resources.corpus, pairs, 16000, resources.speaker_encoder, resources.judges)
    assert len({item.other for item in wide.items}) > 1
    for item in wide.items:
        assert item.other in resources.corpus.speakers("train")
        assert item.other not in (item.pair.source_speaker, item.pair.target)


def test_pairs_are_the_same_for_all_arms_and_controls(finished: Path) -> None:
    folders = [finished / name / "seed0" for name in PHASES]
    folders += [finished / "controls" / name for name in ("source", "floor", "ceiling")]
    found = [result(folder) for folder in folders]
    assert len({one["pairs"]["digest"] for one in found}) == 1
    rows = [[(u["pair"], u["source_speaker"], u["target_speaker"]) for u in one["utterances"]] for one in found]
    assert all(row == rows[0] for row in rows)


def test_an_untrained_arm_scores_as_the_floor_and_changes_no_code(resources: StudyResources, tmp_path: Path) -> None:
    one = Arm.new(arm(*PHASES), 0, tmp_path, resources)
    scores = score(systems.conditioned(one.model), resources.test, usable(resources))
    bare = score(systems.floor(resources.codec), resources.test, usable(resources))
    assert scores.codes["changed"] == [0.0] * len(resources.codec.vq_strides)
    assert all(1 <= value <= 64 for value in scores.codes["perplexity"])
    for name in ("secs", "secs_source", "spk_id", "mel", "si_sdr"):
        assert scores.pooled[name]["mean"] == pytest.approx(bare.pooled[name]["mean"], abs=1e-4)
    assert one.model.training  # judging leaves the mode as it was


def test_the_noise_floor_is_0_for_a_codec_without_noise(
    resources: StudyResources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Arm.new(arm(PHASES[1]), 0, tmp_path, resources)
    noisy = noise_floor(one.model, resources.test, measures.SECS())
    with torch.no_grad():
        for module in one.model.codec.modules():
            if type(module).__name__ == "NoiseBlock":
                monkeypatch.setattr(module, "forward", lambda x: x)
    assert noisy > 0
    assert noise_floor(one.model, resources.test, measures.SECS()) == pytest.approx(0, abs=1e-12)


def test_the_encoder_runs_once_for_all_systems_of_a_codec_and_again_for_another_codec(
    resources: StudyResources,
) -> None:
    conversions, codec = resources.test, resources.codec
    item = conversions.items[0]
    alone = FrozenActivations(codec, item.audio.unsqueeze(0))
    first, second = conversions.bare(codec, item), conversions.bare(codec, item)
    assert second.at("latent") is first.at("latent")
    for tap in (tap.name for tap in codec.taps if is_before_vq(tap.name)):  # what follows has noise
        assert torch.equal(second.at(tap), alone.at(tap))
    assert all(map(torch.equal, second.codes, alone.codes))
    assert conversions.bare(copy.deepcopy(codec), item).at("latent") is not first.at("latent")


def test_evaluation_is_repeatable(resources: StudyResources, tmp_path: Path) -> None:
    one = Arm.new(arm(PHASES[1]), 0, tmp_path, resources)
    first, second = (score(systems.conditioned(one.model), resources.test, usable(resources)) for _ in range(2))
    assert first.utterances == second.utterances


# ------------------------------------------------------------------ metrics against formulas

VOICE = torch.from_numpy(np.random.default_rng(0).standard_normal(16000)).float() * 0.1


def conversion(identity: torch.Tensor | None, source: torch.Tensor = VOICE) -> Conversion:
    """A conversion of which only the identity output matters."""
    return Conversion(pair="p", sample_rate=16000, source=source, converted=source, identity=identity)


@given(st.floats(0.01, 100), st.floats(-0.5, 0.5))
def test_si_sdr_does_not_depend_on_scale_or_offset(scale: float, offset: float) -> None:
    noisy = VOICE + 0.02 * VOICE.flip(0)
    ratio = measures.SISDR()(conversion(noisy))
    assert ratio is not None
    assert measures.SISDR()(conversion(noisy * scale + offset)) == pytest.approx(ratio, abs=1e-2)


@pytest.mark.parametrize("decibels", [-10.0, 0.0, 20.0])
def test_si_sdr_of_noise_that_is_orthogonal_is_the_ratio_of_powers(decibels: float) -> None:
    source = (VOICE - VOICE.mean()).double()
    noise = VOICE.flip(0).double() - VOICE.double().mean()
    noise -= (noise @ source) / (source @ source) * source
    noise *= (source.norm() / noise.norm()) * 10 ** (-decibels / 20)
    assert measures.SISDR()(conversion(source + noise, source)) == pytest.approx(decibels, abs=1e-3)


def test_distances_of_identical_audio_are_0_and_grow_with_noise() -> None:
    for metric in (measures.Mel(), measures.STFT()):
        at = [metric(conversion(VOICE + level * VOICE.flip(0))) for level in (0.0, 0.01, 0.1, 1.0)]
        assert at[0] == 0
        assert at == sorted(at)  # type: ignore[type-var]


def test_mel_of_ten_times_the_amplitude_is_one_decade() -> None:
    assert measures.Mel()(conversion(10 * VOICE)) == pytest.approx(1.0, abs=0.02)


def test_speaker_metrics_are_the_cosines_of_their_definitions() -> None:
    def unit(degrees: float) -> torch.Tensor:
        return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])

    seen = Conversion(
        pair="p", sample_rate=16000, source=VOICE, converted=VOICE, identity=VOICE, other=VOICE, synthetic=VOICE,
        embeddings={"converted": unit(60), "identity": unit(30), "other": unit(20), "synthetic": unit(45)},
        references={"source": unit(0), "target": unit(90)},
        speaker_encoder_embeddings={"converted": unit(45)},
        speaker_encoder_references={"target": unit(90), "source": unit(0)},
    )  # fmt: skip
    cos = {angle: math.cos(math.radians(angle)) for angle in (30, 45, 60, 70)}
    expected = {
        "secs": cos[30],
        "secs_source": cos[60],
        "secs_other": cos[70],
        "specificity": cos[30] - cos[70],
        "spk_vc": 1 - cos[30],
        "spk_id": 1 - cos[30],
        "spk_synth": 1 - cos[45],
        "gap": 0.0,
        "speaker_encoder_secs": cos[45],
    }
    metrics = available(discover())[0]
    for name, value in expected.items():
        assert metrics[name](seen) == pytest.approx(value, abs=1e-6), name
    assert metrics["specificity"](replace(seen, embeddings={"converted": unit(60)})) is None


def test_quality_metrics_do_not_apply_without_an_own_embedding_output() -> None:
    for metric in (measures.Mel(), measures.STFT(), measures.SISDR(), measures.STOI(), measures.PESQ()):
        assert metric(conversion(None)) is None


def test_intelligibility_and_quality_of_identical_audio_are_the_best_there_is(resources: StudyResources) -> None:
    pytest.importorskip("pystoi", reason="needs pystoi (the judges extra)")
    pytest.importorskip("pesq", reason="needs pesq (the judges extra)")
    speech = resources.test.items[0].audio[0]
    noisy = speech + 0.05 * torch.randn(len(speech), generator=torch.Generator().manual_seed(0))
    for metric, best in ((measures.STOI(), 1.0), (measures.PESQ(), 4.64)):
        assert metric(conversion(speech, speech)) == pytest.approx(best, abs=0.01)
        assert metric(conversion(noisy, speech)) < best - 0.1  # type: ignore[operator]
