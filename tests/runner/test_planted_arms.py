"""Systems of known quality get the expected verdicts, on speech with a true target utterance for every conversion."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from snac_core.plugins import discover
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.controls import informative_metrics, run_controls
from snac_runner.data.corpus import Segment
from snac_runner.data.synth import synthesize
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.prosody import mean_log2
from snac_runner.evaluate.scoring import Scores, score
from snac_runner.evaluate.systems import Rendering, System, floor, praat_change_gender, resynthesis
from snac_runner.evaluate.whisper import Whisper
from snac_runner.report.estimates import StudyEstimates, compute
from snac_runner.report.page import build
from snac_runner.report.results import read
from snac_runner.report.text import Verdict, verdict
from snac_runner.resources import StudyResources
from snac_runner.run_result import Result, write_result

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
parselmouth = pytest.importorskip("parselmouth", reason="needs praat-parselmouth (the judges extra)")


MEASURED = ("secs", "secs_source", "secs_other", "specificity", "speaker_encoder_secs", "secs_degraded", "per", "wer")
WHISPER = Path(os.environ.get("SNAC_WHISPER", Path(__file__).resolve().parents[3] / "shared/models/whisper-base"))


@dataclass
class Planted:
    """A study without arms, its controls judged."""

    resources: StudyResources
    folder: Path


def planted(
    place: Path, speakers: int, pairs: int, *, train_speakers: int | None = None, judges: tuple[str, ...] = ("ge2e",),
    whisper: bool = False,
) -> Planted:  # fmt: skip
    """Synthetic voices that say the same sentences, the bundled base and encoders; Whisper where there is one.

    Nothing is trained here: with `train_speakers`, the other voices of the train split are tested, too.
    """
    speech = synthesize(place / "speech", speakers, 12)
    if train_speakers is not None:
        manifest = speech / "manifest.jsonl"
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        kept = sorted({line["speaker"] for line in lines if line["split"] == "train"})[:train_speakers]
        for line in lines:
            if line["split"] == "train" and line["speaker"] not in kept:
                line["split"] = "test"
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    catalogue = discover()
    rest = tuple(name for name in catalogue.metrics if name not in MEASURED)  # most of the time of judging
    study = StudySettings(
        name="planted", data=str(speech), test_pairs=pairs, pair_seconds=3.0, samples=0, exclude_metrics=rest,
        judges=judges,
    )  # fmt: skip
    resources = StudyResources(study, catalogue)
    if whisper and WHISPER.is_dir():
        vars(resources)["whisper"] = Whisper(WHISPER)
    folder = place / "study"
    folder.mkdir()
    run_controls(folder, resources)
    resources.test_pairs.export(folder / "pairs.json")
    return Planted(resources, folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Enough conversions for large differences."""
    return planted(tmp_path_factory.mktemp("few"), speakers=48, pairs=24, judges=("ge2e", "simple"), whisper=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Enough targets to show non-inferiority by five points: the accuracy of a recogniser depends on the voice."""
    return planted(tmp_path_factory.mktemp("many"), speakers=80, pairs=160, train_speakers=4)


def everywhere(change: Callable[[Conversions, Item, str], Tensor]) -> System:
    """A system from (conversions, item, speaker asked for) to audio."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(
            converted=change(conversions, item, item.pair.target),
            identity=change(conversions, item, item.pair.source_speaker),
            other=change(conversions, item, item.other) if item.other else None,
        )

    return render


def oracle(resources: StudyResources) -> System:
    """The codec's rendering of the target itself, saying the same words."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        def said_by(speaker: str) -> Tensor:
            wanted = conversions.corpus.utterance(item.pair.source.utterance).text
            same = next(u for u in conversions.corpus.of_speaker(speaker) if u.text == wanted)
            return resynthesis(resources.codec, conversions.segment_audio(Segment(same.id, 0.0, same.seconds - 0.002)))

        source = resynthesis(resources.codec, item.audio)
        return Rendering(said_by(item.pair.target), source, said_by(item.other))

    return render


def unconditioned(resources: StudyResources) -> System:
    """The bare codec, whatever the embedding."""
    bare = floor(resources.codec)
    return everywhere(lambda conversions, item, _: bare(conversions, item).converted)


def other_words(resources: StudyResources) -> System:
    """The codec's rendering of the target itself, saying another sentence than the source."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        said = conversions.corpus.utterance(item.pair.source.utterance).text

        def another_by(speaker: str) -> Tensor:
            other = next(u for u in reversed(conversions.corpus.of_speaker(speaker)) if u.text != said)
            return resynthesis(
                resources.codec, conversions.segment_audio(Segment(other.id, 0.0, other.seconds - 0.002))
            )

        source = resynthesis(resources.codec, item.audio)
        return Rendering(another_by(item.pair.target), source, another_by(item.other))

    return render


