"""How numbers, names and metrics are displayed: labels, units, directions, and one line of meaning per metric.

A metric that is not in `DISPLAYS` is displayed with the unit and direction that its result states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from snac_runner.config import SHUFFLED
from snac_runner.evaluate.statistics import Estimate
from snac_runner.report.results import Result


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """A number with a true minus sign; an em dash if there is none."""
    if value is None or not math.isfinite(value):
        return "—"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def bracket(e: Estimate, digits: int = 2) -> str:
    """The interval as [low, high]; empty if there is none."""
    return f"[{number(e.low, digits)}, {number(e.high, digits)}]" if math.isfinite(e.low) else ""


def probability(p: float) -> str:
    """A p-value as "p = 0.023"."""
    if not math.isfinite(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(n: int, noun: str) -> str:
    """1 arm, 2 arms."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_CONTROLS = {
    "mismatched": "mismatched: bare codec of another utterance",
    "signal_processing": "signal-processing baseline: pitch and formants of the target, bare codec",
    SHUFFLED: "shuffled embeddings",
    "source": "source, unchanged",
    "floor": "floor: bare codec of the source",
    "ceiling": "ceiling: bare codec of the target",
}


def called(name: str) -> str:
    """The label of a control in a table: its name, then after a colon what it is. Other names are unchanged."""
    return _CONTROLS.get(name, name)


def short_label(name: str) -> str:
    """The label of a control without its explanation. Other names are unchanged."""
    return re.split("[:,]", _CONTROLS[name])[0] if name in _CONTROLS else name


@dataclass(frozen=True)
class MetricDisplay:
    """How a metric is displayed.

    Attributes:
        name: of the metric, or of a quantity derived from metrics.
        label: heading of its column.
        unit: displayed under the label.
        direction: which way is better: "up", "down", or "" for neither.
        group: its table: "speaker", "content", "naturalness", "parallel", "prosody", "identity",
            "speaker_encoder", "embedding" or "other".
        digits: after the decimal point.
        meaning: one line.
    """

    name: str
    label: str
    unit: str
    direction: str
    group: str
    digits: int
    meaning: str

    @property
    def arrow(self) -> str:
        """The direction as an arrow."""
        return {"up": "↑", "down": "↓"}.get(self.direction, "")


_OWN = "of the output under the source's own embedding"

