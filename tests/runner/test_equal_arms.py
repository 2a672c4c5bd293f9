"""Trained studies of two arms between which there is nothing but another draw of initial values."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from snac_core.plugins import discover
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.data.synth import synthesize
from snac_runner.report.estimates import compute
from snac_runner.report.page import build
from snac_runner.report.results import read
from snac_runner.report.text import verdict
from snac_runner.resources import StudyResources
from snac_runner.study import run_arms

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

STUDIES = 20
MOST_FALSE = 3  # of 20 at 5 %: 98.4 % of the time

ANOTHER_START = textwrap.dedent(
    '''
    """The phases with other initial values: the same strategies, one draw of the random stream later."""

    import torch

    from snac_phase4_decoder_film import Phase4DecoderFiLM
    from snac_phase6_encoder_adapter import Phase6EncoderAdapter
    from snac_core import hookimpl


    class LaterFiLM(Phase4DecoderFiLM):
        name = "later_film"

        def __init__(self, config, taps):
            torch.rand(1)
            super().__init__(config, taps)


    class LaterAdapter(Phase6EncoderAdapter):
        name = "later_adapter"

        def __init__(self, config, taps):
            torch.rand(1)
            super().__init__(config, taps)


    @hookimpl
    def register_strategies(register):
        register(LaterFiLM)
        register(LaterAdapter)
    '''
)
MEASURED = (
    "secs",
    "secs_source",
    "secs_other",
    "specificity",
    "speaker_encoder_secs",
    "spk_id",
    "spk_vc",
    "gap",
    "per",
)
PAIRS: tuple[tuple[tuple[str, str], dict[str, Any]], ...] = (
    (("phase6_encoder_adapter", "later_adapter"), {}),
    (("phase4_decoder_film", "later_film"), {"hidden_dims": (32,)}),  # without hidden layers it begins with zeros alone
)


def test_equal_arms_are_seldom_called_different(tmp_path: Path) -> None:
    """Twenty studies, each with voices, pairs and three seeds of its own, through training, judging and the verdict."""
    kept = Path(os.environ.get("EQUAL_ARMS_KEPT", tmp_path))  # a folder that outlives the test: finished studies stay
    plugin = tmp_path / "another_start.py"
    plugin.write_text(ANOTHER_START)
    found = [_study(number, kept / f"study{number}", plugin) for number in range(STUDIES)]
    different = [number for number, (word, _) in enumerate(found) if word not in ("inconclusive", "no verdict")]
    print(f"called different: {len(different)} of {STUDIES}: {different}")
    assert all(difference for _, difference in found), "arms of equal weights would show nothing"
    assert len(different) <= MOST_FALSE


def _study(number: int, folder: Path, plugin: Path) -> tuple[str, float]:
    """One study; the word for its pair and the difference in normalised similarity."""
    result = folder / "said.json"
    if not result.is_file():
        catalogue = discover([plugin])
        speech = synthesize(folder / "speech", 64, 4, seed=number)
        study = StudySettings(
            name=f"equal{number}",
            data=str(speech),
            seeds=(3 * number, 3 * number + 1, 3 * number + 2),
            steps=20,
            batch_size=4,
            crop_seconds=0.64,
            dev_pairs=2,
            test_pairs=16,
            pair_seconds=3.0,
            pair_seed=number,
            shuffled_control=False,
            samples=0,
            exclude_metrics=tuple(name for name in catalogue.metrics if name not in MEASURED),
            plugins=(str(plugin),),
        )
        names, settings = PAIRS[number % 2]
        arms = [ArmSettings(strategies=(name,), settings={name: settings}) for name in names]
        resources = StudyResources(study, catalogue)
        runs = [(arm.title, seed) for arm in arms for seed in study.seeds]
        places = {(title, seed): folder / "study" / title / f"seed{seed}" for title, seed in runs}
        (folder / "study").mkdir(exist_ok=True)
        resources.test_pairs.export(folder / "study" / "pairs.json")
        with pytest.MonkeyPatch.context() as patch:  # the noise of scores decides nothing here
            patch.setattr("snac_runner.unit.noise_floor", lambda *_: 0.0)
            run_arms(arms, places, resources, controls=folder / "study")
        build(folder / "study")
        results = read(folder / "study")
        numbers = compute(results)
        (pair,) = numbers.comparisons
        assert pair.difference is not None
        said = {
            "word": pair.decision.word,
            "difference": pair.difference.mean,
            "interval": [pair.difference.low, pair.difference.high],
            "p": pair.p_adjusted,
            "headline": verdict(results, numbers).headline,
        }
        result.write_text(json.dumps(said))
    said = json.loads(result.read_text())
    print(number, said, flush=True)
    return said["word"], said["difference"]
