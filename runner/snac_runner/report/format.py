"""Numbers and names as readers like them.

What the metrics of a result are called on the page: label, unit, direction, and one line of meaning.

A metric that is not listed is shown all the same, with the unit and direction that its result gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from snac_runner.config import SHUFFLED
from snac_runner.evaluate.statistics import Estimate
from snac_runner.report.results import Result


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """A number for readers: a true minus sign, an em dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "—"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def bracket(e: Estimate, digits: int = 2) -> str:
    """The interval as [low, high], or nothing where there is none."""
    return f"[{number(e.low, digits)}, {number(e.high, digits)}]" if math.isfinite(e.low) else ""


def probability(p: float) -> str:
    if not math.isfinite(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_CONTROLS = {
    "mismatched": "mismatched: bare codec of another utterance",
    "signal_processing": "signal-processing baseline: pitch and formants, bare codec",
    SHUFFLED: "shuffled embeddings",
    "source": "source, unchanged",
    "floor": "floor: bare codec of the source",
    "ceiling": "ceiling: bare codec of the target",
}


def called(name: str) -> str:
    """A control as a table calls it: its name, after a colon what it is. Any other name is unchanged."""
    return _CONTROLS.get(name, name)


@dataclass(frozen=True)
class Metric:
    """How a measure is shown. `direction` says which way is good: "up", "down", or "" for neither."""

    name: str
    label: str
    unit: str
    direction: str
    group: str  # "speaker", "content", "prosody", "identity", "speaker_encoder", "embedding" or "other"
    digits: int
    meaning: str

    @property
    def arrow(self) -> str:
        return {"up": "↑", "down": "↓"}.get(self.direction, "")


KNOWN = {
    metric.name: metric
    for metric in (
        Metric("normalised", "Normalised SECS", "share", "up", "speaker", 2,
               "(SECS − floor) / (ceiling − floor): 0 is the bare codec, 1 the target's own voice through it"),
        Metric("secs", "SECS", "cosine", "up", "speaker", 3,
               "cosine of the judge's embedding of the output to the target speaker's mean"),
        Metric("secs_source", "Leak", "cosine", "down", "speaker", 3,
               "cosine of the output to the source speaker's mean"),
        Metric("specificity", "Specificity", "cosine", "up", "speaker", 3,
               "SECS under the right embedding minus SECS under another speaker's"),
        Metric("top1", "Identified", "share", "up", "speaker", 2, "the judge names this target among all targets"),
        Metric("accepted", "Accepted", "share", "up", "speaker", 2,
               "SECS at or above the judge's threshold, calibrated on real trials after the codec"),
        Metric("eer", "EER", "share", "", "speaker", 2,
               "the target's own utterances, through the codec, against conversions: at 0.5 the judge cannot tell them "
               "apart, above is suspicious"),
        Metric("preferred", "Preferred", "share of votes", "up", "speaker", 2,
               "how often listeners, blind, found it closer to the target than another arm; interval over votes"),
        Metric("spk_id", "spk_id", "1 − cos", "down", "speaker", 3,
               "distance of the output under the source's own embedding to the source speaker's mean"),
        Metric("spk_vc", "spk_vc", "1 − cos", "down", "speaker", 3,
               "distance of the converted output to the target's mean"),
        Metric("spk_synth", "spk_synth", "1 − cos", "down", "speaker", 3,
               "as spk_id, where the source's pitch and formants were moved before: whether the embedding undoes that"),
        Metric("gap", "Gap", "1 − cos", "down", "speaker", 3, "spk_vc − spk_id; the goal is under 0.1"),
        Metric("normalised_content", "Normalised content error", "share", "down", "content", 2,
               "(error − bare codec's) / (mismatched − bare codec's): 0 is the bare codec, 1 is other words"),
        Metric("per", "Phone errors", "share", "down", "content", 3,
               "phone error rate of the converted output, by the text, else by the recogniser's reading of the source"),
        Metric("per_above_half", "Over half wrong", "share", "down", "content", 2,
               "share of utterances of which more than half of the phones are wrong"),
        Metric("wer", "Word errors", "share", "down", "content", 3,
               "word error rate of the converted output, by the text, else by the recogniser's reading of the source"),
        Metric("whisper_wer", "Word errors by Whisper", "share", "down", "content", 3, "likewise, by whisper-small.en"),
        Metric("cer", "Character errors", "share", "down", "content", 3, "likewise, of characters"),
        Metric("lost", "Above 50 % WER", "share", "down", "content", 2, "utterances with over half of the words wrong"),
        Metric("f0_correlation", "Melody", "r", "up", "prosody", 2,
               "correlation of the log-F0 contours of output and source, their means removed"),
        Metric("f0_error", "Pitch error", "semitones", "down", "prosody", 2,
               "distance of the output's mean log-F0 to the target speaker's"),
        Metric("voicing_error", "Voicing error", "share", "down", "prosody", 3,
               "frames that are voiced in one of output and source only"),
        Metric("secs_degraded", "SECS, degraded", "cosine", "up", "speaker_encoder", 3,
               "SECS after a 7 kHz low-pass and with noise at 30 dB"),
        Metric("fragility", "Lost by degradation", "cosine", "down", "speaker_encoder", 3,
               "SECS minus SECS degraded; much more than the bare codec loses is an inaudible attack on the judge"),
        Metric("stoi", "STOI", "0 to 1", "up", "identity", 3, "intelligibility under the own embedding"),
        Metric("pesq", "PESQ", "MOS-LQO", "up", "identity", 2, "perceived quality under the own embedding"),
        Metric("mel", "Mel distance", "log-mel L1", "down", "identity", 3, "to the source, under the own embedding"),
        Metric("stft", "STFT distance", "multi-scale", "down", "identity", 3, "to the source, under the own embedding"),
        Metric("si_sdr", "SI-SDR", "dB", "up", "identity", 1, "to the source, under the own embedding"),
        Metric("speaker_encoder_secs", "Conditioning encoder's SECS", "cosine", "", "speaker_encoder", 3, "the same score by the arm's own conditioning encoder"),
        Metric("speaker_encoder_normalised", "Conditioning encoder's normalised SECS", "share", "", "speaker_encoder", 2,
               "(conditioning encoder's SECS − floor) / (ceiling − floor): far above the judge's is what pleases the conditioning encoder alone"),
        Metric("overrating", "Conditioning encoder − judge", "cosine", "", "speaker_encoder", 3,
               "how much better the conditioning encoder finds the output than the judge does"),
        Metric("secs_own", "SECS under the source's own embedding", "cosine", "", "embedding", 3, "a control"),
        Metric("secs_other", "SECS under another speaker's embedding", "cosine", "", "embedding", 3, "a control"),
    )
}  # fmt: skip


def metric(name: str, results: Iterable[Result] = ()) -> Metric:
    """The listed metric, with the unit that the results state; else one made from what they state."""
    stated = next((r.metrics[name] for r in results if name in r.metrics), None)
    if name in KNOWN:
        return replace(KNOWN[name], unit=stated.unit) if stated is not None and stated.unit else KNOWN[name]
    unit, direction = (stated.unit, stated.direction) if stated is not None else ("", "")
    return Metric(name, name, unit, direction, "other", 3, "")


def present(results: Iterable[Result]) -> list[Metric]:
    """Every metric that some result has, listed ones first in the list's order, others by name."""
    results = list(results)
    names = {n for r in results for n in r.metrics} | {n for r in results for u in r.utterances for n in u.metrics}
    ordered = [n for n in KNOWN if n in names] + sorted(names - set(KNOWN))
    return [metric(n, results) for n in ordered]
