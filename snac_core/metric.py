"""What a metric is: one number about one evaluated conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

OUTPUTS = ("converted", "identity", "other", "synthetic")
"""What a system makes: of the source under the embedding of the target, of its own speaker, of a third; and of another
voice made out of the source, under the own speaker's."""


@dataclass(frozen=True)
class Conversion:
    """One evaluated conversion: everything a metric may look at.

    Attributes:
        pair: id of the (source utterance, target speaker) pair.
        sample_rate: of every waveform, in Hz.
        source: the source audio (T,).
        converted: the output under the target's embedding (T,).
        identity: the output under the source speaker's own embedding (T,); None where there is no such output.
        other: the output under a third speaker's embedding (T,); None likewise.
        synthetic: the output under the source speaker's own embedding where pitch and formants of the source were
            moved before (T,); None likewise.
        embeddings: the judge's unit vectors (S,) of "converted", "identity", "other", "synthetic", and "degraded": the
            converted output after a 7 kHz low-pass and with noise at 30 dB.
        references: the judge's unit vectors (S,) of the speakers "source" and "target", from audio kept for scoring.
        speaker_encoder_embeddings, speaker_encoder_references: the same by the conditioning encoder; empty where there is none.
        text: what is said, where known.
        target: some real speech of the target (T,), of the audio kept for scoring; None where there is none.
        target_speaker: name of the target.
        candidates: the judge's unit vectors (S,) of every target speaker, by name.
        same_words: whether the output should say what the source says; False for another utterance of the target.
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


class Metric:
    """One measure, called with one conversion.

    Attributes:
        name: identifier; the column of the report.
        unit: e.g. "cosine", "dB"; "" for a pure number.
        direction: whether "up" or "down" is better.
        worst: the score of output that is NaN or silent: such output is judged, not missing.
        outputs: of OUTPUTS, those that it judges: where one of them is NaN or silent, the score is `worst`.
        requires: importable packages it needs; where one is missing the metric is shown as missing.
        on_request: True for a metric that fetches a large model or takes long: it is measured only in studies that name
            it in `also`.
        role: "content" for an error rate of what is said (a share, down) that may be the study's primary measure of
            content. Of those, the one whose controls lie farthest apart is used; under 30 points apart, none is.
        margin: for a primary measure, the largest loss in its unit that still counts as not worse.
    """

    name: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    direction: ClassVar[Literal["up", "down"]] = "up"
    worst: ClassVar[float] = 0.0
    outputs: ClassVar[tuple[str, ...]] = OUTPUTS
    requires: ClassVar[tuple[str, ...]] = ()
    on_request: ClassVar[bool] = False
    role: ClassVar[Literal["", "content"]] = ""
    margin: ClassVar[float] = 0.0

    @property
    def version(self) -> str:
        """What its values depend on beside the conversion, e.g. a recogniser's digest; values of different versions are
        not compared."""
        return ""

    def prepare(self) -> None:
        """Make ready what it judges with, once before anything is judged.

        Raises:
            UserError: if that cannot be had here; the metric is then shown as missing, with this reason.
        """

    def __call__(self, conversion: Conversion) -> float | None:
        """The value; None where it does not apply. Raises when its tool fails."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(conversion)")
