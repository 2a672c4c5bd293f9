"""Content by phones: how many of those that were to be said the recogniser of this project hears otherwise."""

from __future__ import annotations

from torch import Tensor

from runner.evaluate.readings import errors, remembered
from runner.phones.alphabet import phones_of
from runner.phones.recogniser import bundled
from snac_core.metric import Conversion, Metric


class PER(Metric):
    """Phone error rate of the converted output: against the text where it is known, else as the source is read."""

    name, unit, direction, worst = "per", "share", "down", 1.0
    outputs = ("converted",)
    role, margin = "content", 0.05

    @property
    def version(self) -> str:
        return _version()

    def __call__(self, conversion: Conversion) -> float | None:
        return _errors(conversion)


class PERAboveHalf(Metric):
    """Whether more than half of the phones are wrong; the mean is the share of such utterances."""

    name, unit, direction, worst = "per_above_half", "share", "down", 1.0
    outputs = ("converted",)

    @property
    def version(self) -> str:
        return _version()

    def __call__(self, conversion: Conversion) -> float | None:
        rate = _errors(conversion)
        return None if rate is None else float(rate > 0.5)


def _errors(conversion: Conversion) -> float | None:
    return errors(conversion, phones_of, _read)


def _read(audio: Tensor, rate: int) -> tuple[str, ...]:
    reading = remembered(_version(), audio, rate, lambda: " ".join(bundled()(audio, rate)))
    return tuple(reading.split())


def _version() -> str:
    return f"phones {bundled().digest}"
