"""What lies in a study's folder, what the logs say, and the commands that read them."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import typer
from small_study import PHASES, Bench, arm, contents, records, result, runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from snac_core.conditioned import ConditionedCodec
from snac_runner import dry_run
from snac_runner.cli import app
from snac_runner.config import compose
from snac_runner.controls import CONTROLS
from snac_runner.data.latents import ImitationCache, LatentCache
from snac_runner.data.pairs import PairList
from snac_runner.dry_run import describe_plan
from snac_runner.logs import RunLog, read_metrics
from snac_runner.train_step import train_step


def test_a_study_folder_holds_what_it_should(finished: Path) -> None:
    expected = {"study.toml", "study.json", "pairs.json", "report.html", "report.md", "report.json", "tables"}
    assert expected | {".lock", "abx.html", "controls", *PHASES} == {path.name for path in finished.iterdir()}
    controls = {"source", "floor", "ceiling", "mismatched", "signal_processing"}
    assert {path.name for path in (finished / "controls").iterdir()} == controls
    for name in PHASES:
        run = {path.name for path in (finished / name / "seed0").iterdir()}
        files = {"config.json", "metrics.jsonl", "training.log", "checkpoint", "model", "result.json", "samples"}
        assert files <= run
        assert any(name.startswith("events.") for name in run)
    study, arms, _ = compose(
        **dict(zip(("shared", "arms"), tomllib.loads((finished / "study.toml").read_text()).values(), strict=True)),
        where="study.toml",
    )
    assert [arm.title for arm in arms] == list(PHASES)
    assert study.steps == 2
    described = json.loads((finished / "study.json").read_text())
    assert described["arms"] == list(PHASES)
    assert PairList.load(finished / "pairs.json").digest == described["pairs"]["digest"]


def test_metrics_and_log_tell_the_same_of_every_step(finished: Path) -> None:
    folder = finished / PHASES[0] / "seed0"
    told = records(folder)
    assert [record["step"] for record in told if "dev" not in record] == [1, 2]
    terms = {f"voice_conversion/{term}" for term in ("recon", "spk_id", "spk_vc")} | {"phase3_contrastive/contrastive"}
    weights = {"recon": 1.0, "spk_id": 0.25, "spk_vc": 2.0, "contrastive": 0.5}
    for record in told:
        if "dev" in record:
            continue
        assert {"epoch", "seconds", "lr", "loss", "spk_id", "spk_vc", "gap", *terms} <= record.keys()
        assert record["gap"] == pytest.approx(record["spk_vc"] - record["spk_id"])
        assert record["spk_vc"] == pytest.approx(record["voice_conversion/spk_vc"])  # raw, not weighted
        total = sum(weights[term.split("/")[1]] * record[term] for term in terms)
        assert record["loss"] == pytest.approx(total, rel=1e-5)  # weighted once
        assert all(math.isfinite(value) for value in record.values())
    lines = (folder / "training.log").read_text().splitlines()
    assert len(lines) == len(told)
    assert all(re.match(r"Epoch \d+, Batch \d+/\d+: ", line) for line in lines)
    assert "gap=" in lines[0]
    assert "voice_conversion/recon=" in lines[0]


def test_where_no_loss_asks_for_audio_the_speaker_encoder_listens_every_tenth_step(
    bench: Bench, tmp_path: Path
) -> None:
    options = bench.options(steps=12, shuffled_control=False, objectives=["code_prediction"])
    assert runner("ablate", "--strategies", "phase6_encoder_adapter", "--out", tmp_path / "study", *options) == 0
    told = [r for r in records(tmp_path / "study" / "phase6_encoder_adapter" / "seed0") if "dev" not in r]
    assert [record["step"] for record in told if "gap" in record] == [1, 11]
    terms = {f"code_prediction/{term}" for term in ("identity", "moved", "restored")}
    assert all(terms | {"phase6_encoder_adapter/commitment", "loss"} <= record.keys() for record in told)


def test_epochs_and_batches_are_counted_from_1(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 3, 0)
    for step in range(1, 8):
        log.write({"step": step, "loss": 0.5})
    log.close()
    lines = (tmp_path / "training.log").read_text().splitlines()
    places = [line.split(":")[0] for line in lines]
    assert places[0] == "Epoch 1, Batch 1/3"
    assert places[2] == "Epoch 1, Batch 3/3"
    assert places[3] == "Epoch 2, Batch 1/3"
    assert places[6] == "Epoch 3, Batch 1/3"
    assert [record["epoch"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 1, 2, 2, 2, 3]


def test_logs_forget_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for resumed_at, steps in ((0, range(1, 6)), (3, range(4, 7))):
        if resumed_at:  # TensorBoard reads files in the order of their names, which have the second of their opening
            time.sleep(1)
        log = RunLog(tmp_path, 10, resumed_at)
        for step in steps:
            log.write({"step": step, "loss": float(step)})
        log.close()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 7, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len((tmp_path / "training.log").read_text().splitlines()) == 6
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_has_the_curves(finished: Path) -> None:
    events = EventAccumulator(str(finished / PHASES[2] / "seed0")).Reload()
    tags = events.Tags()["scalars"]
    assert {"loss", "gap", "spk_id", "spk_vc", "voice_conversion/recon", "dev/judge/ge2e/secs", "dev/score"} <= {*tags}
    assert [event.step for event in events.Scalars("gap")] == [1, 2]


def test_a_result_says_what_it_cost_and_what_it_was_made_with(finished: Path, bench: Bench) -> None:
    found = result(finished / PHASES[2] / "seed0")
    cost = found["cost"]
    assert cost["seconds_alone"] == pytest.approx(cost["seconds_own"] + cost["seconds_shared"])
    assert cost["steps"] == 2
    model = ConditionedCodec.from_pretrained(finished / PHASES[2] / "seed0" / "model", codec=bench.base)
    assert cost["parameters"] == sum(parameter.numel() for _, parameter in model.trained_parameters())
    assert cost["bytes"] >= 4 * cost["parameters"]
    assert cost["peak_memory_bytes"] > 1e8
    assert found["strategies"] == [PHASES[2]]
    assert found["objectives"] == ["voice_conversion"]
    assert found["config"]["arm"]["settings"][PHASES[2]]["kernel"] == 5  # defaults are written out
    assert {"torch", "python", "snac-conditioning", "plugins"} <= found["versions"].keys()
    assert set(found["versions"]["plugins"]) == {PHASES[2], "voice_conversion"}
    assert len(found["utterances"]) == found["pairs"]["n"] == 2
    assert {"changed", "perplexity", "used", "probe_source", "probe_target", "edits"} <= found["codes"].keys()
    assert found["noise_floor"]["secs"] >= 0
    assert found["started"] <= found["ended"]
    assert found["command"].split()[0] == "runner"


def test_samples_are_the_same_pairs_everywhere(finished: Path) -> None:
    wavs = {path.name for path in (finished / PHASES[2] / "seed0" / "samples").iterdir()}
    pair = result(finished / PHASES[2] / "seed0")["utterances"][0]["pair"]
    assert wavs == {f"{pair}.wav", f"{pair}.identity.wav", "worst"}
    assert {path.name for path in (finished / "controls" / "source" / "samples").iterdir()} == wavs - {"worst"}
    assert {path.name for path in (finished / "controls" / "ceiling" / "samples").iterdir()} == {f"{pair}.wav"}
    assert soundfile.info(finished / PHASES[2] / "seed0" / "samples" / f"{pair}.wav").samplerate == 16000


def test_the_same_command_again_changes_nothing(
    bench: Bench, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "study"
    shutil.copytree(finished, copy, copy_function=shutil.copy2)
    before = contents(copy)
    assert runner("ablate", "--strategies", ",".join(PHASES), "--out", copy, *bench.options(steps=2)) == 0
    after = contents(copy)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    runs = [name for name in before if name.startswith((*PHASES, "controls"))]
    assert runs
    assert all(after[name] == before[name] for name in runs)
    assert str(copy / "report.html") in capsys.readouterr().out


def test_report_reads_the_result_files_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in finished.rglob("*"):
        kept = path.name in ("result.json", "study.json", "pairs.json", "metrics.jsonl") or path.suffix == ".wav"
        if path.is_file() and kept:
            place = tmp_path / "study" / path.relative_to(finished)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
    assert runner("report", tmp_path / "study") == 0
    told = capsys.readouterr().out
    assert all(name in told for name in PHASES)
    assert told.strip().endswith("report.html")
    assert (tmp_path / "study" / "report.json").read_bytes() == (finished / "report.json").read_bytes()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text(
        f'[study]\nname = "planned"\nseeds = [0, 1]\nlr = [1e-3, 1e-2]\n[[arm]]\nstrategies = ["{PHASES[1]}"]\n'
        f'[[arm]]\nname = "gentle"\nstrategies = ["{PHASES[2]}"]\nweight_decay = 0.5\n'
        f"{PHASES[2]}.hidden_dim = 8\n"
    )
    before = contents(tmp_path)
    out = tmp_path / "out"
    assert runner("ablate", tmp_path / "study.toml", "--dry-run", "--out", out, *bench.options(steps=9)) == 0
    told = capsys.readouterr().out
    assert "2 arm(s) x 2 seed(s), 9 steps each" in told
    gentle = next(line for line in told.splitlines() if line.strip().startswith("gentle:"))
    assert "weight_decay = 0.5" in gentle
    assert "'hidden_dim': 8" in gentle
    assert "steps" not in gentle
    assert f"{PHASES[1]}: default settings" in told
    assert "each arm tries lr 0.001, 0.01 on seed 0 first" in told
    assert re.search(r"time: about \d+", told)
    assert re.search(r"memory: [\d.]+ GiB in a step of", told)
    assert re.search(r"minimum detectable effect in normalised SECS, .*: about \d", told)
    assert contents(tmp_path) == before
    assert not out.exists()


def test_a_dry_run_estimates_latent_caches_from_a_few_utterances_and_builds_none(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache"))
    computed: list[str] = []
    for kind in (LatentCache, ImitationCache):
        tensors = kind.tensors
        monkeypatch.setattr(kind, "tensors", lambda *given, of=tensors: computed.append("") or of(*given))
    options = ["--strategies", PHASES[2], "--out", tmp_path / "out"]
    options += bench.options(latent_cache=True, imitations=1, exclude_metrics=["per", "stoi", "pesq", "distillmos"])
    assert runner("ablate", "--dry-run", *options) == 0
    said = capsys.readouterr()
    size = bench.resources(bench.study(latent_cache=True)).latent_cache().size / 1e6
    assert float(re.search(r"latent cache: (\d+) MB are not on disk; computing them takes about \d+", said.out)[1]) == (
        pytest.approx(2 * size, abs=1)
    )
    assert "latents, of a few utterances: 4/4" in said.err
    assert "imitated voice 1, of a few utterances: 4/4" in said.err
    assert len(computed) == 2 * 5  # the first one warms up
    assert not list((tmp_path / "cache").rglob("latents/**/*.safetensors"))
    resources = bench.resources(bench.study(latent_cache=True, imitations=1))
    _ = resources.latents, resources.imitations  # builds them
    computed.clear()
    assert runner("ablate", "--dry-run", *options) == 0
    assert "latent cache: " not in capsys.readouterr().out
    assert not computed


def test_a_plan_for_a_large_batch_trains_on_a_part_of_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def watched(arms: Any, batch: Any, context: Any) -> Any:
        parts = list(batch)
        shapes.extend(tuple(part.frozen.audio.shape) for part in parts)
        return train_step(arms, parts, context)

    monkeypatch.setattr(dry_run, "train_step", watched)
    resources = bench.resources(bench.study(batch_size=6, crop_seconds=0.8, accumulate=2))
    monkeypatch.setattr(dry_run, "WHOLE", (math.inf, math.inf))  # on a busy machine too
    arms, whole = [arm(PHASES[1])], (3, 1, round(0.8 * resources.codec.sampling_rate))
    plan = describe_plan(arms, (), resources)
    assert "estimated" not in plan
    assert shapes.count(whole) == 2 * dry_run.TRIED_STEPS, "a small batch is measured as a whole, in its parts"
    shapes.clear()
    monkeypatch.setattr(dry_run, "WHOLE", (0.0, 0))
    plan = describe_plan(arms, (), resources)
    assert "estimated for 6 x 0.8 s from steps of 2 x 0.5 s" in plan
    assert set(shapes) == {(2, 1, round(0.5 * resources.codec.sampling_rate))}
    assert resources.batches(0).batch_size == 6


def test_a_plan_announces_content_by_the_smallest_margin(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {margin: SimpleNamespace(role="content", margin=margin, outputs=()) for margin in (0.05, 0.01)}
    monkeypatch.setattr(dry_run, "_training", lambda arms, _: (1.0, {}, None))
    monkeypatch.setattr(dry_run, "_evaluation", lambda *_: 1.0)
    monkeypatch.setattr(dry_run, "wanted_metrics", lambda _: (metrics, {}))
    plan = describe_plan([arm(PHASES[1])], (), bench.resources(bench.study(test_pairs=2, dev_pairs=0)))
    assert "must also be shown to add less than 1 points of content errors" in plan


def test_the_time_of_a_plan_is_that_of_all_that_is_trained_and_evaluated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_training", lambda arms, _: (10.0, {}, None))  # s of a step of both arms
    monkeypatch.setattr(dry_run, "_evaluation", lambda _, resources, metrics: 1000.0 if "per" in metrics else 1.0)
    study = bench.study(seeds=(0, 1), steps=4, eval_every=2, dev_pairs=2, test_pairs=2, shuffled_control=True)
    plan = describe_plan([arm(PHASES[1]), arm(PHASES[2])], (1e-3, 1e-2, 1e-1), bench.resources(study))
    # both arms, a seed each and two rates that are not chosen, and the shuffled arm, at half of 10 s
    trained = 2 * (2 + 2) + 1
    training, on_dev = trained * 4 * 5, trained * 2 * 2
    on_test = (2 * 2 + 1 + len(CONTROLS)) * 2 * 1000
    assert f"time: about {(training + on_dev + on_test) / 3600:.1f} h" in plan


def test_plugins_lists_every_kind_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner("plugins") == 0
    told = capsys.readouterr().out
    for name, words in {
        PHASES[1]: ["adapter", "after_vq"],
        PHASES[2]: ["adapter", "before_vq", "latent"],
        "voice_conversion": ["objective", "loss"],
        "ge2e": ["speaker encoder"],
        "si_sdr": ["metric", "dB", "(up)"],
    }.items():
        line = next(line for line in told.splitlines() if line.startswith(f"{name} "))
        assert all(word in line for word in words), line
        assert "snac-conditioning 0." in line


def test_plugins_show_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from snac_core.plugins import discover
    from snac_core.settings import accepted, default_of

    found = discover().strategies
    for name in found:
        assert runner("plugins", "show", name) == 0
        told = capsys.readouterr().out
        for key, field in found[name].Config.model_fields.items():
            line = next(line for line in told.splitlines() if line.strip().startswith(f"{key} = "))
            assert f"{key} = {default_of(field)} ({accepted(field)}): " in line
            assert field.description
            assert field.description in line
        for term, weight in found[name].default_weights.items():
            assert f"{name}/{term}: default weight {weight:g}" in told


def test_help_is_there_for_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    def words(group: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = []
        for name, command in group.commands.items():
            below = words(command, (*above, name)) if hasattr(command, "commands") else []
            found += below or [(*above, name)]
        return found

    commands = words(typer.main.get_command(app))
    assert len(commands) > 15
    for command in commands:
        assert runner(*command, "--help") == 0
        assert f"runner {' '.join(command)}" in capsys.readouterr().out.split("Example:")[1], command
