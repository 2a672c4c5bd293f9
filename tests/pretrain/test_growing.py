"""Added levels and channels do not change the output until they are trained; frozen parts keep their weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_runner.pretrain.grow import add_levels, change_rates, widen
from snac_runner.pretrain.pretrain import pretrain

from .conftest import SMALL
from .test_loop import quick


def test_added_levels_change_neither_the_output_nor_the_other_codes() -> None:
    codec = SNAC.from_config(SMALL).eval()
    grown = add_levels(codec, [2, 1], seed=0).eval()
    audio = torch.randn(2, 1, 640)
    with torch.no_grad():
        (before, codes), (after, more) = codec(audio), grown(audio)
    torch.testing.assert_close(after, before)
    assert [tuple(c.shape) for c in more] == [(2, 10), (2, 20), (2, 10), (2, 20)]
    assert all(torch.equal(a, b) for a, b in zip(more[:2], codes, strict=True))


def test_added_levels_and_the_speaker_term_are_part_of_a_training(small: str, speech: Path, tmp_path: Path) -> None:
    first = pretrain(quick(small, speech, steps=1, adversary="none", validate_every=0), tmp_path / "first")
    assert first is not None
    settings = quick(
        small, speech, start=str(first), levels=(1,), weights={"speaker": 1.0}, adversary="none", validate_every=0
    )
    second = pretrain(settings, tmp_path / "second")
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
        pretrain(quick(small, speech, weights=weights, speaker_encoder="ge2"), tmp_path / "run")
    monkeypatch.setattr("snac_core.speakers.ge2e.GE2E.min_seconds", 0.4)
    with pytest.raises(UserError, match=r"crop_seconds 0\.16; ge2e needs"):
        pretrain(quick(small, speech, weights=weights, speaker_encoder="ge2e"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changes_without_a_codec_to_start_from_are_refused(small: str, speech: Path, tmp_path: Path) -> None:
    for grown in ({"levels": (1,)}, {"widths": (12, 128)}, {"rates": ((2, 2, 4), (4, 2, 2))}):
        with pytest.raises(UserError, match="start"):
            pretrain(quick(small, speech, **grown), tmp_path / "run")


@pytest.mark.parametrize("depthwise", [False, True])
def test_widening_changes_neither_the_output_nor_the_codes(depthwise: bool) -> None:
    torch.manual_seed(1)
    codec = SNAC.from_config({**SMALL, "depthwise": depthwise, "noise": True}).eval()
    for name, parameter in codec.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    wide = widen(codec, 12, 160, seed=0).eval()
    assert (wide.config["encoder_dim"], wide.config["decoder_dim"], wide.latent_dim) == (12, 160, 96)
    audio = 0.1 * torch.randn(2, 1, 640)
    with torch.no_grad(), codec.fixed_noise(0), wide.fixed_noise(0):
        (before, codes), (after, same) = codec(audio), wide(audio)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(same, codes, strict=True))


def test_every_new_channel_can_be_trained() -> None:
    codec = SNAC.from_config(SMALL)
    wide = widen(codec, 12, 160, seed=0)
    before = {name: value.clone() for name, value in wide.named_parameters()}
    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-3)
    audio = 0.1 * torch.randn(2, 1, 640)
    for _ in range(2):  # the first step gives the new channels an effect, the second trains them
        optimizer.zero_grad()
        made, _ = wide(audio)
        (made - audio).square().sum().backward()
        optimizer.step()
    first = "decoder.model.0.parametrizations.weight.original1"
    assert (wide.get_parameter(first) != before[first]).any(dim=(1, 2)).all()
    first = "encoder.block.1.block.0.block.1.parametrizations.weight.original1"
    assert (wide.get_parameter(first) != before[first]).any(dim=(1, 2)).all()


def test_a_codec_with_untrained_new_levels_can_be_widened() -> None:
    codec = add_levels(SNAC.from_config(SMALL), [1], seed=0).eval()
    audio = 0.1 * torch.randn(1, 1, 640)
    with torch.no_grad():
        torch.testing.assert_close(widen(codec, 12, 160, seed=0)(audio)[0], codec(audio)[0], rtol=1e-4, atol=1e-5)


def test_no_wider_layers_and_attention_are_refused() -> None:
    codec = SNAC.from_config(SMALL)
    with pytest.raises(UserError, match="encoder_dim 8 and decoder_dim 96 are those of the codec"):
        widen(codec, 8, 96, seed=0)
    with pytest.raises(UserError, match="decoder_dim 48; a codec of 96 can be widened"):
        widen(codec, 8, 48, seed=0)
    attending = SNAC.from_config({**SMALL, "decoder_dim": 64, "attn_window_size": 4})
    with pytest.raises(UserError, match="attention"):
        widen(attending, 16, 128, seed=0)


def test_widths_are_part_of_a_training(small: str, speech: Path, tmp_path: Path) -> None:
    first = pretrain(quick(small, speech, steps=1, adversary="none", validate_every=0), tmp_path / "first")
    settings = quick(small, speech, steps=1, start=str(first), widths=(12, 128), adversary="none", validate_every=0)
    second = pretrain(settings, tmp_path / "second")
    assert second is not None
    assert SNAC.from_pretrained(second).config["decoder_dim"] == 128
    with pytest.raises(UserError, match=r"widths \[12\]; expected two numbers, encoder_dim and decoder_dim"):
        pretrain(quick(small, speech, start=str(first), widths=(12,)), tmp_path / "third")


def test_a_codec_at_its_own_rates_is_itself() -> None:
    codec = SNAC.from_config(SMALL)
    assert change_rates(codec, [2, 4, 4], [4, 4, 2]).digest == codec.digest


@pytest.mark.parametrize("stride", [2, 3, 5, 8])
def test_a_resampled_filter_keeps_its_gain_for_constant_signals(stride: int) -> None:
    """A moving average keeps its gain, at another stride; a held sample is held for longer or shorter."""
    codec = SNAC.from_config({**SMALL, "vq_strides": [1]})
    down, up = "encoder.block.2.block.4", "decoder.model.1.block.1"
    for name in (down, up):
        torch.nn.init.ones_(codec.get_parameter(f"{name}.parametrizations.weight.original1"))
    changed = change_rates(codec, [2, stride, 4], [stride, 4, 2])
    assert changed.hop_length == 8 * stride
    with torch.no_grad():
        before, after = (c.get_submodule(down)(torch.ones(1, 16, 40)) for c in (codec, changed))
        torch.testing.assert_close(after[..., 2:4], before[..., 2:4], rtol=1e-5, atol=1e-4)
        before, after = (c.get_submodule(up)(torch.ones(1, 96, 6)) for c in (codec, changed))
    assert after.shape[-1] == 6 * stride
    middle = slice(2 * stride, 4 * stride)
    torch.testing.assert_close(after[..., middle], before[..., 8:9].expand(-1, -1, 2 * stride), rtol=1e-5, atol=1e-4)


def test_other_numbers_of_rates_and_rates_that_do_not_mirror_are_refused() -> None:
    codec = SNAC.from_config(SMALL)
    with pytest.raises(UserError, match=r"encoder_rates \[2, 4\]; expected 3, one for each block, as in \[2, 4, 4\]"):
        change_rates(codec, [2, 4], [4, 4, 2])
    with pytest.raises(UserError, match="does not mirror"):
        change_rates(codec, [2, 2, 4], [4, 4, 2])


def test_rates_are_part_of_a_training(small: str, speech: Path, tmp_path: Path) -> None:
    first = pretrain(quick(small, speech, steps=1, adversary="none", validate_every=0), tmp_path / "first")
    rates = ((2, 2, 4), (4, 2, 2))
    settings = quick(
        small, speech, steps=1, start=str(first), rates=rates, widths=(12, 128), adversary="none", validate_every=0
    )
    second = pretrain(settings, tmp_path / "second")
    assert second is not None
    assert SNAC.from_pretrained(second).hop_length == 16
    with pytest.raises(UserError, match="rates has 1 lists; expected two, encoder_rates and decoder_rates"):
        pretrain(quick(small, speech, start=str(first), rates=((2, 2, 4),)), tmp_path / "third")


@pytest.mark.parametrize("frozen", [("decoder",), ("encoder", "quantizer")])
def test_frozen_parts_keep_their_weights_and_the_others_learn(
    frozen: tuple[str, ...], small: str, speech: Path, tmp_path: Path
) -> None:
    first = pretrain(quick(small, speech, steps=1, adversary="none", validate_every=0), tmp_path / "first")
    assert first is not None
    second = pretrain(quick(small, speech, start=str(first), frozen=frozen), tmp_path / "second")
    assert second is not None
    before, after = (SNAC.from_pretrained(folder).state_dict() for folder in (first, second))
    for name, value in after.items():
        kept = name.split(".")[0] in frozen
        assert torch.equal(value, before[name]) == kept, name


@pytest.mark.parametrize(
    ("frozen", "more", "said"),
    [
        (("decoder",), {"start": None}, "needs `start`, the codec"),
        (("decoder", "encoder", "quantizer"), {}, "leave at least one to train"),
        (("quantizer",), {"levels": (1,)}, "added to a frozen quantizer"),
        (("decoder",), {"widths": (12, 128)}, "widths and rates change encoder and decoder"),
        (("encoder",), {"rates": ((2, 2, 4), (4, 2, 2))}, "widths and rates change encoder and decoder"),
    ],
)
def test_settings_that_contradict_frozen_parts_are_refused(
    frozen: tuple[str, ...], more: dict[str, object], said: str, small: str, speech: Path, tmp_path: Path
) -> None:
    SNAC.from_config(SMALL).save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match=said):
        pretrain(quick(small, speech, **{"start": str(tmp_path / "start"), "frozen": frozen, **more}), tmp_path / "run")
