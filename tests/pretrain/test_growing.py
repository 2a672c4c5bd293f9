"""A level that is added changes nothing until it is trained, and then it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runner.pretrain import pretrain
from runner.pretrain.growing import add_levels, first_levels
from snac_core.codec import SNAC
from snac_core.errors import UserError

from .conftest import SMALL
from .test_loop import quick, silent


def test_a_grown_codec_sounds_as_before_and_keeps_the_codes_it_had() -> None:
    codec = SNAC.from_config(SMALL).eval()
    grown = add_levels(codec, [2, 1], seed=0).eval()
    audio = torch.randn(2, 1, 640)
    with torch.no_grad():
        (before, codes), (after, more) = codec(audio), grown(audio)
    torch.testing.assert_close(after, before)
    assert [tuple(c.shape) for c in more] == [(2, 10), (2, 20), (2, 10), (2, 20)]
    assert all(torch.equal(a, b) for a, b in zip(more[:2], codes, strict=True))


def test_a_codec_cut_to_its_first_levels_is_what_it_was_before_it_grew() -> None:
    codec = SNAC.from_config(SMALL).eval()
    cut = first_levels(add_levels(codec, [1], seed=0), 2)
    assert cut.digest == codec.digest
    with pytest.raises(UserError, match="3 levels of a codec that has 2; expected 1 to 2"):
        first_levels(codec, 3)


def test_added_levels_and_the_speaker_term_are_part_of_a_training(small: str, speech: Path, tmp_path: Path) -> None:
    first = pretrain(quick(small, speech, steps=1, adversary="none", listen_every=0), tmp_path / "first", say=silent)
    assert first is not None
    settings = quick(
        small, speech, start=str(first), levels=(1,), weights={"speaker": 1.0}, adversary="none", listen_every=0
    )
    second = pretrain(settings, tmp_path / "second", say=silent)
    assert second is not None
    grown = SNAC.from_pretrained(second)
    assert grown.vq_strides == (2, 1, 1)
    lengths = grown.quantizer.get_parameter("quantizers.2.out_proj.parametrizations.weight.original0")
    assert lengths.abs().min() > 0
    records = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["speaker"] < 2 for record in records)
    assert records[1]["used_2"] > 5 * records[0]["used_2"]  # from step 1 on its entries lie in the data


def test_a_speaker_encoder_that_cannot_be_used_is_refused_before_anything_is_written(
    small: str, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"speaker": 1.0}
    with pytest.raises(UserError, match="did you mean 'ge2e'"):
        pretrain(quick(small, speech, weights=weights, speaker_encoder="ge2"), tmp_path / "run", say=silent)
    monkeypatch.setattr("snac_core.speakers.ge2e.GE2E.min_seconds", 0.4)
    with pytest.raises(UserError, match=r"crop_seconds 0\.16; ge2e needs"):
        pretrain(quick(small, speech, weights=weights, speaker_encoder="ge2e"), tmp_path / "run", say=silent)
    assert not (tmp_path / "run").exists()


def test_levels_without_a_codec_to_add_them_to_are_refused(small: str, speech: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start"):
        pretrain(quick(small, speech, levels=(1,)), tmp_path / "run", say=silent)
