"""What a training protocol gets wrong without anybody noticing, and this one must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_study import PHASES, Bench, arm, contents, records, result, runner, weights

import snac_runner.train as train
from snac_core.checkpoint import state_of
from snac_core.errors import UserError
from snac_core.frozen import FrozenActivations
from snac_runner.arm import Arm
from snac_runner.distributed import ALONE
from snac_runner.evaluate.scoring import Scores
from snac_runner.logs import read_metrics
from snac_runner.resources import TrainingBatch
from snac_runner.study import choose_rates
from snac_runner.train_step import train_step


def test_speakers_of_dev_and_test_are_never_trained_on(bench: Bench) -> None:
    resources = bench.resources(bench.study())
    train_, dev, test = (set(resources.corpus.speakers(split)) for split in ("train", "dev", "test"))
    assert not train_ & dev
    assert not train_ & test
    assert not dev & test
    batches = resources.batches(0)
    seen = {speaker for step in range(1, 30) for speaker in batches.at(step).speakers}
    assert seen == train_  # all of them, and no other
    assert set(resources.table.names) == train_  # targets and negatives are drawn from this table alone
    assert {pair.source_speaker for pair in resources.dev.pairs.pairs} <= dev
    assert {pair.target for pair in resources.test.pairs.pairs} <= test


def test_what_conditions_is_not_what_scores(bench: Bench) -> None:
    resources = bench.resources(bench.study())
    assert not torch.equal(resources.table.conditioning, resources.table.reference)
    for conversions in (resources.dev, resources.test):
        for roles in conversions.pairs.references.values():
            scoring = {segment.utterance for segment in roles["scoring"]}
            assert not scoring & {segment.utterance for segment in roles["conditioning"]}
            assert not scoring & {segment.utterance for segment in roles["ceiling"]}
        for pair in conversions.pairs.pairs:
            assert pair.source_speaker != pair.target
            scoring = {s.utterance for s in conversions.pairs.references[pair.source_speaker]["scoring"]}
            assert pair.source.utterance not in scoring


@pytest.mark.parametrize("names", [("simple", "simple"), ("ecapa_tiny", "ecapa_tiny")])
def test_the_judge_is_never_the_speaker_encoder(bench: Bench, names: tuple[str, str]) -> None:
    study = bench.study(speaker_encoder=names[0], judges=(names[1],))
    resources = bench.resources(study)
    for part in ("speaker_encoder", "judges"):
        vars(resources).pop(part, None)
    with pytest.raises(
        UserError, match=r"ranking would only show what the arms were trained on; possible judges: .*ge2e"
    ):
        _ = resources.judge


def test_training_logs_are_the_teachers_and_what_a_judge_measures_is_named_so(bench: Bench, tmp_path: Path) -> None:
    folder = bench.train([arm(PHASES[1])], tmp_path, steps=1)[PHASES[1]]
    step, dev = records(folder)
    assert {"spk_id", "spk_vc", "gap", "voice_conversion/recon"} <= step.keys()
    judged = {key for key in dev["dev"] if key not in ("score", "speaker_encoder/simple/secs")}
    assert judged
    assert all(key.startswith("judge/ge2e/") for key in judged)
    found = result(folder)
    assert found["speaker_encoder"]["name"] == "simple"
    assert [judge["name"] for judge in found["judges"]] == ["ge2e"]
    assert found["split"] == "test"


def test_the_best_checkpoint_is_chosen_by_judged_conversion_and_written(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    judged = train.evaluate_on_dev
    scores = {1: 1.5, 2: 0.7, 3: 0.9}

    def judging(one: Arm) -> dict[str, float]:
        states[one.progress.step] = {key: value.clone() for key, value in state_of(one.model.attached).items()}
        return judged(one)

    monkeypatch.setattr(train, "evaluate_on_dev", judging)
    monkeypatch.setattr(train, "dev_score", lambda pooled: scores[len(states)])
    pooled = {name: {"mean": 0.0} for name in train.DEV_METRICS}
    monkeypatch.setattr(train, "score", lambda *_, **__: Scores(pooled=pooled))
    monkeypatch.setattr("snac_runner.unit.evaluate_system", lambda *_, **_given: Scores())
    best = bench.train([arm(PHASES[2], lr=0.1)], tmp_path / "best", steps=3, eval_every=1, select="best")
    assert not torch.equal(*(states[step]["phase6_encoder_adapter.adapters.latent.output.weight"] for step in (2, 3)))
    assert all(torch.equal(value, states[2][key]) for key, value in weights(best[PHASES[2]]).items())
    states.clear()
    last = bench.train([arm(PHASES[2], lr=0.1)], tmp_path / "last", steps=3, eval_every=1, select="last")
    assert all(torch.equal(value, states[3][key]) for key, value in weights(last[PHASES[2]]).items())


def test_the_dev_score_counts_conversion_and_identity_by_the_judge() -> None:
    pooled = {"spk_vc": {"mean": 0.5}, "spk_id": {"mean": 0.25}, "speaker_encoder_secs": {"mean": 9.0}}
    assert train.dev_score(pooled) == 0.75


def test_every_arm_tries_the_same_rates_and_takes_its_own_best_on_dev(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = bench.study(steps=1, seeds=[0, 1])
    resources = bench.resources(study)
    arms, rates, tried = [arm(PHASES[1]), arm(PHASES[2])], [1e-3, 1e-1], []
    wanted = {(PHASES[1], 1e-3): 0.1, (PHASES[1], 1e-1): 0.2, (PHASES[2], 1e-3): 0.4, (PHASES[2], 1e-1): 0.3}

    def judging(one: Arm) -> dict[str, float]:
        tried.append((one.settings.strategies[0], one.settings.lr, one.seed))
        one.progress.finished = True
        return {"score": wanted[one.settings.strategies[0], one.settings.lr]}

    monkeypatch.setattr(train, "evaluate_on_dev", judging)
    heard: list[Any] = []  # test speakers have no say in this, and are not heard
    monkeypatch.setattr("snac_runner.unit.evaluate_system", lambda *given, **_: heard.append(given))
    monkeypatch.setattr("snac_runner.unit.noise_floor", lambda *given: heard.append(given))
    chosen = choose_rates(arms, rates, tmp_path, resources)
    assert sorted(tried) == [(name, rate, 0) for name in PHASES[1:] for rate in rates]  # equal trials, on one seed
    assert [one.lr for one in chosen] == [1e-3, 1e-1]
    assert [one.title for one in chosen] == [one.title for one in arms]
    before = contents(tmp_path)
    choose_rates(arms, rates, tmp_path, resources)
    assert contents(tmp_path) == before
    assert all("dev" in read_metrics(path)[-1] for path in tmp_path.rglob("metrics.jsonl"))
    assert not heard
    assert not any((tmp_path / one.title / "seed0" / "result.json").exists() for one in arms)  # the winner is yet to be


def test_targets_are_other_training_speakers_and_differ_from_step_to_step(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study())
    one = Arm.new(arm(PHASES[2]), 0, tmp_path, resources)
    drawn = set()
    for step in range(1, 40):
        speakers = resources.table.indices(resources.batches(0).at(step).speakers)
        targets = one.sampler.targets(speakers, step, 1)
        assert not (targets == speakers).any()
        drawn |= set(zip(speakers.tolist(), targets.tolist(), strict=True))
    count = len(resources.table.names)
    assert len(drawn) == count * (count - 1)  # every speaker into every other


def test_the_base_and_the_speaker_encoder_are_frozen_whatever_the_mode(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study())
    frozen = {"codec": resources.codec, "speaker_encoder": resources.speaker_encoder}
    before = {n: {k: v.clone() for k, v in module.state_dict().items()} for n, module in frozen.items()}
    one = Arm.new(arm(*PHASES), 0, tmp_path, resources)
    one.model.train()
    batch = resources.batches(0).at(1)
    speakers = resources.table.indices(batch.speakers)
    for index in (1, 2):
        frozen_codec = FrozenActivations(resources.codec, batch.audio)
        targets = one.sampler.targets(speakers, index, 1)
        train_step([one], [TrainingBatch(index, frozen_codec, speakers, targets)], ALONE).checked()
    optimised = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
    for name, module in frozen.items():
        assert not any(part.training for part in module.modules())
        assert all(torch.equal(value, before[name][key]) for key, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())
        assert not optimised & {id(parameter) for parameter in module.parameters()}
    assert not resources.table.reference.requires_grad


def test_seeds_and_digests_are_recorded(finished: Path) -> None:
    for name in PHASES:
        found = result(finished / name / "seed0")
        assert found["seed"] == 0
        assert found["config"]["seed"] == 0
        assert len(found["config_hash"]) == 64
        assert all(len(digest) == 64 for digest in found["digests"].values())
    assert result(finished / "controls" / "floor")["seed"] is None


def test_scores_do_not_depend_on_where_the_data_lies(bench: Bench, tmp_path: Path) -> None:
    here = bench.resources(bench.study())
    moved = tmp_path / "elsewhere"
    moved.symlink_to(bench.speech)
    there = bench.resources(bench.study(data=str(moved)))
    vars(there).pop("corpus")
    from snac_runner.run_folder import run_config

    configs = [run_config(arm(PHASES[2]), 0, m)["hash"] for m in (here, there)]
    assert configs[0] == configs[1]


def test_a_run_trained_by_the_command_is_the_arm_of_the_study(bench: Bench, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "arm.json").write_text(json.dumps({"strategies": [PHASES[2]], "steps": 2}))
    options = bench.options()
    place = options.index("--steps")
    del options[place : place + 2]  # the file says how many
    assert runner("train", "--config", tmp_path / "arm.json", "--out", tmp_path / "run", *options) == 0
    ours, theirs = weights(tmp_path / "run"), weights(finished / PHASES[2] / "seed0")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert result(tmp_path / "run")["metrics"] == result(finished / PHASES[2] / "seed0")["metrics"]
    assert load_file(tmp_path / "run" / "model" / "model.safetensors").keys() == ours.keys()
