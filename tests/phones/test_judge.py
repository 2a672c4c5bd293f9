"""The bundled phone recogniser as a content judge."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import snac_runner
from phone_recogniser import Judge, compare, measure, phone_judge
from snac_core import SNAC, discover
from snac_core.errors import UserError
from snac_core.metric import Conversion
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import synthesize
from snac_runner.evaluate.content import PER, PERAboveHalf, error_rate
from snac_runner.evaluate.phone_recogniser import ASSET, PhoneRecogniser, bundled, phones_of


@pytest.fixture(autouse=True)
def _no_readings_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two held-out voices of each split say five sentences; neither are in the recogniser's training data."""
    return open_corpus(synthesize(tmp_path_factory.mktemp("speech") / "synthetic", speakers=8, sentences=5))


@pytest.fixture(scope="module")
def codec() -> SNAC:
    return SNAC.from_pretrained("tiny").freeze()


def _conversion(converted: torch.Tensor, source: torch.Tensor, text: str | None = None) -> Conversion:
    return Conversion("a-to-b", 16000, source, converted, text=text)


def test_the_bundled_weights_are_small_enough_for_a_package() -> None:
    assert ASSET.stat().st_size < 8_000_000


def test_on_the_bundled_base_its_range_is_wide_enough_for_a_primary_measure(corpus: Corpus, codec: SNAC) -> None:
    found = measure(phone_judge(), corpus, "test", codec)
    assert found.known
    assert found.original <= found.bare < found.mismatched
    assert found.range >= 0.30


@pytest.mark.slow
@pytest.mark.parametrize("split", ["dev", "test"])
def test_on_real_speech_its_range_is_wide_enough_too(librispeech_mini: Path, codec: SNAC, split: str) -> None:
    assert measure(phone_judge(), open_corpus(librispeech_mini), split, codec, most=20).range >= 0.30


def test_the_range_of_a_perfect_judge_is_wide(corpus: Corpus) -> None:
    texts = iter([u.text or "" for u in corpus.splits["test"] for _ in range(2)])  # the original, then the output
    found = measure(Judge("oracle", phones_of, lambda audio, rate: phones_of(next(texts))), corpus, "test", None)
    assert (found.original, found.bare, found.above_half) == (0, 0, 0)
    assert found.range > 0.6


def test_a_transcript_does_not_depend_on_earlier_ones(corpus: Corpus) -> None:
    first, second = (load_audio(u, 16000) for u in corpus.splits["test"][:2])
    recognise = bundled()
    before = recognise(first, 16000)
    recognise(second, 16000)
    assert before == recognise(first, 16000) == PhoneRecogniser()(first[0], 16000)
    assert before


def test_noise_and_silence_have_lost_the_content(corpus: Corpus) -> None:
    utterance = corpus.splits["test"][0]
    source = load_audio(utterance, 16000)[0]
    noise = 0.05 * torch.randn(len(source), generator=torch.Generator().manual_seed(0))
    assert utterance.text
    clean = PER()(_conversion(source, source, utterance.text))
    assert clean is not None
    for nothing in (noise, torch.zeros_like(source)):
        lost = PER()(_conversion(nothing, source, utterance.text))
        assert lost is not None
        assert clean + 0.3 < lost <= PER.worst
        assert PERAboveHalf()(_conversion(nothing, source, utterance.text)) == 1.0


def test_without_a_text_the_source_is_the_reference(corpus: Corpus) -> None:
    source, other = (load_audio(u, 16000)[0] for u in corpus.splits["test"][:2])
    assert PER()(_conversion(source, source)) == 0
    recognise = bundled()
    assert PER()(_conversion(other, source)) == error_rate(recognise(source, 16000), recognise(other, 16000))
    assert PER()(_conversion(other, source, " ...")) == PER()(_conversion(other, source))


def test_an_output_that_should_say_something_else_has_no_phone_errors() -> None:
    apart = Conversion("a-to-b", 16000, torch.randn(16000), torch.randn(16000), same_words=False)
    assert PER()(apart) is None
    assert PERAboveHalf()(apart) is None


def test_without_phones_in_the_source_there_is_no_score() -> None:
    assert PER()(_conversion(torch.zeros(16000), torch.zeros(16000))) is None


def test_it_is_registered_as_a_measure_of_content_with_a_margin_of_five_points() -> None:
    metric = discover().metrics["per"]
    assert (metric.role, metric.margin, metric.direction, metric.worst) == ("content", 0.05, "down", 1.0)


def test_it_is_never_a_speaker_encoder() -> None:
    recognise = bundled()
    audio = torch.randn(1, 16000, requires_grad=True)
    assert all(isinstance(phone, str) for phone in recognise(audio, 16000))  # names carry no gradient
    assert not any(p.requires_grad for p in recognise.network.parameters())
    root = Path(snac_runner.__file__).parent
    for path in root.rglob("*.py"):
        imports = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            )
        }  # fmt: skip
        if any(name.startswith("snac_runner.evaluate.phone_recogniser") for name in imports):
            assert path.relative_to(root).parts[0] in ("phones", "evaluate"), f"{path} uses the judge of content"


def test_weights_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights of the phone recogniser"):
        PhoneRecogniser(tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(ASSET.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not load as weights"):
        PhoneRecogniser(damaged)


def test_an_unknown_judge_is_refused_with_the_nearest_name(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="unknown content judge 'word'; did you mean 'words'"):
        compare([corpus.root], judge=["word"])


def test_the_table_has_a_row_for_every_split(corpus: Corpus, codec: SNAC, capsys: pytest.CaptureFixture[str]) -> None:
    compare([corpus.root], split=["test"], most=5)
    lines = capsys.readouterr().out.splitlines()
    found = measure(phone_judge(), corpus, "test", codec, most=5)
    assert found.range == found.mismatched - found.bare
    assert len(lines) == 3
    assert f"| {corpus.name}/test ({found.utterances}) |" in lines[2]
    assert f"| {100 * found.range:.1f} |" in lines[2]
