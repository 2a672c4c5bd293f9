"""Objectives: strategies that only contribute loss terms; they work with any adapter."""

from __future__ import annotations

from collections.abc import Callable

from snac_core import hookimpl
from snac_objectives.adversarial import Adversarial
from snac_objectives.code_prediction import CodePrediction
from snac_objectives.codebook_adversary import CodebookAdversary
from snac_objectives.content import Content
from snac_objectives.synthetic_vc import SyntheticVC
from snac_objectives.voice_conversion import VoiceConversion


@hookimpl
def register_strategies(register: Callable[[type], None]) -> None:
    """Offer the objectives."""
    for objective in (VoiceConversion, SyntheticVC, CodePrediction, Content, Adversarial, CodebookAdversary):
        register(objective)