def noise(_: StudyResources) -> System:
    def hiss(conversions: Conversions, item: Item, speaker: str) -> Tensor:
        return 0.1 * torch.randn(item.audio.shape[-1], generator=torch.Generator().manual_seed(len(speaker)))

    return everywhere(hiss)


def average_voice(resources: StudyResources) -> System:
    """One voice for all targets: pitch and formants shifted to the same values."""

    def one(conversions: Conversions, item: Item, speaker: str) -> Tensor:
        return resynthesis(
            resources.codec, praat_change_gender(item.audio[0], conversions.sample_rate, 150.0, 1.0)[None]
        )

    return everywhere(one)


def change_of_sex(resources: StudyResources) -> System:
    """A low voice for a low target, a high one for a high target, and no other difference."""
    low: dict[str, bool] = {}

    def is_low(conversions: Conversions, speaker: str) -> bool:
        if speaker not in low:
            pitch = mean_log2(conversions.target_audio(speaker, "conditioning"), conversions.sample_rate) or 7.3
            low[speaker] = conversions.corpus.sex(speaker) == "m" if conversions.corpus.sex(speaker) else pitch < 7.3
        return low[speaker]

    def moved(conversions: Conversions, item: Item, speaker: str) -> Tensor:
        hertz, ratio = (105.0, 0.92) if is_low(conversions, speaker) else (200.0, 1.1)
        return resynthesis(
            resources.codec, praat_change_gender(item.audio[0], conversions.sample_rate, hertz, ratio)[None]
        )

    return everywhere(moved)


def attack(resources: StudyResources) -> System:
    """The bare codec's output plus faint noise that the conditioning encoder takes for the target (gradient steps)."""
    bare, speaker_encoder = floor(resources.codec), resources.speaker_encoder

    def fooled(conversions: Conversions, item: Item, speaker: str) -> Tensor:
        clean = bare(conversions, item).converted
        most = 0.02 * float(clean.abs().max())
        delta = torch.zeros_like(clean)
        for _ in range(12):
            delta.requires_grad_(True)
            embedding = speaker_encoder((clean + delta)[None, None], conversions.sample_rate)[0]
            (slope,) = torch.autograd.grad(embedding @ conversions.conditioning[speaker], delta)
            delta = (delta + 0.25 * most * slope.sign()).clamp(-most, most).detach()
        return clean + delta

    return everywhere(fooled)


def judge(study: Planted, **systems: System) -> tuple[StudyEstimates, Verdict, dict[str, Scores]]:
    """The systems as arms of three seeds each, through the report's own code."""
    resources, folder = study.resources, study.folder
    metrics, _ = informative_metrics(folder, resources)
    kept, nothing = {}, ArmSettings(objectives=())
    for path in folder.iterdir():
        if path.name not in ("controls", "pairs.json") and path.is_dir():
            path.rename(folder.parent / f"{folder.name}-{path.name}-{len(list(folder.parent.iterdir()))}")
    for name, system in systems.items():
        kept[name] = score(system, resources.test, metrics)
        for seed in range(3):
            result = Result(folder / name / f"seed{seed}", name, "arm", seed, nothing)
            result.scores, result.noise_floor = kept[name], {"secs": 0.0005}
            write_result(result, resources)
    build(folder)
    results = read(folder)
    numbers = compute(results)
    for (arm, metric), e in numbers.arms.items():
        if metric in ("normalised", "specificity", "overrating", "fragility", "eer", "per", "normalised_content"):
            print(f"{arm:14s} {metric:20s} {e.mean:7.3f} [{e.low:.3f}, {e.high:.3f}]")
    said = verdict(results, numbers)
    print(said.headline, *said.findings, *said.cautions, sep="\n- ")
    return numbers, said, kept


