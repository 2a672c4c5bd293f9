"""The built-in metrics of speaker similarity and signal quality, and the registration of all built-in metrics.

A metric is called with one conversion; see `snac_core.metric.Conversion` for its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from snac_core.hookspecs import hookimpl
from snac_core.losses import MultiScaleSTFT, mel_distance
from snac_core.metric import Conversion, Metric
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.evaluate.content import CER, PER, WER, Deletions, Insertions, PERAboveHalf, Substitutions
from snac_runner.evaluate.naturalness import DNSMOS, DistillMOS, DistillMOSIdentity, DNSMOSIdentity
from snac_runner.evaluate.parallel import F0RMSE, MCD
from snac_runner.evaluate.prosody import F0Correlation, F0Error, VoicingError


def _cosine(embeddings: Mapping[str, Tensor], of: str, references: Mapping[str, Tensor], to: str) -> float | None:
    if of not in embeddings or to not in references:
        return None
    return float(embeddings[of].double() @ references[to].double())


class SECS(Metric):
    """Speaker embedding cosine similarity of the converted output to the target speaker, by the judge."""

    name, unit, direction, worst = "secs", "cosine", "up", -1.0
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        return _cosine(conversion.embeddings, "converted", conversion.references, "target")


class SECSSource(Metric):
    """Source similarity: cosine of the converted output to the source speaker, by the judge."""

    name, unit, direction, worst = "secs_source", "cosine", "down", 1.0
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        return _cosine(conversion.embeddings, "converted", conversion.references, "source")


class SECSOwn(Metric):
    """Cosine to the target of the output under the source speaker's own embedding, by the judge."""

    name, unit, direction, worst = "secs_own", "cosine", "down", 1.0
    outputs = ("identity",)

    def __call__(self, conversion: Conversion) -> float | None:
        return _cosine(conversion.embeddings, "identity", conversion.references, "target")


class SECSOther(Metric):
    """Cosine to the target of the output under a third speaker's embedding, by the judge."""

    name, unit, direction, worst = "secs_other", "cosine", "down", 1.0
    outputs = ("other",)

    def __call__(self, conversion: Conversion) -> float | None:
        return _cosine(conversion.embeddings, "other", conversion.references, "target")


class Specificity(Metric):
    """SECS under the target's embedding minus SECS under a third speaker's: the effect of the right embedding."""

    name, unit, direction, worst = "specificity", "cosine", "up", -2.0
    outputs = ("converted", "other")

    def __call__(self, conversion: Conversion) -> float | None:
        right = _cosine(conversion.embeddings, "converted", conversion.references, "target")
        wrong = _cosine(conversion.embeddings, "other", conversion.references, "target")
        return None if right is None or wrong is None else right - wrong


class SECSDegraded(Metric):
    """SECS after a 7 kHz low-pass and with noise at 30 dB SNR: a gain that this removes is an adversarial attack."""

    name, unit, direction, worst = "secs_degraded", "cosine", "up", -1.0
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        return _cosine(conversion.embeddings, "degraded", conversion.references, "target")


class Top1(Metric):
    """Speaker identification: 1 if, by the judge, the output is closer to the target than to all others, else 0."""

    name, unit, direction, worst = "top1", "share", "up", 0.0
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        if "converted" not in conversion.embeddings or conversion.target_speaker not in conversion.candidates:
            return None
        scores = {
            name: float(conversion.embeddings["converted"].double() @ reference.double())
            for name, reference in conversion.candidates.items()
        }
        return float(max(scores, key=scores.__getitem__) == conversion.target_speaker)


class SpkVC(Metric):
    """Distance of the converted output to the target speaker, 1 - cosine, by the judge."""

    name, unit, direction, worst = "spk_vc", "1 - cosine", "down", 2.0
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        similarity = _cosine(conversion.embeddings, "converted", conversion.references, "target")
        return None if similarity is None else 1 - similarity


class SpkID(Metric):
    """Distance of the output under the own embedding to the source speaker, 1 - cosine, by the judge."""

    name, unit, direction, worst = "spk_id", "1 - cosine", "down", 2.0
    outputs = ("identity",)

    def __call__(self, conversion: Conversion) -> float | None:
        similarity = _cosine(conversion.embeddings, "identity", conversion.references, "source")
        return None if similarity is None else 1 - similarity


class SpkSynth(Metric):
    """As spk_id, of a source with shifted pitch and formants: 0 if the embedding undoes the shift."""

    name, unit, direction, worst = "spk_synth", "1 - cosine", "down", 2.0
    outputs = ("synthetic",)

    def __call__(self, conversion: Conversion) -> float | None:
        similarity = _cosine(conversion.embeddings, "synthetic", conversion.references, "source")
        return None if similarity is None else 1 - similarity


class Gap(Metric):
    """spk_vc - spk_id: how much larger the distance to the speaker is in conversion than in identity."""

    name, unit, direction, worst = "gap", "1 - cosine", "down", 2.0
    outputs = ("converted", "identity")

    def __call__(self, conversion: Conversion) -> float | None:
        vc, identity = SpkVC()(conversion), SpkID()(conversion)
        return None if vc is None or identity is None else vc - identity


BY_EVERY_JUDGE = (SECS, SECSSource, SECSOther, SECSDegraded, Specificity, Top1, SpkID, SpkVC, Gap)
"""Metrics of speaker similarity that every judge measures."""


