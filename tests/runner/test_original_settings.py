"""Configuration files of the original phases 3, 4 and 6 mean here what they meant, and say what has no meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from small_study import Bench, runner

from snac_core.errors import UserError
from snac_core.legacy import LegacyKeys
from snac_core.plugins import Origin, discover
from snac_core.settings import validated
from snac_core.strategy import Strategy
from snac_runner.config import ArmSettings, StudySettings, compose, read_values
from snac_runner.legacy_config import is_original, translated
from snac_runner.resources import StudyResources

CONFIGS = Path(__file__).parents[2] / "configs"
NATIVE = CONFIGS / "native.toml"
ORIGINAL = {
    "phase3": Path(__file__).parent / "original" / "phase3.json",
    "phase4": CONFIGS / "phase4_gan_semantic_negatives.json",
    "phase6": CONFIGS / "phase6_adapters.json",
}
PHASES = tuple(ORIGINAL)
STRATEGIES = discover().strategies


def loaded(phase: str, **changes: Any) -> tuple[StudySettings, ArmSettings, list[str]]:
    """Study, arm and remarks of an original file, with changes."""
    settings, remarks = translated({**read_values(ORIGINAL[phase]), **changes}, f"{phase}.json", STRATEGIES)
    arm = {key: settings.pop(key) for key in ("strategies", "objectives")}
    study, arms, _ = compose(settings, [arm], phase)
    return study, arms[0], remarks


def full(arm: ArmSettings) -> dict[str, Any]:
    """Everything an arm is trained with, defaults written out."""
    return {
        "settings": {name: validated(STRATEGIES[name], arm.settings.get(name, {})) for name in arm.all_strategies},
        **arm.model_dump(exclude={"name", "settings"}),
    }


@pytest.mark.parametrize("phase", PHASES)
def test_an_original_file_means_what_the_native_recipe_says(phase: str) -> None:
    _, arm, _ = loaded(phase)
    values = read_values(NATIVE)
    native = {a.title: a for a in compose(values["study"], values["arm"], "native")[1]}[phase]
    assert full(arm) == full(native)


@pytest.mark.parametrize("phase", PHASES)
def test_what_all_arms_share_comes_along(phase: str) -> None:
    study, _, _ = loaded(phase)
    assert study.base == "hubertsiuzdak/snac_24khz"
    assert study.data == "data/train"
    assert (study.batch_size, study.crop_seconds) == {"phase3": (4, 4.0), "phase4": (24, 2.0), "phase6": (32, 2.0)}[
        phase
    ]
    assert study.workers == (4 if phase == "phase3" else 8)
    assert study.speaker_encoder == ("ecapa" if phase == "phase3" else "eres2netv2")
    assert study.name.startswith(phase)


def test_every_key_without_meaning_is_named_with_its_reason() -> None:
    remarks = loaded("phase4")[2]
    for key in ("speaker_emb_dim", "val_data", "num_epochs", "early_stopping_patience", "output_dir",
                "comment"):  # fmt: skip
        assert sum(f": {key} has no meaning here: " in remark for remark in remarks) == 1, key
    assert len(remarks) == 8, "and nothing else is, but as which phase the file is read, and where the index is"


def test_the_index_of_an_original_file_is_the_bank_of_the_study(tmp_path: Path) -> None:
    study, _, remarks = loaded("phase4")
    assert study.bank == "data/faiss.bank", "beside the file of the original program, which is not touched"
    assert (
        "faiss_index_path and embedding_cache_path: embeddings and index are in one folder, data/faiss.bank"
        in (remarks[-1])
    )
    assert loaded("phase4", faiss_index_path=str(tmp_path))[0].bank == str(tmp_path), "a folder is taken as it is"
    assert loaded("phase4", faiss_index_path="", embedding_cache_path="")[0].bank == "auto"
    off, _, said = loaded("phase4", use_faiss_hard_negatives=False)
    assert off.bank == "none"
    assert said[-1].endswith("faiss_index_path and embedding_cache_path: no effect without use_faiss_hard_negatives")
    unused, _, said = loaded("phase4", contrastive_weight=0)
    assert unused.bank == "auto"
    assert sum("has no effect: nothing is drawn from an index" in remark for remark in said) == 2
    assert loaded("phase4", bank="none")[0].bank == "none", "the setting of today wins"
    assert loaded("phase3")[0].bank == "none", "the file draws from the speakers"
    with pytest.raises(UserError, match="faiss_index_path = 3; expected a path"):
        loaded("phase4", faiss_index_path=3)


def test_an_unknown_key_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"phase6\.json: unknown key 'lambda_speaker_vcc'.*'lambda_speaker_vc'"):
        loaded("phase6", lambda_speaker_vcc=2.0)


def test_what_is_switched_off_is_left_out() -> None:
    _, arm, _ = loaded("phase6", gan_weight=0, use_synthetic_vc=False, contrastive_weight=0)
    assert arm.all_strategies == ["phase6_encoder_adapter", "voice_conversion"]
    assert set(arm.settings) == {"phase6_encoder_adapter", "voice_conversion"}
    assert {term.split("/")[0] for term in arm.weights} == {"voice_conversion", "phase6_encoder_adapter"}
    assert arm.betas == (0.9, 0.999), "those of Adam where there is no adversary"
    assert loaded("phase4", use_formant_shift=False)[1].settings["synthetic_vc"]["formants"] == []
    _, random, _ = loaded("phase4", use_stratified_negatives=False, use_faiss_hard_negatives=False)
    assert "negatives" not in random.settings["phase3_contrastive"]


def test_a_key_without_effect_in_its_file_is_named_with_what_would_turn_it_on() -> None:
    values = {"lambda_adv": 1.0, "mpd_periods": [2, 3], "disc_learning_rate": 1e-5, "max_negatives": 8,
              "pitch_shift_range": [-1, 1], "use_formant_shift": True, "lambda_synthetic": 0.3}  # fmt: skip
    settings, remarks = translated({"learning_rate": 1e-4, **values}, "mine.json", STRATEGIES)
    assert settings["objectives"] == ["voice_conversion"]
    assert "discriminator_lr" not in settings
    for key, switch in zip(
        values, ("gan_weight",) * 3 + ("contrastive_weight",) + ("use_synthetic_vc",) * 3, strict=True
    ):
        said = [remark for remark in remarks if f": {key} has no effect: " in remark]
        assert len(said) == 1, key
        assert said[0].endswith(f"which this file does not use; {switch} turns it on")
    off = loaded("phase6", gan_weight=0, use_synthetic_vc=False, contrastive_weight=0)[2]
    assert not [remark for remark in off if ": contrastive_weight has no effect" in remark], "it says so itself"
    strata = loaded("phase4", use_stratified_negatives=False, use_faiss_hard_negatives=False)[2][-2]
    assert "neg_ratio_easy" in strata
    assert strata.endswith(": no effect without use_stratified_negatives")


def test_the_adversarys_weight_multiplies_its_two_terms() -> None:
    weights = loaded("phase4", gan_weight=0.5, lambda_adv=3.0)[1].weights
    assert (weights["adversarial/adv"], weights["adversarial/features"]) == (1.5, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("freeze_base", False, "always frozen"),
        ("gan_weight", "much", "expected a number"),
        ("adapter_num_layers", 1, "at least 2"),
        ("segment_length", "long", "crop_seconds"),
        ("max_negatives", 0, "max_negatives"),
        ("learning_rate", -1.0, "lr = -1.0"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        full(loaded("phase6", **{key: value})[1])


def test_settings_of_today_are_no_original_file_and_may_stand_in_one() -> None:
    assert not is_original({"strategies": ["phase4_decoder_film"], "batch_size": 4, "lr": 1e-3}, STRATEGIES)
    assert not is_original(read_values(NATIVE), STRATEGIES)
    study, arm, _ = loaded("phase3", steps=7, warmup_steps=3)
    assert (study.steps, arm.warmup_steps) == (7, 3)


def test_comments_of_json_are_left_out_and_strings_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{ // one\n"base": "https://host//x", "name": "a \\"// b", // "data": "no"\n"steps": 3}//end')
    assert read_values(path) == {"base": "https://host//x", "name": 'a "// b', "steps": 3}
    path.write_text('{"steps": 3 / 4}')
    with pytest.raises(UserError, match="not a valid JSON file"):
        read_values(path)


def small_original(folder: Path, bench: Bench) -> Path:
    """A phase 6 file on the small base, as somebody who adapts an old file would write it."""
    values = read_values(ORIGINAL["phase6"]) | {
        "pretrained_model": str(bench.base), "train_data": str(bench.speech), "speaker_encoder_type": "simple",
        "segment_length": 0.4, "batch_size": 3, "adapter_hidden_dim": 8, "save_every_steps": 2,
        "gan_weight": 0.1, "n_ffts": [512],
    }  # fmt: skip
    (folder / "phase6.json").write_text("// adapted\n" + json.dumps(values, indent=1))
    return folder / "phase6.json"


def test_train_and_ablate_take_an_original_file(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small_original(tmp_path, bench)
    options = ["--steps", 2, "--judge", "ge2e", "--set", "test_pairs=2", "--set", "dev_pairs=2",
               "--set", "pair_seconds=1.0", "--set", "samples=0"]  # fmt: skip
    given: list[tuple[StudySettings, Any]] = []

    def describe_plan(arms: Any, rates: Any, resources: StudyResources) -> str:
        given.append((resources.study, arms))
        return "as planned"

    def run_arms(arms: Any, runs: Any, resources: StudyResources, **_: Any) -> None:
        given.append((resources.study, arms))
        raise UserError("nothing is trained in this test")

    monkeypatch.setattr("snac_runner.dry_run.describe_plan", describe_plan)
    monkeypatch.setattr("snac_runner.study.run_arms", run_arms)
    assert runner("ablate", file, "--dry-run", "--seeds", 2, *options) == 0
    assert runner("train", "--config", file, "--out", tmp_path / "run", *options) == 2, "nothing was trained"
    assert "num_epochs has no meaning here" in " ".join(capsys.readouterr().err.split())
    assert [given[0][0].seeds, given[1][0].seeds] == [(0, 1), (0,)]
    for study, (arm,) in given:
        assert (study.steps, study.batch_size, study.crop_seconds) == (2, 3, 0.4)
        assert arm.all_strategies == [
            "phase6_encoder_adapter", "voice_conversion", "phase3_contrastive", "synthetic_vc", "adversarial",
        ]  # fmt: skip
    file.write_text(file.read_text().replace('"lambda_fm"', '"lambda_gm"'))
    assert runner("train", "--config", file, "--out", tmp_path / "other", *options) == 2
    assert "did you mean 'lambda_fm'" in " ".join(capsys.readouterr().err.split())


def test_a_weights_own_key_wins_wherever_it_stands() -> None:
    keys = {"lambda_speaker_identity": 0.25, "lambda_speaker_vc": 2.0, "lambda_speaker_matching": 0.5}
    for order in (list(keys), list(reversed(keys))):
        found, _ = translated({"adapter_type": "film", **{key: keys[key] for key in order}}, "f.json", STRATEGIES)
        assert found["weights"]["voice_conversion/spk_id"] == 0.25
        assert found["weights"]["voice_conversion/spk_vc"] == 2.0


class Gate(Strategy):
    """A third party's strategy with keys of its own."""

    name = "gate"
    default_weights = {"open": 1.0}  # noqa: RUF012
    legacy_keys = LegacyKeys(
        places={"gate_width": "width", "lambda_open": "weights.open", "gate_lr": "arm.lr"},
        known_by=("gate_width",),
        defaults={"gate_slope": 2},
        computed_from=("gate_slope",),
        ignored={"gate_colour": "gates have no colour"},
        compute=lambda values, is_adapter: {"slope": values["gate_slope"] * 10 if is_adapter else 0},
        remark=lambda values: "gate_lr: no effect without gate_width" if "gate_width" not in values else None,
    )

    class Config(Strategy.Config):
        width: int = Field(3, description="Width.")
        slope: int = Field(1, description="Slope.")


