"""The recipe that trains the base and adapters on it in parts."""

from __future__ import annotations

from pathlib import Path

import base_and_adapters
import pytest
import torch
from typer.testing import CliRunner

from snac_core import SNAC, ConditionedCodec
from snac_runner.data.synth import synthesize


@pytest.mark.slow
def test_the_recipe_continues_after_a_stop_and_adapters_are_for_the_new_base(tmp_path: Path) -> None:
    data, out = tmp_path / "speech", tmp_path / "runs"
    synthesize(data, speakers=12, sentences=4, seed=0)
    app = base_and_adapters.typer.Typer()
    app.command()(base_and_adapters.main)
    codes = []
    for minutes in [*[0.5] * 40, 0]:
        result = CliRunner().invoke(app, ["--data", str(data), "--out", str(out), "--trial", "--minutes", str(minutes)])
        codes.append(result.exit_code)
        if result.exit_code != 3:
            break
    assert codes[0] == 3, "it was stopped"
    assert codes[-1] == 0
    base = SNAC.from_pretrained(out / "base" / "model")
    assert base.digest != SNAC.from_pretrained("tiny").digest
    for seed in range(3):
        phase6 = ConditionedCodec.from_pretrained(out / "codes" / f"seed{seed}")
        both = ConditionedCodec.from_pretrained(out / "decoder" / f"seed{seed}")
        assert phase6.codec.digest == both.codec.digest == base.digest
        weights = both.attached["phase6_encoder_adapter"].state_dict()
        kept = phase6.attached["phase6_encoder_adapter"].state_dict()
        assert all(torch.equal(weights[name], value) for name, value in kept.items()), "frozen in the second stage"
        assert any(p.abs().max() > 0 for p in both.attached["phase4_decoder_film"].parameters())
