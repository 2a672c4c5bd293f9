"""Metrics: one number per evaluated conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

OUTPUTS = ("converted", "identity", "other", "synthetic")
"""Outputs of a system: the source under the embedding of the target, of its own speaker, and of a third speaker; and
the source with another pitch and other formants, under the embedding of its own speaker."""


@dataclass(frozen=True)
class Conversion:
    """One evaluated conversion: the input of a metric.

    Attributes:
        pair: id of the (source utterance, target speaker) pair.
        sample_rate: of every waveform, in Hz.
        source: the source audio (T,).
        converted: the output under the target's embedding (T,).
        identity: the output under the source speaker's own embedding (T,); None if the system has no such output.
        other: the output under a third speaker's embedding (T,), or None.
        synthetic: the output under the source speaker's own embedding (T,) for a source with shifted pitch and
            formants, or None.
        embeddings: the judge's unit vectors (S,) of "converted", "identity", "other", "synthetic", and of "degraded":
            the converted output after a 7 kHz low-pass filter and with noise at 30 dB SNR.
        references: the judge's unit vectors (S,) of the speakers "source" and "target", from audio reserved for
            scoring.
        speaker_encoder_embeddings, speaker_encoder_references: the same from the conditioning encoder; empty if the
            system has none.
        text: transcript of the source, if known.
        target: real speech of the target (T,), from the audio reserved for scoring, or None.
        parallel: the target's own recording (T,) of the sentence that `source` has, used neither for conditioning nor
            for scoring, or None.
        target_speaker: name of the target.
        candidates: the judge's unit vector (S,) of every target speaker, by name.
        same_words: whether the output should have the words of the source; False for another utterance of the target.
    """

    pair: str
    sample_rate: int
    source: Tensor
    converted: Tensor
    identity: Tensor | None = None
    other: Tensor | None = None
    synthetic: Tensor | None = None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    references: Mapping[str, Tensor] = field(default_factory=dict)
    speaker_encoder_embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    speaker_encoder_references: Mapping[str, Tensor] = field(default_factory=dict)
    text: str | None = None
    target: Tensor | None = None
    target_speaker: str = ""
    candidates: Mapping[str, Tensor] = field(default_factory=dict)
    same_words: bool = True
    parallel: Tensor | None = None


class Metric:
    """One measure, called with one conversion.

    Attributes:
        name: identifier; the column of the report.
        unit: e.g. "cosine", "dB"; "" for a pure number.
        direction: whether a higher value ("up") or a lower one ("down") is better.
        worst: the value for output that is NaN or silent; such output counts, it is not a missing value.
        outputs: those of OUTPUTS that the metric judges: if one of them is NaN or silent, the value is `worst`.
        references: attributes of the conversion that it compares the output with, e.g. ("parallel",): the metric does
            not apply where one of them is None, whatever the output.
        requires: importable packages that it needs; if one is not installed, the metric is reported as missing.
        on_request: True for a metric that downloads a large model or takes long: it is measured only in studies that
            list it in `extra_metrics`.
        languages: codes of the languages that it can judge, e.g. ("en",); () for any.
        role: "content" for an error rate of the words (a fraction, "down") that may be the study's primary content
            metric. Of those whose controls are at least 30 points apart, the one with the smallest margin is used, then
            the one with the largest distance.
            "naturalness" for a mean opinion score ("up") that is not measured if it is low for the unchanged sources.
            "speaker" for a similarity to the target ("up") by a further judge: a difference in speaker similarity
            counts only if it has the same sign in all metrics with this role.
        margin: non-inferiority margin of a primary metric, in its unit.
    """

    name: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    direction: ClassVar[Literal["up", "down"]] = "up"
    worst: ClassVar[float] = 0.0
    outputs: ClassVar[tuple[str, ...]] = OUTPUTS
    references: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    on_request: ClassVar[bool] = False
    languages: ClassVar[tuple[str, ...]] = ()
    role: ClassVar[Literal["", "content", "naturalness", "speaker"]] = ""
    margin: ClassVar[float] = 0.0

    @property
    def version(self) -> str:
        """What the values depend on besides the conversion, e.g. the digest of a recogniser.

        Values of different versions are not compared.
        """
        return ""

    def prepare(self) -> None:
        """Load models and other resources. Called once, before the first conversion.

        Raises:
            UserError: if a resource is not available; the metric is then reported as missing, with this reason.
        """

    def prefetch(self, conversions: Sequence[Conversion]) -> None:
        """Compute in one batch what the calls for these conversions need. Called before them; does nothing here.

        The values must not depend on it. An exception is logged, and the conversions are measured one by one.
        """

    def __call__(self, conversion: Conversion) -> float | None:
        """Measure one conversion.

        Args:
            conversion: with waveforms (T,) at `conversion.sample_rate`.

        Returns:
            the value in `unit`, or None if the metric does not apply to this conversion.

        Raises:
            Exception: any, if the measurement fails; the value is then missing, with this reason.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(conversion)")
