"""What is refused of files: names that are nothing, and files that are missing, damaged, foreign or a danger."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_codec import PLAIN, as_upstream_stores_it, small

from snac_core.codec import SNAC
from snac_core.errors import UserError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "no codec 'tinny'.*did you mean 'tiny'"),
        ("snac_24khz", "did you mean 'hubertsiuzdak/snac_24khz'"),
        ("./nowhere", "no codec './nowhere': neither a folder"),
        ("/no/where", "neither a folder"),
    ],
)
def test_a_name_that_is_nothing(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SNAC.from_pretrained(name)


def test_a_revision_of_something_local(saved: Path) -> None:
    with pytest.raises(UserError, match=r"revision 'v1'.*local folder"):
        SNAC.from_pretrained(saved, revision="v1")


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config.json"), ("model.safetensors", "has no model.safetensors or pytorch_model.bin")],
)
def test_a_folder_without_a_file(saved: Path, missing: str, message: str) -> None:
    (saved / missing).unlink()
    with pytest.raises(UserError, match=message):
        SNAC.from_pretrained(saved)


@pytest.mark.parametrize("kept", [0, 7, 100, 5000])
def test_truncated_safetensors(saved: Path, kept: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors holds no readable weights"):
        SNAC.from_pretrained(saved)


@pytest.mark.parametrize("kept", [0, 10, 3000])
def test_truncated_pickled_weights(tmp_path: Path, kept: int) -> None:
    weights = as_upstream_stores_it(small(), tmp_path / "up") / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"pytorch_model\.bin (holds no readable weights|is truncated)"):
        SNAC.from_pretrained(tmp_path / "up")


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_pickled_objects_are_refused_and_never_executed(tmp_path: Path, write: Any) -> None:
    folder = as_upstream_stores_it(small(), tmp_path / "up")
    write({"weight": Trap(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="never executed"):
        SNAC.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_configuration_name_the_first_wrong_tensor(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "codebook_size": 64}))
    with pytest.raises(UserError, match=r"quantizers\.0\.codebook\.weight' has shape \(32, 4\); expected \(64, 4\)"):
        SNAC.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({**config, "vq_strides": [4, 2]}))
    with pytest.raises(UserError, match=r"tensor 'quantizer\.quantizers\.2\..*' is not of this configuration"):
        SNAC.from_pretrained(saved)
    (saved / "config.json").write_text(json.dumps({**config, "vq_strides": [4, 2, 2, 1]}))
    with pytest.raises(UserError, match=r"tensor 'quantizer\.quantizers\.3\..*' is missing"):
        SNAC.from_pretrained(saved)


def test_foreign_weights(saved: Path) -> None:
    save_file({"layer.weight": torch.zeros(2)}, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor 'encoder\.block\.0\.bias' is missing; .* are expected, 1 are there"):
        SNAC.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], saved / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a state dict"):
        SNAC.from_pretrained(saved)


def test_weights_that_are_not_finite(saved: Path) -> None:
    state = SNAC.from_pretrained(saved).state_dict()
    state["encoder.block.0.bias"][1] = float("nan")
    save_file(state, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"'encoder\.block\.0\.bias' holds NaN"):
        SNAC.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({**PLAIN, "encoder_rate": [2, 3]}), r"no argument 'encoder_rate'; did you mean 'encoder_rates'\?"),
        ('{"sampling_rate": ', "is not a JSON file"),
        ("[1, 2]", "holds a list"),
    ],
)
def test_a_config_that_is_none(saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_text(text)
    for load in (lambda: SNAC.from_pretrained(saved), lambda: SNAC.from_config(saved / "config.json")):
        with pytest.raises(UserError, match=message):
            load()


def test_a_config_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no file snac_24kHz.*did you mean 'snac_24khz'"):
        SNAC.from_config("snac_24kHz")


def test_saving_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "base").write_text("in the way")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        small().save_pretrained(tmp_path / "base")
