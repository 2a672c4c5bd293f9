"""Settings in words: what a field takes, its default and its meaning, as commands and documentation print them."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field

from snac_core.settings import stated


class Every(BaseModel):
    count: int = Field(5, ge=1, le=9, description="How many.")
    share: float = Field(0.5, gt=0, lt=1, description="Of all.")
    form: Literal["conv", "film"] = Field("conv", description="Which.")
    path: bool = Field(True, description="Whether.")
    taps: tuple[str, ...] = Field(("latent",), min_length=1, description="Where.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Of Adam.")
    limit: int | None = Field(None, description="At most.")
    weights: dict[str, float] = Field({}, description="By term.")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("count", "count = 5 (int, >= 1, <= 9): How many."),
        ("share", "share = 0.5 (float, > 0, < 1): Of all."),
        ("form", 'form = "conv" ("conv" | "film"): Which.'),
        ("path", "path = true (true | false): Whether."),
        ("taps", 'taps = ["latent"] (list of str, at least 1): Where.'),
        ("betas", "betas = [0.9, 0.999] (list of float, 2 of them): Of Adam."),
        ("limit", "limit = null (int or nothing): At most."),
        ("weights", "weights = {} (table of float): By term."),
    ],
)
def test_a_setting_is_stated_in_words_with_its_range(key: str, words: str) -> None:
    assert stated(key, Every.model_fields[key]) == words
