"""A judge that scores as the conditioning encoder does is refused, under any name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_study import Bench

from snac_core import UserError, discover, load_speaker_encoder
from snac_runner.data.open_corpus import open_corpus
from snac_runner.evaluate.judges import CORRELATED, score_correlation

DISGUISED = '''
import torch
from snac_core import hookimpl
from snac_core.speakers.ecapa import EcapaTiny


class Disguised(EcapaTiny):
    """The default conditioning encoder under another name, family and digest, with turned dimensions."""

    name, family, training_data = "disguised", "another", "voxceleb"

    def embed(self, audio):
        return super().embed(audio).roll(7, dims=1) * 3


@hookimpl
def register_speaker_encoders(register):
    register(Disguised)
'''


@pytest.fixture
def disguised(tmp_path: Path) -> Path:
    path = tmp_path / "disguised.py"
    path.write_text(DISGUISED)
    return path


def test_a_renamed_conditioning_encoder_is_refused_with_possible_judges(bench: Bench, disguised: Path) -> None:
    study = bench.study(speaker_encoder="ecapa_tiny", judges=("disguised",))
    resources = bench.resources(study, [disguised])
    for part in ("speaker_encoder", "judges"):
        vars(resources).pop(part, None)
    with pytest.raises(UserError) as refused:
        _ = resources.judge
    said = str(refused.value)
    assert (
        "judge 'disguised' scores real trials of speech as the conditioning encoder 'ecapa_tiny' does "
        "(correlation 1.0000" in said
    )
    would_do = said.rpartition("possible judges: ")[2].split(", ")
    assert "ge2e" in would_do
    assert not {"ecapa_tiny", "disguised", "simple"} & set(would_do)


def test_different_encoders_are_accepted_and_the_correlation_is_cached(
    bench: Bench, disguised: Path, cache: Path
) -> None:
    corpus = open_corpus(bench.speech)
    one, other = load_speaker_encoder("ge2e"), load_speaker_encoder("ecapa_tiny")
    found = score_correlation(one, other, corpus)
    assert found is not None
    assert 0 < found < CORRELATED
    kept = [p for p in (cache / "correlations").iterdir() if json.loads(p.read_text())["correlation"] == found]
    assert len(kept) == 1
    kept[0].write_text('{"correlation": 0.5}')
    assert score_correlation(one, other, corpus) == 0.5
    kept[0].write_text("{")
    assert score_correlation(one, other, corpus) == found
    again = load_speaker_encoder("disguised", plugins=discover([disguised]))
    assert score_correlation(again, other, corpus) == pytest.approx(1)
