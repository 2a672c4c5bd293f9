"""Strategies on disk and on the hub: they come back equal, or are refused with the reason."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_codec import small, tone
from toy_strategies import SPEAKER_DIM, Gain, Level, Shift, learned, speakers

from snac_core import ConditionedCodec, Conditioning, UserError, load_speaker_encoder
from snac_core.checkpoint import digest_of
from snac_core.plugins import Catalogue, Origin


@pytest.fixture
def offered() -> Catalogue:
    catalogue = Catalogue()
    for strategy in (Shift, Gain, Level):
        catalogue.strategies.add(strategy, Origin("toys"))
    return catalogue


@pytest.fixture
def model() -> ConditionedCodec:
    return learned(Shift, Gain, Level, config={"shift": {"taps": ("encoder_1", "latent"), "strength": 0.5}})


def outputs(model: ConditionedCodec) -> torch.Tensor:
    torch.manual_seed(1)
    with model.codec.fixed_noise(1):
        return model(tone(), speakers(2))[0]


def test_what_is_saved_comes_back_equal_on_its_base(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path
) -> None:
    model.strategies["level"].seen.fill_(3.0)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = ConditionedCodec.from_pretrained(tmp_path / "new" / "folder", codec=model.codec, plugins=offered)
    (tmp_path / "new" / "folder").rename(tmp_path / "new" / "model")  # as in the folder of a run
    ConditionedCodec.from_pretrained(tmp_path / "new", codec=model.codec, plugins=offered)
    assert torch.equal(outputs(loaded), outputs(model))
    assert list(loaded.strategies) == ["shift", "gain", "level"]
    assert loaded.strategies["shift"].config == model.strategies["shift"].config
    assert loaded.strategies["level"].seen == 3.0
    assert not loaded.strategies["shift"].training


def test_the_strategies_alone_are_saved_without_codec_and_discriminators(
    model: ConditionedCodec, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"shift", "gain", "level"}
    assert not any("discriminator" in name for name in names)
    assert "level.seen" in names


def test_the_config_names_base_and_encoder_with_their_digests(tmp_path: Path) -> None:
    encoder = load_speaker_encoder("ge2e")
    model = ConditionedCodec("tiny", ["phase4_decoder_film"], speaker_encoder=encoder)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base"] == {"name": "tiny", "revision": None, "digest": model.codec.digest}
    assert config["speaker_encoder"] == {"name": "ge2e", "dim": 256, "digest": encoder.digest}
    assert config["strategies"][0]["name"] == "phase4_decoder_film"
    card = (tmp_path / "README.md").read_text()
    assert all(
        words in card for words in ("phase4_decoder_film", model.codec.digest, encoder.digest, "neural-audio-codec")
    )
    loaded = ConditionedCodec.from_pretrained(tmp_path)
    assert loaded.codec.digest == model.codec.digest
    foreign = Conditioning(torch.randn(1, 256), encoder="0" * 64)
    with pytest.raises(UserError, match="another speaker encoder"):
        loaded(torch.zeros(1, 1, 2000), foreign)


def test_another_base_is_refused_by_digest(model: ConditionedCodec, offered: Catalogue, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    other = small()
    with pytest.raises(UserError, match=f"{model.codec.digest[:12]}; got a base with digest {other.digest[:12]}"):
        ConditionedCodec.from_pretrained(tmp_path, codec=other, plugins=offered)


def test_a_base_without_a_name_must_be_given(model: ConditionedCodec, offered: Catalogue, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="unnamed base; give it: from_pretrained"):
        ConditionedCodec.from_pretrained(tmp_path, plugins=offered)


def test_another_speaker_encoder_is_refused_by_digest(tmp_path: Path) -> None:
    codec, encoder = small(), load_speaker_encoder("ge2e")
    ConditionedCodec(codec, ["phase4_decoder_film"], speaker_encoder=encoder).save_pretrained(tmp_path)
    ConditionedCodec.from_pretrained(tmp_path, codec=codec, speaker_encoder=encoder)
    with pytest.warns(UserWarning, match="UNTRAINED"):
        other = load_speaker_encoder("simple")
    with pytest.raises(UserError, match=r"conditioned with 'ge2e', digest .*; got 'simple'"):
        ConditionedCodec.from_pretrained(tmp_path, codec=codec, speaker_encoder=other)


def test_a_tensor_with_two_names_comes_back_under_both(offered: Catalogue, tmp_path: Path) -> None:
    class Tied(Gain):
        name = "tied"

        def __init__(self, config: Any, taps: Any) -> None:
            super().__init__(config, taps)
            self.again = self.gains["decoder_1"]

    offered.strategies.add(Tied, Origin("toys"))
    model = learned(Tied)
    model.save_pretrained(tmp_path)
    loaded = ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)
    assert torch.equal(outputs(loaded), outputs(model))


# -------------------------------------------------------------------- damaged and foreign files


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9])
def test_truncated_weights_are_refused(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path, kept: float
) -> None:
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)


def test_a_pickle_is_refused_and_not_executed(model: ConditionedCodec, offered: Catalogue, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    model.save_pretrained(tmp_path)
    torch.save({"shift": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state.pop("gain.gains.decoder_1.bias"), "'gain.gains.decoder_1.bias' is missing"),
        (lambda state: state.update({"loud.bias": torch.ones(1)}), "'loud.bias' is not of this model"),
        (lambda state: state.update({"level.seen": torch.ones(2)}), r"'level.seen' has shape \(2,\); expected \(\)"),
    ],
)
def test_weights_that_do_not_fit_name_the_first_wrong_tensor(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path, damage: Any, words: str
) -> None:
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=words):
        ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json is not a config of strategies"),
        ("[]", "config.json is not a config of strategies"),
        ("{}", "config.json is not a config of strategies: format"),
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"format": 1}', "config.json is not a config of strategies"),
        (
            '{"format": 1, "base": 3, "speaker_encoder": null, "strategies": []}',
            "config.json is not a config of strategies",
        ),
        (
            '{"format": 1, "base": {"name": "", "digest": "0"}, "speaker_encoder": null, "strategies": [{}]}',
            "config.json is not a config of strategies",
        ),
    ],
)
def test_a_config_that_is_none_is_refused(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path, text: str, words: str
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)


@pytest.mark.parametrize(("missing", "words"), [("config.json", "config"), ("model.safetensors", "no file .*weights")])
def test_a_missing_file_is_named(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path, missing: str, words: str
) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=words):
        ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where/at/all", "nowhere", Path("me/adapter")])
def test_a_folder_that_is_not_there_is_named(name: str | Path) -> None:
    with pytest.raises(
        UserError, match=f"no folder {str(name).removeprefix('./') if isinstance(name, Path) else name}"
    ):
        ConditionedCodec.from_pretrained(name)


def test_a_strategy_that_no_plugin_offers_is_named_with_its_module(model: ConditionedCodec, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"needs strategy 'shift' from module 'toy_strategies', .*--plugin FILE"):
        ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=Catalogue())


def test_a_setting_that_a_newer_plugin_has_and_this_one_lacks_is_named(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"strength"', '"stremgth"'))
    with pytest.raises(UserError, match="unknown setting 'stremgth' of 'shift'; did you mean 'strength'"):
        ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)


# -------------------------------------------------------------------- a disk that fills up


def test_when_the_disk_fills_while_saving_the_previous_save_survives_whole(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    expected, files = outputs(model), sorted(tmp_path.iterdir())

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    other = learned(Gain, codec=model.codec)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    assert sorted(tmp_path.iterdir()) == files, "no half-written file stays behind"
    loaded = ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)
    assert torch.equal(outputs(loaded), expected)


def test_embeddings_from_elsewhere_need_no_encoder_to_save_and_load(offered: Catalogue, tmp_path: Path) -> None:
    model = learned(Shift)
    model.save_pretrained(tmp_path)
    loaded = ConditionedCodec.from_pretrained(tmp_path, codec=model.codec, plugins=offered)
    assert loaded.encoder == model.encoder
    assert loaded.encoder is not None
    assert (loaded.encoder.name, loaded.encoder.dim, loaded.encoder.digest) == ("custom", SPEAKER_DIM, None)


# -------------------------------------------------------------------- a base in a folder, and on another machine


def test_of_a_base_in_a_folder_its_name_is_saved_and_no_path(offered: Catalogue, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "machine" / "my_base")
    model = ConditionedCodec(str(tmp_path / "machine" / "my_base"), [Gain], speaker_dim=SPEAKER_DIM)
    model.save_pretrained(tmp_path / "adapter")
    for name in ("config.json", "README.md"):
        text = (tmp_path / "adapter" / name).read_text()
        assert "my_base" in text
        assert str(tmp_path) not in text
    with pytest.raises(
        UserError, match=r"trained on base 'my_base' \(digest \w{12}\), a folder elsewhere; give it: .*--base"
    ):
        ConditionedCodec.from_pretrained(tmp_path / "adapter", plugins=offered)
    (tmp_path / "machine").rename(tmp_path / "moved")
    for codec in (tmp_path / "moved" / "my_base", str(tmp_path / "moved" / "my_base")):
        loaded = ConditionedCodec.from_pretrained(tmp_path / "adapter", codec=codec, plugins=offered)
        assert loaded.codec.digest == model.codec.digest


# -------------------------------------------------------------------- the figures of a judged run

FIGURE = {"mean": 0.5, "n_ok": 3, "n": 4, "unit": "cosine", "direction": "up"}


def test_the_card_states_what_was_measured_of_these_weights_and_of_no_others(
    model: ConditionedCodec, offered: Catalogue, tmp_path: Path
) -> None:
    model.evaluation = {
        "weights": digest_of(model.attached),
        "metrics": {"secs": FIGURE},
        "about": {"judge": "ge2e", "seed": 0},
    }
    model.save_pretrained(tmp_path / "judged")
    card = (tmp_path / "judged" / "README.md").read_text()
    assert "| secs | 0.5 | cosine | ↑ | 3/4 |" in card
    assert "judge ge2e, seed 0" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0] == {"type": "secs", "value": 0.5, "name": "secs"}
    loaded = ConditionedCodec.from_pretrained(tmp_path / "judged", codec=model.codec, plugins=offered)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    with torch.no_grad():
        next(loaded.strategies.parameters()).add_(1.0)
    loaded.save_pretrained(tmp_path / "trained_on")
    assert "secs" not in (tmp_path / "trained_on" / "README.md").read_text()
