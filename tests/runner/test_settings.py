"""Study files, arms as diffs, overrides: what they mean, and what is said of mistakes in them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_core.errors import UserError
from snac_runner.config import (
    RENAMED,
    RENAMED_IN_ARM,
    ArmSettings,
    StudySettings,
    compose,
    read_values,
    to_toml,
    with_data,
    with_overrides,
    with_plugins,
)

STUDY = """
[study]
name = "position_x_objective"
seeds = [0, 1, 2]
objectives = ["voice_conversion"]
lr = [3e-4, 1e-3]
warmup_steps = 3
phase6_encoder_adapter.kernel = 3
weights."voice_conversion/spk_id" = 0.5

[[arm]]
name = "phase6+contrastive"
strategies = ["phase6_encoder_adapter", "phase3_contrastive"]
phase3_contrastive.path = false
phase6_encoder_adapter.hidden_dim = 32
weights."voice_conversion/spk_vc" = 1.0

[[arm]]
strategies = ["phase4_decoder_film"]
weight_decay = 0.0
"""


def composed(text: str) -> tuple[StudySettings, list[ArmSettings], list[float]]:
    """A study file's study, arms and rates."""
    values = tomllib.loads(text)
    return compose(values["study"], values["arm"], "study.toml")


def test_an_arm_is_the_study_with_a_diff() -> None:
    study, (first, second), rates = composed(STUDY)
    assert study.seeds == (0, 1, 2)
    assert rates == [3e-4, 1e-3]
    assert first.title == "phase6+contrastive"
    assert first.all_strategies == ["phase6_encoder_adapter", "phase3_contrastive", "voice_conversion"]
    assert first.settings == {
        "phase6_encoder_adapter": {"kernel": 3, "hidden_dim": 32},
        "phase3_contrastive": {"path": False},
    }
    assert first.weights == {"voice_conversion/spk_id": 0.5, "voice_conversion/spk_vc": 1.0}
    assert second.title == "phase4_decoder_film"
    assert second.settings == {}
    assert second.weights == {"voice_conversion/spk_id": 0.5}
    assert (first.weight_decay, second.weight_decay) == (1e-5, 0.0)
    assert first.warmup_steps == second.warmup_steps == 3


