"""Rows of targets, settings, and suggestions."""

from __future__ import annotations

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from snac_core import Conditioning, UserError
from snac_core.errors import nearest
from snac_core.settings import checked


def test_a_single_vector_is_one_row() -> None:
    assert Conditioning(torch.zeros(5)).speaker.shape == (1, 5)
    assert len(Conditioning(torch.zeros(3, 5))) == 3


def test_one_row_serves_a_batch_and_takes_its_extras_along() -> None:
    cond = Conditioning(torch.ones(1, 5), {"pitch": torch.full((1, 2), 7.0)}, "digest").expand(4)
    assert cond.speaker.shape == (4, 5)
    assert cond.extras["pitch"].tolist() == [[7.0, 7.0]] * 4
    assert cond.encoder == "digest"
    with pytest.raises(UserError, match="2 speaker embeddings for a batch of 4; expected 4, or one for all"):
        Conditioning(torch.ones(2, 5)).expand(4)


def test_parts_are_joined_in_order() -> None:
    parts = [Conditioning(torch.full((n, 2), float(n)), {"pitch": torch.full((n,), float(n))}, "d") for n in (1, 2)]
    joined = Conditioning.cat(parts)
    assert joined.speaker[:, 0].tolist() == joined.extras["pitch"].tolist() == [1.0, 2.0, 2.0]
    assert joined.encoder == "d"


def test_parts_of_two_encoders_do_not_join() -> None:
    parts = [Conditioning(torch.zeros(1, 2), encoder=digest) for digest in ("a" * 64, "b" * 64)]
    with pytest.raises(UserError, match="two speaker encoders"):
        Conditioning.cat(parts)


def test_extras_have_a_row_for_every_embedding() -> None:
    with pytest.raises(UserError, match="extra 'pitch' has 2 rows, the speaker embedding 3"):
        Conditioning(torch.zeros(3, 5), {"pitch": torch.zeros(2)})


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = Field(2, ge=1, description="Layers.")


def test_a_bad_setting_is_named_with_what_was_got_and_expected() -> None:
    assert checked(Settings, {"depth": 3}, "'x'").depth == 3
    with pytest.raises(UserError, match="unknown setting 'dept' of 'x'; did you mean 'depth'"):
        checked(Settings, {"dept": 3}, "'x'")
    with pytest.raises(UserError, match="'x': depth = 0: Input should be greater than or equal to 1"):
        checked(Settings, {"depth": 0}, "'x'")


@pytest.mark.parametrize(
    ("name", "known", "ending"),
    [
        ("latnet", ["latent", "decoder_1"], "; did you mean 'latent'?"),
        ("adapter", ["phase6_encoder_adapter", "x"], "; did you mean 'phase6_encoder_adapter'?"),
        ("zzz", ["b", "a"], "; known: a, b"),
        ("", ["b", "a"], "; known: a, b"),
        ("zzz", [], "; none is known"),
    ],
)
def test_the_nearest_known_name_is_suggested(name: str, known: list[str], ending: str) -> None:
    assert nearest(name, known) == ending
