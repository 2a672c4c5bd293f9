"""Whisper as a content judge: only on request, tested with a small model of the same architecture."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest
import torch
from small_study import Bench

from snac_core.errors import UserError
from snac_core.metric import Conversion
from snac_runner.controls import wanted_metrics
from snac_runner.evaluate.content import WhisperWER


def test_whisper_is_measured_only_on_request(bench: Bench) -> None:
    metrics, missing = wanted_metrics(bench.resources(bench.study()))
    assert "whisper_wer" not in metrics
    assert missing["whisper_wer"] == 'only when asked for: extra_metrics = ["whisper_wer"]'
    with pytest.raises(UserError, match=r"extra_metrics = 'whisper_werr': unknown metric.*whisper_wer"):
        wanted_metrics(bench.resources(bench.study(extra_metrics=("whisper_werr",))))


def test_without_transformers_it_is_missing_and_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else find(name))
    metrics, missing = wanted_metrics(bench.resources(bench.study(extra_metrics=("whisper_wer",))))
    assert "whisper_wer" not in metrics
    assert missing["whisper_wer"] == "needs transformers"


def test_a_model_that_cannot_be_loaded_is_missing_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoModel:
        @classmethod
        def from_pretrained(cls, source: str) -> Any:
            raise OSError(f"cannot reach the hub for {source}\nand more")

    fake = type(sys)("transformers")
    vars(fake).update(WhisperProcessor=NoModel, WhisperForConditionalGeneration=NoModel)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    _, missing = wanted_metrics(bench.resources(bench.study(extra_metrics=("whisper_wer",))))
    assert (
        "openai/whisper-small.en is not in the hub's cache and could not be downloaded (cannot reach"
        in missing["whisper_wer"]
    )
    assert "\n" not in missing["whisper_wer"]


class SmallWhisper(WhisperWER):
    """The metric with another model, as a plugin would have it."""

    name = "small_whisper_wer"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> type[WhisperWER]:
    """Random weights of Whisper's architecture, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (the hub-judges extra)")
    folder = tmp_path_factory.mktemp("whisper")
    letters = [*"abcdefghijklmnopqrstuvwxyz'", "\u0120", *"0123456789,.!?"]
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary = {token: number for number, token in enumerate([*letters, *special])}
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    (folder / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=24,
        pad_token_id=len(letters), bos_token_id=len(letters), eos_token_id=len(letters),
        decoder_start_token_id=len(letters) + 1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    SmallWhisper.model = str(folder)
    return SmallWhisper


def test_it_transcribes_any_rate_and_length(small: type[WhisperWER]) -> None:
    metric = small()
    metric.prepare()
    draw = torch.Generator().manual_seed(1)
    source, output = (0.1 * torch.randn(24000, generator=draw) for _ in range(2))
    transcript = metric.read(source, 24000)
    assert isinstance(transcript, str)
    assert metric.read(source, 24000) == transcript
    assert metric.read(0.1 * torch.randn(31 * 16000, generator=draw), 16000) is not None
    judged = metric(Conversion("p", 24000, source, source, text="the boat sank"))
    assert judged is not None
    assert 0 <= judged <= 1
    assert metric(Conversion("p", 24000, source, output, same_words=False)) is None
    assert metric(Conversion("p", 24000, source, source)) == (0 if transcript.strip() else None)


def test_spellings_and_numbers_are_compared_as_the_authors_of_whisper_do(small: type[WhisperWER]) -> None:
    from snac_runner.evaluate.content import _whisper_recogniser

    words = _whisper_recogniser(small.model).words
    assert words("Twenty boats, in COLOUR!") == words("20 boats in color")
