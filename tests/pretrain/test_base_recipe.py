"""The recipe that trains the base and adapters on it in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from base_and_adapters import LEAST_SECONDS, run, steps

from snac_core import SNAC
from snac_runner.data.synth import synthesize


def test_its_first_step_makes_the_base_of_all_others_and_a_mistake_ends_it(tmp_path: Path) -> None:
    data, out = tmp_path / "speech", tmp_path / "runs"
    synthesize(data, speakers=8, sentences=2, seed=0)
    first, *others = steps(str(data), out, "", "", True)
    assert not first.is_finished
    assert run(first, 100 * LEAST_SECONDS)
    assert first.is_finished
    assert SNAC.from_pretrained(out / "base" / "model").digest != SNAC.from_pretrained("tiny").digest
    assert len(others) == 6
    assert all(str(out / "base" / "model") in step.command for step in others)
    nowhere, *_ = steps(str(tmp_path / "nowhere"), tmp_path / "other", "", "", True)
    with pytest.raises(typer.Exit) as ended:
        run(nowhere, 100 * LEAST_SECONDS)
    assert ended.value.exit_code == 2
