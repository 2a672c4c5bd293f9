"""Errors of Whisper, a large word recogniser from the hub, through transformers: asked for by name, `also`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from runner.evaluate.readings import errors, remembered
from snac_core.errors import UserError
from snac_core.metric import Conversion, Metric
from snac_core.tensor_digest import tensor_digest


class WhisperWER(Metric):
    """Word error rate of the converted output, capped at 1, by Whisper (Radford et al. 2022, arXiv 2212.04356).

    Against the text where there is one, else against the same recogniser's reading of the source. A subclass with
    another `name` and `model` is a metric of its own.

    Attributes:
        model: hub id, or a folder as transformers saves it.
    """

    name, unit, direction, worst, requires = "whisper_wer", "share", "down", 1.0, ("transformers",)
    outputs = ("converted",)
    role, margin, on_request = "content", 0.01, True
    model: ClassVar[str] = "openai/whisper-small.en"

    @property
    def version(self) -> str:
        return _recogniser(self.model).version

    def prepare(self) -> None:
        """Load the model, fetching it where it is not there yet.

        Raises:
            UserError: if it is not there and cannot be fetched.
        """
        _recogniser(self.model)

    def __call__(self, conversion: Conversion) -> float | None:
        words = _recogniser(self.model).words
        return errors(conversion, words, lambda audio, rate: words(self.read(audio, rate)))

    def read(self, audio: Tensor, sample_rate: int) -> str:
        """What Whisper hears in `audio` (T,)."""
        recognise = _recogniser(self.model)
        return remembered(recognise.version, audio, sample_rate, lambda: recognise(audio, sample_rate))


class _Whisper:
    """The model and what prepares audio for it.

    Attributes:
        version: changes whenever a reading may.
    """

    rate = 16000  # Hz
    longest = 30.0  # s that the model hears at once

    def __init__(self, source: str) -> None:
        transformers = import_module("transformers")
        try:
            self.processor: Any = transformers.WhisperProcessor.from_pretrained(source)
            self.model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(source).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{source} is not there and could not be fetched ({reason}); download it from huggingface.co into the "
                "hub's cache, or set HF_HUB_OFFLINE=0 where there is a network"
            ) from error
        self.version = f"whisper {tensor_digest(self.model.state_dict().items())} {transformers.__version__}"

    @torch.inference_mode()
    def __call__(self, audio: Tensor, sample_rate: int) -> str:
        """Greedy reading of `audio` (T,), piece by piece where it is longer than the model hears at once."""
        from runner.data.audio import resample

        heard = resample(audio, sample_rate, self.rate)
        texts = []
        for piece in torch.split(heard, round(self.longest * self.rate)):
            features = self.processor(piece.numpy(), sampling_rate=self.rate, return_tensors="pt").input_features
            chosen = self.model.generate(features.to(self.model.dtype), do_sample=False, num_beams=1)
            texts.append(self.processor.batch_decode(chosen, skip_special_tokens=True)[0])
        return " ".join(texts)

    def words(self, text: str) -> list[str]:
        """Words as Whisper's authors compare them: "twenty" and "20", "colour" and "color" are one."""
        tokenizer = self.processor.tokenizer
        english: bool = bool(tokenizer.english_spelling_normalizer)  # a model of other languages comes without
        plain: str = tokenizer.normalize(text) if english else tokenizer.basic_normalize(text)
        return plain.split()


@cache
def _recogniser(source: str) -> _Whisper:
    return _Whisper(source)