class ByJudge(Metric):
    """A metric of speaker similarity by a further judge: called with that judge's embeddings in the conversion.

    Args:
        judge: the further judge.
        metric: one of `BY_EVERY_JUDGE`.
    """

    def __init__(self, judge: SpeakerEncoder, metric: Metric) -> None:
        self.judge, self._metric, self._version = judge.name, metric, f"{judge.name} {judge.digest[:16]}"
        vars(self).update(
            name=f"{judge.name}_{metric.name}", unit=metric.unit, direction=metric.direction, worst=metric.worst,
            outputs=metric.outputs, role="speaker" if isinstance(metric, SECS) else "",
        )  # fmt: skip

    @property
    def version(self) -> str:
        return self._version

    def __call__(self, conversion: Conversion) -> float | None:
        return self._metric(conversion)


def by_further_judges(metrics: Mapping[str, Metric], judges: Sequence[SpeakerEncoder]) -> dict[str, Metric]:
    """The speaker metrics among `metrics` by every judge but the first, which has the metrics' own names."""
    of_speaker = [metric for metric in metrics.values() if type(metric) in BY_EVERY_JUDGE]
    found = [ByJudge(judge, metric) for judge in judges[1:] for metric in of_speaker]
    return {metric.name: metric for metric in found}


class SpeakerEncoderSECS(Metric):
    """SECS by the conditioning encoder: far above the judge's, it shows a strategy that only fools this encoder."""

    name, unit, direction, worst = "speaker_encoder_secs", "cosine", "up", -1.0
    outputs = ("converted",)

    def __call__(self, conversion: Conversion) -> float | None:
        return _cosine(
            conversion.speaker_encoder_embeddings, "converted", conversion.speaker_encoder_references, "target"
        )


class STOI(Metric):
    """Intelligibility of the output under the own embedding; the source is the reference (Taal et al. 2011; pystoi)."""

    name, unit, direction, worst, requires = "stoi", "", "up", 0.0, ("pystoi",)
    outputs = ("identity",)

    def __call__(self, conversion: Conversion) -> float | None:
        if conversion.identity is None:
            return None
        from pystoi import stoi

        return float(stoi(conversion.source.numpy(), conversion.identity.numpy(), conversion.sample_rate))


class PESQ(Metric):
    """Wide-band PESQ at 16 kHz of the output under the own embedding; the source is the reference (ITU-T P.862.2)."""

    name, unit, direction, worst, requires = "pesq", "MOS-LQO", "up", 1.0, ("pesq",)
    outputs = ("identity",)

    def __call__(self, conversion: Conversion) -> float | None:
        if conversion.identity is None:
            return None
        from pesq import pesq
        from torchaudio.functional import resample

        source, identity = (
            resample(wave, conversion.sample_rate, 16_000).numpy() for wave in (conversion.source, conversion.identity)
        )
        return float(pesq(16_000, source, identity, "wb"))


class Mel(Metric):
    """Mean absolute difference of log10 mel spectra, of the output under the own embedding and the source."""

    name, unit, direction, worst = "mel", "log10", "down", 5.0
    outputs = ("identity",)

    def __call__(self, conversion: Conversion) -> float | None:
        if conversion.identity is None:
            return None
        return float(
            mel_distance(conversion.identity[None, None], conversion.source[None, None], conversion.sample_rate)
        )


class STFT(Metric):
    """Multi-scale STFT distance, of the output under the own embedding and the source."""

    name, unit, direction, worst = "stft", "", "down", 10.0
    outputs = ("identity",)

    def __call__(self, conversion: Conversion) -> float | None:
        if conversion.identity is None:
            return None
        return float(MultiScaleSTFT()(conversion.identity[None, None], conversion.source[None, None]))


class SISDR(Metric):
    """Scale-invariant signal-to-distortion ratio of the output under the own embedding (Le Roux et al. 2019, eq. 3).

    torchmetrics gives the same values in float64 to 1e-12, but rounds in float32, and takes seconds to import.
    """

    name, unit, direction, worst = "si_sdr", "dB", "up", -60.0
    outputs = ("identity",)

    def __call__(self, conversion: Conversion) -> float | None:
        if conversion.identity is None:
            return None
        source = conversion.source.double() - conversion.source.double().mean()
        estimate = conversion.identity.double() - conversion.identity.double().mean()
        target = (estimate @ source) / source.square().sum().clamp(min=1e-12) * source
        error = (estimate - target).square().sum().clamp(min=1e-12)
        return float(10 * torch.log10(target.square().sum().clamp(min=1e-12) / error))


@hookimpl
def register_metrics(register: Callable[[type], None]) -> None:
    """Register the built-in metrics."""
    for metric in (
        SECS, SECSSource, SECSOwn, SECSOther, SECSDegraded, Specificity, Top1, SpkID, SpkVC, SpkSynth, Gap,
        SpeakerEncoderSECS, WER, CER, Insertions, Deletions, Substitutions, PER, PERAboveHalf,
        DistillMOS, DistillMOSIdentity, DNSMOS, DNSMOSIdentity,
        F0Correlation, F0Error, VoicingError, MCD, F0RMSE, STOI, PESQ, Mel, STFT, SISDR,
    ):  # fmt: skip
        register(metric)
