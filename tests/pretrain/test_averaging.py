"""The mean of codecs has the weighted mean of their weights, and needs equal configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_runner.pretrain.grow import average

from .conftest import SMALL


def test_a_mean_lies_where_its_shares_say(tmp_path: Path) -> None:
    one, other = SNAC(**SMALL), SNAC(**SMALL)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    mean = average([str(tmp_path / "one"), str(tmp_path / "other")], [0.25, 0.75]).state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(mean[name], 0.25 * value + 0.75 * other.state_dict()[name])


def test_codecs_of_two_configurations_and_shares_that_are_no_mean_are_refused(tmp_path: Path) -> None:
    SNAC(**SMALL).save_pretrained(tmp_path / "one")
    SNAC(**{**SMALL, "codebook_size": 32}).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"codebook_size 32, .*one 64"):
        average([str(tmp_path / "one"), str(tmp_path / "other")], [0.5, 0.5])
    with pytest.raises(UserError, match="adding up to 1"):
        average([str(tmp_path / "one")], [0.5])
