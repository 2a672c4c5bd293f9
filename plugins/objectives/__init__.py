"""Objectives: strategies that only contribute loss terms, usable with any placement."""

from __future__ import annotations

from collections.abc import Callable

from plugins.objectives.adversarial import Adversarial
from plugins.objectives.code_prediction import CodePrediction
from plugins.objectives.codebook_adversary import CodebookAdversary
from plugins.objectives.content import Content
from plugins.objectives.synthetic_vc import SyntheticVC
from plugins.objectives.voice_conversion import VoiceConversion
from snac_core import hookimpl


@hookimpl
def register_strategies(register: Callable[[type], None]) -> None:
    """Offer the objectives."""
    for objective in (VoiceConversion, SyntheticVC, CodePrediction, Content, Adversarial, CodebookAdversary):
        register(objective)
