"""The run folder: resumed exactly, never mixed with another training, never overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_runner.pretrain.pretrain import pretrain
from snac_runner.pretrain.settings import PretrainSettings

from .conftest import SMALL, Recorder


def quick(small: str, speech: Path, **changes: Any) -> PretrainSettings:
    """Six steps with all features: quantization sets in, entries are restarted, the adversary starts."""
    fields: dict[str, Any] = {
        "codec": small,
        "data": (str(speech),),
        "synthetic": 0,
        "steps": 6,
        "batch_size": 2,
        "crop_seconds": 0.16,
        "warmup_steps": 2,
        "quantizer": {
            "unquantized_steps": 1,
            "blend_steps": 2,
            "kmeans_batches": 2,
            "restart_every": 2,
            "level_dropout": 0.5,
        },
        "adversary": {
            "start_step": 2,
            "warmup_steps": 2,
            "periods": (2,),
            "n_ffts": (256,),
            "period_channels": 2,
            "spectral_channels": 2,
        },
        "log_every": 1,
        "validate_every": 3,
    }
    return PretrainSettings(**{**fields, **changes})


def test_a_training_that_was_interrupted_and_continued_equals_one_that_was_not(
    small: str, speech: Path, tmp_path: Path
) -> None:
    settings = quick(small, speech)
    whole = pretrain(settings, tmp_path / "whole")
    assert whole is not None

    parts = tmp_path / "parts"
    console = Recorder(interrupt_after=3)
    assert pretrain(settings, parts, console=console) is None
    assert "after step 3 of 6" in console.lines[-1]
    assert pretrain(settings, parts) == parts / "model"
    assert (whole / "model.safetensors").read_bytes() == (parts / "model" / "model.safetensors").read_bytes()

    one, other = (
        torch.load(folder / "checkpoint" / "state.pt", weights_only=True) for folder in (tmp_path / "whole", parts)
    )
    for network in ("codec", "discriminators"):
        assert all(torch.equal(value, other[network][name]) for name, value in one[network].items())
    assert torch.equal(one["usage"], other["usage"])
    for folder in (tmp_path / "whole", parts):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if "dev" not in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in records if "dev" in r] == [3, 6]
        assert "features" in records[-2]
        assert "used_1" in records[-2]
    result = json.loads((parts / "result.json").read_text())
    assert result["status"] == "success"
    assert result["digest"] == SNAC.from_pretrained(parts / "model").digest

    with pytest.raises(UserError, match="finished training"):
        pretrain(settings, parts)


def test_the_number_of_steps_may_change_on_resuming(small: str, speech: Path, tmp_path: Path) -> None:
    settings = quick(small, speech, adversary=None, validate_every=0)

    run = tmp_path / "run"
    assert pretrain(settings, run, console=Recorder(interrupt_after=1)) is None
    console = Recorder(interrupt_after=2)
    assert pretrain(settings.model_copy(update={"steps": 4}), run, console=console) is None
    assert "the learning rate now decays until step 4; so far until step 6" in console.lines
    with pytest.raises(UserError, match=r"steps 1, but the training in .* is at step 2"):
        pretrain(settings.model_copy(update={"steps": 1}), run)
    assert pretrain(settings.model_copy(update={"steps": 8}), run) is not None
    assert json.loads((run / "result.json").read_text())["steps"] == 8
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["steps"] == 8
    assert config["ends_before"] == [{"steps": 6, "until_step": 1}, {"steps": 4, "until_step": 2}]
    with pytest.raises(UserError, match="finished training"):
        pretrain(settings.model_copy(update={"steps": 9}), run)


def test_another_training_is_refused_a_folder_that_is_taken(small: str, speech: Path, tmp_path: Path) -> None:
    settings = quick(small, speech, steps=1, adversary=None, validate_every=0)
    pretrain(settings, tmp_path / "run")
    with pytest.raises(UserError, match=r"lr: 0\.0006 in the folder, 0\.1 requested"):
        pretrain(settings.model_copy(update={"lr": 0.1}), tmp_path / "run")
    # a missing setting has its default
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["settings"]["levels"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="finished training"):
        pretrain(settings, tmp_path / "run")
    config["settings"]["lr_warmup"] = config["settings"].pop("warmup_steps")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"configuration of a pretraining .*'lr_warmup'.* 'warmup_steps'"):
        pretrain(settings, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds files, but no training"):
        pretrain(settings, tmp_path / "mine")


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(
    small: str, speech: Path, tmp_path: Path
) -> None:
    settings = quick(small, speech, lr=1e20, steps=30, adversary=None, validate_every=0, checkpoint_seconds=1e-9)
    with pytest.raises(UserError, match="not finite at or before step") as raised:
        pretrain(settings, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint" / "state.pt"
    assert str(checkpoint) in str(raised.value)
    assert torch.load(checkpoint, weights_only=True)["step"] >= 1
    assert not (tmp_path / "run" / "model").exists()


def test_a_continued_codec_starts_from_its_weights_and_skips_the_warm_up(
    small: str, speech: Path, tmp_path: Path
) -> None:
    SNAC(**SMALL).save_pretrained(tmp_path / "start")
    quantizer = {"restart_every": 0, "level_dropout": 0}
    settings = quick(
        small,
        speech,
        start=str(tmp_path / "start"),
        steps=1,
        lr=1e-12,
        adversary=None,
        quantizer=quantizer,
        validate_every=0,
    )
    model = pretrain(settings, tmp_path / "run")
    assert model is not None
    before, after = SNAC.from_pretrained(tmp_path / "start").state_dict(), SNAC.from_pretrained(model).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(records.splitlines()[0])["commitment"] > 0


def test_discriminators_are_those_of_another_training_where_it_is_named(
    small: str, speech: Path, tmp_path: Path
) -> None:
    first, adversary = tmp_path / "first", quick(small, speech).adversary
    assert adversary is not None
    pretrain(quick(small, speech), first)

    def started(start: Path, **changes: object) -> dict[str, Tensor]:
        """The discriminators before the first step: they are trained from a step on that is never reached."""
        own = adversary.model_copy(update={"start": str(start), "start_step": 100, **changes})
        out = tmp_path / f"{start.name}{len(list(tmp_path.iterdir()))}"
        pretrain(quick(small, speech, adversary=own, steps=1, validate_every=0), out)
        found: dict[str, Tensor] = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["discriminators"]
        return found

    trained = torch.load(first / "checkpoint" / "state.pt", weights_only=True)["discriminators"]
    continued = started(first)
    assert continued.keys() == trained.keys()
    assert all(torch.equal(continued[name], trained[name]) for name in trained)
    pretrain(quick(small, speech, adversary=None), tmp_path / "without")
    with pytest.raises(UserError, match=r"no checkpoint .*expected the run folder of a pretraining"):
        started(tmp_path / "nothing")
    with pytest.raises(UserError, match="that training has no discriminators"):
        started(tmp_path / "without")
    with pytest.raises(UserError, match=r"cannot be loaded .*expected the same periods"):
        started(first, period_channels=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_rates": [4, 4, 4]}, "does not mirror the encoder"),
        ({"encoder_rates": [2, 4, 5]}, "does not mirror the encoder"),
        ({"decoder_dim": 100}, "multiple of 8"),
        ({"encoder_dims": 8}, "did you mean 'encoder_dim'"),
    ],
)
def test_a_configuration_that_does_not_fit_together_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, speech: Path, tmp_path: Path
) -> None:
    path = tmp_path / "codec.json"
    path.write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(UserError, match=message):
        pretrain(quick(str(path), speech), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_crops_too_short_for_the_losses_are_refused_with_the_shortest_length(
    small: str, speech: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"need 513, 0\.064 s"):
        pretrain(quick(small, speech, crop_seconds=0.02), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_silent_speech_is_skipped_with_a_line_and_clipped_and_short_speech_is_used(
    small: str, speech: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "speech"
    shutil.copytree(speech / "train", folder / "train")
    speaker = sorted((folder / "train").iterdir())[0]
    soundfile.write(speaker / "silence.wav", np.zeros(16000, dtype=np.float32), 16000)
    audio, rate = soundfile.read(next(iter(sorted(speaker.glob("*.flac")))))
    soundfile.write(speaker / "clipped.wav", np.clip(30 * audio, -1, 1), rate)
    soundfile.write(speaker / "short.wav", audio[: int(0.6 * rate)], rate)
    console = Recorder()
    settings = quick(small, folder, steps=2, adversary=None, validate_every=0)
    assert pretrain(settings, tmp_path / "run", console=console) is not None
    assert [line for line in console.lines if "silence.wav" in line and "is silent" in line]
    assert not [line for line in console.lines if "clipped.wav" in line or "short.wav" in line]


def test_no_speech_at_all_is_an_error_that_says_what_to_give(small: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`data`, or a number of `synthetic` speakers"):
        pretrain(PretrainSettings(codec=small, synthetic=0), tmp_path / "run")