def test_arms_without_a_diff_are_equal_but_for_their_strategies() -> None:
    _, arms, _ = compose({}, [{"strategies": ["a"]}, {"strategies": ["b"]}], "here")
    assert arms[0].model_copy(update={"strategies": ("b",)}) == arms[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('[study]\nsteps = 5\nstpes = 4\n[[arm]]\nstrategies = ["a"]', r"unknown key 'stpes'; did you mean 'steps'"),
        ('[study]\n[[arm]]\nstrategies = ["a"]\nweigths = {}', r"unknown key 'weigths', .*; did you mean 'weights'"),
        ('[study]\n[[arm]]\nname = "x"\nstrategies = ["a"]\nsteps = 3', r"arm 'x': 'steps' is shared by all arms"),
        ('[study]\n[[arm]]\nstrategies = ["a"]\nb.path = false', r"unknown key 'b'"),
        ('[study]\n[[arm]]\nstrategies = ["alpha"]\nalhpa.path = 1', r"unknown key 'alhpa', .*; did you mean 'alpha'"),
        ('[study]\n[[arm]]\nstrategies = ["a"]\n[[arm]]\nstrategies = ["a"]', r"two arms are called 'a'"),
        ('[study]\n[[arm]]\nname = "empty"', r"arm 'empty' has no strategies"),
        ('[study]\n[[arm]]\nname = "../up"\nstrategies = ["a"]', r"'../up' cannot be the name of an arm"),
        ('[study]\n[[arm]]\nname = "controls"\nstrategies = ["a"]', r"cannot be the name of an arm"),
        ('[study]\nlr = [1e-3, -1]\n[[arm]]\nstrategies = ["a"]', r"expected a positive number, or a list"),
        ('[study]\nseeds = [1, 1]\n[[arm]]\nstrategies = ["a"]', r"a seed is listed twice"),
        ('[study]\nseeds = []\n[[arm]]\nstrategies = ["a"]', r"seeds = \[\]"),
        ('[study]\nsteps = "many"\n[[arm]]\nstrategies = ["a"]', r"steps = 'many'.*integer"),
        ('[study]\nselect = "worst"\n[[arm]]\nstrategies = ["a"]', r"select = 'worst'.*'last' or 'best'"),
        ('[study]\n[[arm]]\nstrategies = ["a"]\nlr = 0', r"lr = 0.*greater than 0"),
        ('[study]\n[[arm]]\nstrategies = ["a"]\nweights."a/b" = "x"', r"weights\.a/b = 'x'"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_answer(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        composed(change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_setting_is_an_error_that_names_the_new_one(old: str) -> None:
    assert RENAMED[old] in StudySettings.model_fields.keys() | ArmSettings.model_fields.keys()
    with pytest.raises(UserError, match=f"study.toml: '{old}' is now '{RENAMED[old]}'"):
        composed(f'[study]\n{old} = 1\n[[arm]]\nstrategies = ["a"]')
    with pytest.raises(UserError, match=f"'{old}' is now '{RENAMED[old]}'"):
        compose(with_overrides({}, [f"{old}=1"]), [{"strategies": ["a"]}], "--set")


@pytest.mark.parametrize("old", RENAMED_IN_ARM)
def test_a_renamed_setting_of_an_arm_is_an_error_that_names_the_new_one(old: str) -> None:
    with pytest.raises(UserError, match=f"arm 'x': '{old}' is now '{RENAMED_IN_ARM[old]}'"):
        composed(f'[study]\n[[arm]]\nname = "x"\nstrategies = ["a"]\n{old} = 1')


def test_overrides_descend_into_tables_and_read_toml() -> None:
    values = {"study": "kept", "phase": {"path": True}}
    changed = with_overrides(
        values,
        [
            "lr=3e-4",
            "phase.kernel=5",
            "weights.voice_conversion/spk_vc=1.5",
            "name=bare words",
            "seeds=[1, 2]",
            "on=true",
        ],
    )
    assert changed == {
        "study": "kept",
        "phase": {"path": True, "kernel": 5},
        "lr": 3e-4,
        "weights": {"voice_conversion/spk_vc": 1.5},
        "name": "bare words",
        "seeds": [1, 2],
        "on": True,
    }
    assert values == {"study": "kept", "phase": {"path": True}}  # not written into


@pytest.mark.parametrize(("override", "message"), [("lr", "expected key=value"), ("=3", "expected key=value"),
                                                   ("lr.deep=3", "'lr' is not a table")])  # fmt: skip
def test_a_malformed_override_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_overrides({"lr": 1}, [override])


def test_a_date_in_a_study_file_is_a_wrong_value_and_no_crash() -> None:
    values = with_overrides(tomllib.loads("name = 2026-01-02"), ["steps=3"])
    with pytest.raises(UserError, match="name = "):
        compose(values, [{"strategies": ["a"]}], "here")


def test_json_files_are_settings_too(tmp_path: Path) -> None:
    path = tmp_path / "arm.json"
    path.write_text(json.dumps({"strategies": ["a"], "lr": 0.01}))
    assert read_values(path) == {"strategies": ["a"], "lr": 0.01}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{,", "is not a valid JSON file"),
        ("a.toml", "= 3", "is not a valid TOML file"),
        ("a.json", "[1]", "holds a list; expected keys"),
        ("gone.toml", None, "no file .*gone.toml"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_values(tmp_path / name)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SCALARS = st.one_of(TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


def test_paths_in_a_study_file_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study").mkdir()
    for name in ("here.py", "study/beside.py", "given.py"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    shared = {"data": "hf:me/speech", "bank": "auto", "plugins": ["here.py", "beside.py"]}
    found = with_plugins(with_data(shared, Path("study/study.toml")), ["given.py"])
    assert found["plugins"] == [str(tmp_path / name) for name in ("here.py", "study/beside.py", "given.py")]
    assert (found["data"], found["bank"]) == ("hf:me/speech", "auto")
    with pytest.raises(UserError, match="expected a list of files"):
        with_plugins(with_data({"plugins": [3]}, None), [])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, VALUES, max_size=4), st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=3))
def test_what_is_written_as_toml_reads_back_equal(study: dict[str, Any], arms: list[dict[str, Any]]) -> None:
    read = tomllib.loads(to_toml({"study": study, "arm": arms}))
    assert read.get("study") == study
    assert read.get("arm", []) == arms


def test_a_study_file_survives_being_written_and_read() -> None:
    values = tomllib.loads(STUDY)
    assert tomllib.loads(to_toml(values)) == values
