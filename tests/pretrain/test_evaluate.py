"""Evaluation of a base: unseen speakers, references without overlap, better metrics for a better codec; settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torchaudio.functional import edit_distance

from snac_core.codec import SNAC
from snac_core.codec.pretrained import ASSETS
from snac_core.errors import UserError
from snac_core.speakers.encoder import load_speaker_encoder
from snac_runner.cli import main
from snac_runner.data.corpus import Corpus
from snac_runner.pretrain.evaluate import compare, decode_levels, evaluate_codec, select_items, wer_cost
from snac_runner.pretrain.settings import PRESETS, PretrainSettings, codec_config, recipe

from .conftest import SMALL


def test_items_are_unseen_speakers_and_their_references_other_utterances(corpus: Corpus) -> None:
    items = select_items(corpus, ("dev", "test"), 16000, seconds=1.5, max_items=8)
    assert {item.speaker for item in items} == {u.speaker for s in ("dev", "test") for u in corpus.split(s)}
    for item in items:
        assert item.audio.shape == (1, 24000)
        assert item.references
        assert not any(torch.equal(item.audio, reference[:, : item.audio.shape[-1]]) for reference in item.references)
    again = select_items(corpus, ("dev", "test"), 16000, seconds=1.5, max_items=8)
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(items, again, strict=True))


def test_a_trained_codec_preserves_the_speaker_and_an_untrained_one_does_not(corpus: Corpus) -> None:
    items = select_items(corpus, ("dev", "test"), 16000, seconds=2.0, max_items=4)
    judge = load_speaker_encoder("ge2e")
    trained = SNAC.from_pretrained("tiny").freeze()
    good = evaluate_codec(trained, items, judge)
    poor = evaluate_codec(SNAC.from_config(trained.config).freeze(), items, judge)
    assert good["range"] > 0.05 > poor["range"]
    assert good["range"] == pytest.approx(good["own"] - good["other"])
    assert {"used_0", "perplexity_2"} <= good.keys()
    if "stoi" in good:
        assert good["stoi"] > 0.7 > poor["stoi"]
    assert good["pesq"] > 1.05 if "pesq" in good else True


def test_all_levels_decode_to_what_the_codec_decodes_and_fewer_to_something_else() -> None:
    codec = SNAC(**SMALL).freeze()
    codes = codec.encode(0.1 * torch.randn(1, 1, 3000))
    with codec.fixed_noise(0):
        whole = codec.decode(codes, length=3000)
    assert torch.equal(decode_levels(codec, codes, 2, 3000), whole)
    assert torch.equal(decode_levels(codec, codes, None, 3000), whole)
    assert not torch.equal(decode_levels(codec, codes, 1, 3000), whole)


class Known:
    """A recogniser that knows some waves by their sum."""

    def __init__(self, texts: dict[float, str]) -> None:
        self.texts = texts

    def read(self, waves: Sequence[torch.Tensor]) -> list[str]:
        return [self.texts.get(wave.sum().item(), "") for wave in waves]

    def words(self, text: str) -> list[str]:
        return text.split()


def test_word_errors_count_insertions_deletions_and_substitutions(corpus: Corpus) -> None:
    assert edit_distance(["a", "b", "c", "d"], ["a", "c", "x", "d", "e"]) == 3
    items = select_items(corpus, ("dev",), 16000, seconds=30.0, max_items=4)
    assert all(item.text for item in items)
    known = Known({item.audio[0].sum().item(): item.text or "" for item in items})
    made = [-item.audio for item in items]
    originals = [item.audio for item in items]
    assert wer_cost(items, made, 16000, known) == pytest.approx(100)  # type: ignore[arg-type]
    assert wer_cost(items, originals, 16000, known) == 0  # type: ignore[arg-type]


def test_bases_are_compared_in_one_table(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = SNAC(**{**SMALL, "sampling_rate": 16000})
    for name in ("one", "other"):
        codec.save_pretrained(tmp_path / name)
    rows = compare([str(tmp_path / "one"), str(tmp_path / "other")], [str(speech)], splits=["test"], max_items=2)
    assert [row["levels"] for row in rows] == [1, 2, 1, 2]
    assert rows[1]["own"] == rows[3]["own"]
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("| speech"))
    assert "| range |" in header
    assert sum(line.startswith("| synthetic/test") for line in lines) == 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_codec_and_its_crops_need_no_padding(name: str) -> None:
    settings = recipe(name)
    with torch.device("meta"):
        codec = SNAC.from_config(codec_config(settings.codec))
    samples = round(settings.crop_seconds * codec.sampling_rate)
    block = codec.hop_length * codec.vq_strides[0]
    assert samples % block == 0
    assert codec.attn_window_size is None or samples % (codec.hop_length * codec.attn_window_size) == 0


def test_the_tiny_preset_is_the_configuration_of_the_bundled_base() -> None:
    bundled = SNAC.from_pretrained("tiny")
    assert SNAC.from_config(codec_config("tiny")).config == bundled.config
    assert (ASSETS / "tiny" / "model.safetensors").stat().st_size < 8_000_000
    assert all(parameter.dtype == torch.float32 for parameter in bundled.parameters()), "kept as fp16, used as fp32"


@pytest.mark.parametrize(
    ("changes", "name", "new"),
    [
        ({"batch": 4}, "batch", "batch_size"),
        ({"lr_warmup": 4}, "lr_warmup", "warmup_steps"),
        ({"listen_every": 4}, "listen_every", "validate_every"),
        ({"quantiser": {"continuous": 4}}, "quantiser.continuous", "quantizer.unquantized_steps"),
        ({"quantiser": {"restart_every": 4}}, "quantiser", "quantizer"),
        ({"quantizer": {"blend": 4}}, "quantizer.blend", "quantizer.blend_steps"),
        ({"adversary": {"after": 4}}, "adversary.after", "adversary.start_step"),
        ({"adversary": {"rise": 4}}, "adversary.rise", "adversary.warmup_steps"),
    ],
)
def test_an_old_name_of_a_setting_is_an_error_with_the_new_one(
    changes: dict[str, Any], name: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"unknown setting '{name}' of a pretraining; the setting is called '{new}'"
    for preset in ("tiny", "snac_24khz"):
        with pytest.raises(UserError, match=said):
            recipe(preset, **changes)
    with pytest.raises(ValidationError, match=said):
        PretrainSettings(**json.loads(json.dumps(changes)))
    ((key, value),) = changes.items()
    for inner in value if isinstance(value, dict) else [None]:
        assignment = f"{key}=4" if inner is None else f"{key}.{inner}=4"
        with pytest.raises(SystemExit, match="2"):
            main(["pretrain", "--out", str(tmp_path / "run"), "--set", assignment])
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_changes_of_a_preset_reach_nested_settings_and_unknown_presets_are_named() -> None:
    settings = recipe("snac_24khz", lr=1e-4, quantizer={"unquantized_steps": 0})
    assert settings.lr == 1e-4
    assert (settings.quantizer.unquantized_steps, settings.quantizer.blend_steps) == (0, 2000)
    assert recipe("tiny", adversary="none").adversary is None
    with pytest.raises(UserError, match=r"'tiny': adversary = 'null'"):
        recipe("tiny", adversary="null")
    with pytest.raises(UserError, match="did you mean 'snac_24khz'"):
        recipe("snac_24")