def test_an_oracle_wins_an_unconditioned_arm_is_dead_and_noise_loses_on_content(many: Planted) -> None:
    numbers, said, _ = judge(
        many, oracle=oracle(many.resources), unconditioned=unconditioned(many.resources), noise=noise(many.resources)
    )
    assert numbers.content is not None
    turned = {"better": "worse", "worse": "better"}
    words = {(c.a, c.b): c.decision.word for c in numbers.comparisons}
    words |= {(b, a): turned.get(word, word) for (a, b), word in words.items()}
    assert numbers.ranked[0] == "oracle"
    for c in numbers.comparisons:
        if "oracle" in (c.a, c.b):
            ends = (c.difference.low, c.difference.high) if c.a == "oracle" else (-c.difference.high, -c.difference.low)
            assert ends[0] > 0.3
            assert c.p_adjusted < 0.05
    assert words["oracle", "unconditioned"] == "better"
    assert words["oracle", "noise"] == "better"
    assert said.headline == "oracle is better than the other 2 arms."
    assert numbers.dead == ("unconditioned",)
    assert numbers.arms["noise", "normalised_content"].low > 0.5
    assert numbers.arms["oracle", "normalised_content"].high < 0.5
    assert numbers.arms["oracle", "normalised"].low > 0.5
    assert words["unconditioned", "noise"] == "better"


def test_right_words_in_the_sources_voice_lose_on_the_speaker_and_other_words_in_the_targets_voice_on_content(
    few: Planted,
) -> None:
    numbers, _, _ = judge(
        few, oracle=oracle(few.resources), parrot=unconditioned(few.resources), babbler=other_words(few.resources)
    )
    pairs = {(c.a, c.b): c for c in numbers.comparisons}
    parrot, babbler = pairs["oracle", "parrot"], pairs["babbler", "oracle"]
    assert parrot.difference.low > 0.3
    assert parrot.p_adjusted < 0.05
    assert parrot.decision.word in ("better", "mixed", "inconclusive"), "no measure prefers the source's voice"
    assert babbler.content is not None
    assert babbler.content.low > 0.2
    assert babbler.content_p_adjusted < 0.05
    assert babbler.decision.word == "worse"
    assert numbers.arms["babbler", "normalised"].low > 0.5
    assert numbers.agreement["simple"].arms > 0, "the further judge prefers the target's voice, too"
    measured = [name for name in ("per", "wer") if ("oracle", name) in numbers.arms]
    assert "per" in measured
    for name in measured:
        rates = {arm: numbers.arms[arm, name].mean for arm in ("oracle", "parrot", "babbler")}
        assert rates["babbler"] > max(rates["oracle"], rates["parrot"]) + 0.25


def test_an_average_voice_and_a_change_of_sex_fail_specificity(few: Planted) -> None:
    numbers, said, _ = judge(
        few, average=average_voice(few.resources), sexes=change_of_sex(few.resources), oracle=oracle(few.resources)
    )
    assert numbers.arms["oracle", "specificity"].clears(0.05)
    for name in ("average", "sexes"):
        assert not numbers.arms[name, "specificity"].clears(0)
    (caution,) = [line for line in said.cautions if line.startswith("Specificity is not shown")]
    assert "average" in caution
    assert "sexes" in caution
    assert "oracle" not in caution


def test_an_attack_on_the_speaker_encoder_is_exposed_by_the_judge(few: Planted) -> None:
    _, said, kept = judge(few, attack=attack(few.resources), unconditioned=unconditioned(few.resources))
    by_speaker_encoder, by_judge = (
        {name: kept[name].pooled[metric]["mean"] for name in kept} for metric in ("speaker_encoder_secs", "secs")
    )
    assert by_speaker_encoder["attack"] - by_speaker_encoder["unconditioned"] > 0.2
    assert by_judge["attack"] - by_judge["unconditioned"] < 0.05
    (caution,) = [
        line for line in said.cautions if line.startswith("The conditioning encoder scores higher than the judge")
    ]
    assert "attack" in caution


def test_silence_and_nan_score_worst(few: Planted) -> None:
    numbers, *_ = judge(
        few,
        silence=everywhere(lambda c, item, s: torch.zeros_like(item.audio[0])),
        broken=everywhere(lambda c, item, s: torch.full_like(item.audio[0], float("nan"))),
        unconditioned=unconditioned(few.resources),
    )  # fmt: skip
    for name in ("silence", "broken"):
        assert numbers.arms[name, "secs"].mean == -1
        assert numbers.arms[name, "per"].mean == 1
        assert numbers.ok[name, "secs"] == numbers.ok["unconditioned", "secs"]  # judged, not missing
    assert numbers.ranked[0] == "unconditioned"