DISPLAYS = {
    display.name: display
    for display in (
        MetricDisplay("normalised", "Normalised SECS", "share", "up", "speaker", 2,
            "(SECS − floor) / (ceiling − floor): 0 is the bare codec, 1 is the target's own speech through the codec"),
        MetricDisplay("secs", "SECS", "cosine", "up", "speaker", 3,
            "cosine of the judge's embedding of the output and the target speaker's mean embedding"),
        MetricDisplay("secs_source", "Source similarity", "cosine", "down", "speaker", 3,
            "cosine of the output and the source speaker's mean embedding"),
        MetricDisplay("specificity", "Specificity", "cosine", "up", "speaker", 3,
            "SECS under the target's embedding minus SECS under another speaker's"),
        MetricDisplay("top1", "Speaker identification accuracy", "share", "up", "speaker", 2,
            "conversions that the judge assigns to this target among all target speakers"),
        MetricDisplay("accepted", "Accepted", "share", "up", "speaker", 2,
            "conversions with SECS at or above the judge's threshold, calibrated on real trials after the codec"),
        MetricDisplay("eer", "EER", "share", "", "speaker", 2,
            "equal error rate of the target's own utterances, through the codec, against conversions: at 0.5 the judge "
            "cannot distinguish them; values above are suspicious"),
        MetricDisplay("preferred", "Preferred", "share of votes", "up", "speaker", 2,
            "blind votes that it is closer to the target than another arm; the interval is over votes"),
        MetricDisplay("spk_id", "spk_id", "1 − cos", "down", "speaker", 3,
            f"distance {_OWN} to the source speaker's mean embedding"),
        MetricDisplay("spk_vc", "spk_vc", "1 − cos", "down", "speaker", 3,
            "distance of the converted output to the target speaker's mean embedding"),
        MetricDisplay("spk_synth", "spk_synth", "1 − cos", "down", "speaker", 3,
            "as spk_id, of a source with shifted pitch and formants: small if the embedding undoes the shift"),
        MetricDisplay("gap", "Gap", "1 − cos", "down", "speaker", 3, "spk_vc − spk_id; the goal is below 0.1"),
        MetricDisplay("normalised_content", "Normalised content error", "share", "down", "content", 2,
            "(error − bare codec's) / (mismatched − bare codec's): 0 is the bare codec, 1 is other words"),
        MetricDisplay("per", "Phone error rate", "share", "down", "content", 3,
            "of the converted output; the reference is the text, else the recogniser's transcript of the source"),
        MetricDisplay("per_above_half", "PER above 50 %", "share", "down", "content", 2,
            "utterances with more than half of the phones wrong"),
        MetricDisplay("wer", "Word error rate", "share", "down", "content", 3,
            "of the converted output, by Whisper; the reference is the text, else Whisper's transcript of the source"),
        MetricDisplay("cer", "Character error rate", "share", "down", "content", 3,
            "as the word error rate, of characters"),
        MetricDisplay("insertions", "Insertions", "share", "down", "content", 3,
            "words added, per word of the reference; with deletions and substitutions, the word error rate"),
        MetricDisplay("deletions", "Deletions", "share", "down", "content", 3,
            "words missing, per word of the reference"),
        MetricDisplay("substitutions", "Substitutions", "share", "down", "content", 3,
            "words replaced, per word of the reference"),
        MetricDisplay("lost", "WER above 50 %", "share", "down", "content", 2,
            "utterances with more than half of the words wrong"),
        MetricDisplay("distillmos", "DistillMOS", "MOS", "up", "naturalness", 2,
            "naturalness of the converted output, 1 to 5: a mean opinion score predicted by DistillMOS"),
        MetricDisplay("dnsmos", "DNSMOS", "MOS", "up", "naturalness", 2,
            "naturalness of the converted output, 1 to 5: a P.808 mean opinion score predicted by DNSMOS"),
        MetricDisplay("mcd", "Mel-cepstral distortion", "dB", "down", "parallel", 2,
            "distance of the aligned mel-cepstra of the converted output and the target's recording of the sentence"),
        MetricDisplay("f0_rmse", "F0 RMSE", "semitones", "down", "parallel", 2,
            "root mean square difference of log F0 to that recording, in aligned frames that are voiced in both"),
        MetricDisplay("f0_correlation", "F0 correlation", "r", "up", "prosody", 2,
            "correlation of the log-F0 contours of output and source"),
        MetricDisplay("f0_error", "Mean F0 error", "semitones", "down", "prosody", 2,
            "distance of the output's mean log-F0 to the target speaker's"),
        MetricDisplay("voicing_error", "Voicing error", "share", "down", "prosody", 3,
            "frames that are voiced in either output or source, but not in both"),
        MetricDisplay("secs_degraded", "SECS after degradation", "cosine", "up", "speaker_encoder", 3,
            "SECS after a 7 kHz low-pass and noise at 30 dB"),
        MetricDisplay("fragility", "Loss by degradation", "cosine", "down", "speaker_encoder", 3,
            "SECS − SECS after degradation; far above the bare codec's: an adversarial attack on the judge"),
        MetricDisplay("distillmos_identity", "DistillMOS, identity", "MOS", "up", "identity", 2, f"naturalness {_OWN}"),
        MetricDisplay("dnsmos_identity", "DNSMOS, identity", "MOS", "up", "identity", 2, f"naturalness {_OWN}"),
        MetricDisplay("stoi", "STOI", "0 to 1", "up", "identity", 3, f"intelligibility {_OWN}"),
        MetricDisplay("pesq", "PESQ", "MOS-LQO", "up", "identity", 2, f"perceived quality {_OWN}"),
        MetricDisplay("mel", "Mel distance", "log10", "down", "identity", 3, f"{_OWN} to the source"),
        MetricDisplay("stft", "STFT distance", "multi-scale", "down", "identity", 3, f"{_OWN} to the source"),
        MetricDisplay("si_sdr", "SI-SDR", "dB", "up", "identity", 1, f"{_OWN}; the source is the reference"),
        MetricDisplay("speaker_encoder_secs", "SECS by the conditioning encoder", "cosine", "", "speaker_encoder", 3,
            "SECS measured with the encoder that the arm is conditioned on"),
        MetricDisplay("speaker_encoder_normalised", "Normalised SECS by the conditioning encoder", "share", "",
            "speaker_encoder", 2,
            "(its SECS − floor) / (ceiling − floor): far above the judge's if the arm overfits to this encoder"),
        MetricDisplay("overrating", "Conditioning encoder − judge", "cosine", "", "speaker_encoder", 3,
            "SECS by the conditioning encoder minus SECS by the judge"),
        MetricDisplay("secs_own", "SECS under the source's own embedding", "cosine", "", "embedding", 3, "a control"),
        MetricDisplay("secs_other", "SECS under another speaker's embedding", "cosine", "", "embedding", 3,
            "a control"),
    )
}  # fmt: skip


BY_JUDGE = ("normalised", "secs", "secs_source", "specificity", "top1", "accepted", "eer", "spk_id", "spk_vc", "gap")
"""Metrics in the table of a further judge."""


def by_judge(metric: MetricDisplay, judge: str) -> MetricDisplay:
    """A metric of speaker similarity as displayed for a further judge."""
    return replace(metric, name=f"{judge}_{metric.name}", group=f"judge {judge}")


def further_judges(results: Iterable[Result]) -> list[str]:
    """Names of the judges of the speaker after the first."""
    return list(dict.fromkeys(judge.name for result in results for judge in result.judges[1:]))


def display_of(name: str, results: Iterable[Result] = ()) -> MetricDisplay:
    """How a metric is displayed: as listed, with the unit that the results state; else by what they state alone."""
    results = list(results)
    for judge in further_judges(results):
        if (base := name.removeprefix(f"{judge}_")) != name and base in DISPLAYS:
            return by_judge(DISPLAYS[base], judge)
    stated = next((r.metrics[name] for r in results if name in r.metrics), None)
    if name in DISPLAYS:
        return replace(DISPLAYS[name], unit=stated.unit) if stated is not None and stated.unit else DISPLAYS[name]
    unit, direction = (stated.unit, stated.direction) if stated is not None else ("", "")
    return MetricDisplay(name, name, unit, direction, "other", 3, "")


def measured_metrics(results: Iterable[Result]) -> list[MetricDisplay]:
    """Every metric that a result has: those of `DISPLAYS` in its order, then others by name."""
    results = list(results)
    names = {n for r in results for n in r.metrics} | {n for r in results for u in r.utterances for n in u.metrics}
    ordered = [n for n in DISPLAYS if n in names] + sorted(names - set(DISPLAYS))
    return [display_of(n, results) for n in ordered]