def test_a_third_partys_strategy_can_own_keys_of_an_original_file() -> None:
    catalogue = discover()
    catalogue.strategies.add(Gate, Origin("gate"))
    values = {"gate_width": 5, "lambda_open": 0.5, "gate_colour": "red", "gan_weight": 0.2, "pretrained_model": "tiny"}
    assert is_original(values, catalogue.strategies)
    assert not is_original({"gate_width": 5}, STRATEGIES)
    settings, remarks = translated(values, "f.json", catalogue.strategies)
    assert (settings["strategies"], settings["base"]) == (["gate"], "tiny")
    assert settings["objectives"] == ["voice_conversion", "adversarial"]
    assert settings["gate"] == {"width": 5, "slope": 20}
    assert settings["weights"]["gate/open"] == 0.5
    assert remarks[0] == "f.json: read as gate, because of gate_width"
    assert "f.json: gate_slope is not given; the original's 2 is used" in remarks
    assert "f.json: gate_colour has no meaning here: gates have no colour" in remarks
    other = translated({"adapter_type": "film", "gate_slope": 3}, "f.json", catalogue.strategies)[1]
    assert "f.json: gate_slope has no effect: it is of gate, which this file does not use" in other


def test_a_file_says_as_which_phase_it_is_read_and_what_it_takes_from_the_original() -> None:
    found, remarks = translated({"lambda_speaker_vc": 2.0}, "f.json", STRATEGIES)
    assert found["phase6_encoder_adapter"] == {"adapter_type": "film", "hidden_dim": 512, "num_layers": 1}
    assert found["lr"] == 1e-4
    assert remarks[0] == "f.json: read as phase6_encoder_adapter, because of lambda_speaker_vc"
    assert "f.json: adapter_type is not given; the original's 'film' is used" in remarks
    assert "because it has no key of another phase" in translated({"max_negatives": 8}, "f.json", STRATEGIES)[1][0]
