"""Phase 3: contrastive learning with speaker embeddings.

The embedding of the converted output must be closer to its target than to other speakers. The strategy has a small FiLM
on the quantized latent, so that it can be trained alone; with another adapter set `path = false`, and it is only an
objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from snac_core import Conditioning, Step, Strategy, Tap, Taps, hookimpl
from snac_core.film import FiLM
from snac_core.legacy import LegacyKeys
from snac_core.losses import contrastive, margin_ranking
from snac_core.speakers.sampling import NEAR_DUPLICATE, Choice, Strata

_STRATA = {  # key of an original file: setting
    "same_speaker_threshold": "strata.same_speaker_threshold",
    "neg_ratio_easy": "strata.ratio_easy",
    "neg_ratio_medium": "strata.ratio_medium",
    "neg_ratio_hard": "strata.ratio_hard",
    "threshold_easy_medium": "strata.threshold_easy_medium",
    "threshold_medium_hard": "strata.threshold_medium_hard",
}


def _stratified(values: Mapping[str, Any]) -> bool:
    """Whether an original file draws stratified negatives."""
    return bool(values.get("use_stratified_negatives") or values.get("use_faiss_hard_negatives"))


def _from_original(values: Mapping[str, Any], is_adapter: bool) -> dict[str, Any]:
    """What several keys of an original file mean together."""
    settings: dict[str, Any] = {"path": is_adapter, "batch_negatives": False, "source_negative": False}
    if "contrastive_margin" in values:
        settings["form"] = "margin"
    if _stratified(values):
        settings["negatives"] = "stratified"
    return settings


def _unused_strata(values: Mapping[str, Any]) -> str | None:
    unused = [key for key in values if key in _STRATA]
    if not unused or _stratified(values):
        return None
    return f"{', '.join(unused)}: no effect without use_stratified_negatives"


class Phase3Contrastive(Strategy):
    """FiLM at `quantized`, trained with a contrastive loss between speaker embeddings."""

    name = "phase3_contrastive"
    after_taps: Sequence[str] = ("quantized",)
    default_weights = {"contrastive": 0.5}  # noqa: RUF012  (a constant of the class, as in its base)

    legacy_keys = LegacyKeys(
        places={
            "contrastive_weight": "weights.contrastive",
            "contrastive_margin": "margin",
            "max_negatives": "max_negatives",
            **_STRATA,
        },
        switch="contrastive_weight",
        known_by=("contrastive_margin", "contrastive_on_val"),
        computed_from=("use_stratified_negatives", "use_faiss_hard_negatives"),
        ignored={"contrastive_on_val": "validation converts and judges, it does not compute losses"},
        compute=_from_original,
        remark=_unused_strata,
    )

    class Config(Strategy.Config):
        path: bool = Field(True, description="Edit the quantized latent; false: only the loss.")
        form: Literal["infonce", "margin"] = Field("infonce", description="InfoNCE over cosines, or a hinge loss.")
        temperature: float = Field(0.1, gt=0, description="Divisor of the cosines in the infonce form.")
        margin: float = Field(
            0.1, ge=0, description="Margin between positive and negative distances in the margin form."
        )
        max_negatives: int = Field(8, ge=1, description="Number of sampled negatives per output.")
        negatives: Choice = Field(
            "random", description="How negatives are sampled; stratified: easy, medium and hard ones."
        )
        strata: Strata = Field(Strata(), description="Fractions and cosine thresholds of stratified sampling.")
        batch_negatives: bool = Field(True, description="Use the other speakers of the batch as negatives too.")
        source_negative: bool = Field(True, description="Use the source speaker as a negative too.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        if config.path:
            self.film = FiLM(taps.speaker_dim, taps.match(self.after_taps)[0].channels)
        else:
            self.after_taps = ()

    @hookimpl
    def after_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        edited: Tensor = self.film(x, cond.speaker)
        return edited

    def receptive_field(self, tap: Tap) -> float:
        """0: FiLM is constant over time."""
        return 0

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`contrastive`: the loss of the converted embeddings with positives and negatives; a scalar."""
        config, outputs = self.config, step.converted_embedding
        speakers, negatives = (part[step.output_rows].to(outputs.device) for part in self._negatives(step))
        mask = speakers >= 0
        positives = step.sampler.table.positives(step.target_ids).to(outputs.device)
        if config.form == "margin":
            term = margin_ranking(outputs, positives, negatives, mask, margin=config.margin)
        else:
            term = contrastive(outputs, positives, negatives, mask, temperature=config.temperature)
        return {"contrastive": term}

    def _negatives(self, step: Step) -> tuple[Tensor, Tensor]:
        """Speakers (M, N) and embeddings (M, N, S) of the negatives of each of the batch's M outputs; -1: none."""
        config, targets, reference = self.config, step.batch_target_ids, step.sampler.table.reference
        sources = step.batch_speaker_ids.repeat(len(targets) // len(step.batch_speaker_ids))
        drawn = step.sampler.negative_embeddings(
            sources, targets, step.index, config.max_negatives, choice=config.negatives, strata=config.strata
        )
        more = [drawn.speakers[:, :0]]
        if config.batch_negatives and config.negatives != "in_batch":  # those are drawn already
            present: Tensor = torch.unique(torch.cat([sources, targets])).expand(len(targets), -1)
            legal = reference[targets] @ reference[present[0]].T < NEAR_DUPLICATE
            legal &= (present != targets.unsqueeze(1)) & (present != sources.unsqueeze(1))
            more.append(torch.where(legal, present, -1))
        if config.source_negative:
            near = (reference[sources] * reference[targets]).sum(1) >= NEAR_DUPLICATE
            more.append(torch.where(near, -1, sources).unsqueeze(1))
        others = torch.cat(more, dim=1)
        again = (others.unsqueeze(2) == drawn.speakers.unsqueeze(1)).any(dim=2)
        once = torch.where(_without_repeats(drawn.rows) < 0, -1, drawn.speakers)
        speakers = torch.cat([once, _without_repeats(torch.where(again, -1, others))], dim=1)
        return speakers, torch.cat([drawn.embeddings, reference[others.clamp(min=0)]], dim=1)


def _without_repeats(rows: Tensor) -> Tensor:
    """Replace repeated indices of each row (M, N) by -1, so that no negative counts twice."""
    same = rows.unsqueeze(2) == rows.unsqueeze(1)  # (M, N, N)
    return torch.where(same.tril(-1).any(2), -1, rows)


@hookimpl
def register_strategies(register: Callable[[type], None]) -> None:
    """Offer the strategy."""
    register(Phase3Contrastive)
