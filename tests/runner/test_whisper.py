"""Whisper as a judge of content: windows, hallucinations, references, and what is said where it cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import Bench, RecordedConsole, arm
from torch import Tensor

from snac_core.errors import UserError
from snac_core.metric import Conversion
from snac_core.settings import checked
from snac_runner.config import StudySettings
from snac_runner.controls import check_speech, wanted_metrics
from snac_runner.data.audio import load_audio
from snac_runner.data.open_corpus import open_corpus
from snac_runner.evaluate import systems
from snac_runner.evaluate.content import (
    CER,
    PER,
    WER,
    Deletions,
    Insertions,
    Substitutions,
    WordErrors,
    error_rate,
    wrong_texts,
)
from snac_runner.evaluate.scoring import score
from snac_runner.evaluate.whisper import (
    BATCH,
    LONGEST,
    SAMPLE_RATE,
    SHORTEST,
    Reading,
    Whisper,
    _normalizer,
    find_whisper,
    not_found,
    split,
    window,
)

pytest.importorskip("faster_whisper", reason="needs faster-whisper (the judges extra)")
Script = Callable[[Tensor, float], Reading]
CPU = torch.device("cpu")
_NUMBERS = count()


class Scripted(Whisper):
    """Whisper with a function in place of its network.

    Attributes:
        batches: (window in s, number of clips) of every batch.
    """

    def __init__(self, script: Script, language: str = "en") -> None:
        self.script, self.language, self.version = script, language, f"scripted {next(_NUMBERS)}"
        self.normalize = _normalizer(language)
        self._pool = ThreadPoolExecutor(1)
        self.batches: list[tuple[float, int]] = []
        self.spoken = {language: 1.0}

    def _batch(self, waves: Sequence[Tensor], seconds: float) -> list[Reading]:
        self.batches.append((seconds, len(waves)))
        return [self.script(wave, seconds) for wave in waves]

    def languages(self, waves: Sequence[Tensor]) -> dict[str, float]:
        return self.spoken


def clear(text: str) -> Reading:
    """What is recognised without doubt."""
    return Reading(text, 0.0, -0.1)


def saying(texts: dict[float, str]) -> Scripted:
    """A recogniser of waves with constant samples."""
    return Scripted(lambda wave, _: clear(texts[round(float(wave[0]), 3)]))


def constant(value: float, seconds: float = 0.5) -> Tensor:
    return torch.full((round(seconds * SAMPLE_RATE),), value)


def judged(metric: type[WordErrors], recogniser: Whisper, **conversion: Any) -> float | None:
    instance = metric()
    instance.recogniser = recogniser
    given = {"source": constant(0.1), "converted": constant(0.2), **conversion}
    return instance(Conversion(pair="p", sample_rate=SAMPLE_RATE, **given))


# ------------------------------------------------------------------ windows


@given(st.floats(0.0, 30.0))
def test_a_window_contains_its_clip_and_is_one_that_whisper_reads_well(seconds: float) -> None:
    assert max(seconds, SHORTEST) <= window(seconds) <= LONGEST


@given(st.integers(1, 150), st.integers(0, 100))
def test_long_audio_is_cut_into_windows_without_loss(seconds: int, seed: int) -> None:
    wave = torch.rand(seconds * SAMPLE_RATE // 2, generator=torch.Generator().manual_seed(seed))
    pieces = split(wave)
    assert torch.equal(torch.cat(pieces), wave)
    assert all(0 < len(piece) <= LONGEST * SAMPLE_RATE for piece in pieces)


def test_long_audio_is_cut_where_it_is_quiet() -> None:
    wave = torch.rand(40 * SAMPLE_RATE) + 0.1
    wave[27 * SAMPLE_RATE : 28 * SAMPLE_RATE] = 0
    first, _ = split(wave)
    assert 27 <= len(first) / SAMPLE_RATE <= 28


def test_clips_of_one_window_are_read_together_and_keep_their_order() -> None:
    recogniser = Scripted(lambda wave, _: clear(str(len(wave))))
    lengths = [SAMPLE_RATE * n for n in (3, 20, 4, 1, 21)] + [8000] * 2 * BATCH
    assert recogniser.read([torch.zeros(n) for n in lengths]) == [str(n) for n in lengths]
    assert sorted(recogniser.batches) == [(10.0, 3), (10.0, BATCH), (10.0, BATCH), (22.0, 2)]


def test_two_minutes_are_read_in_consecutive_windows_and_nothing_gives_an_empty_text() -> None:
    recogniser = Scripted(lambda wave, seconds: clear(f"{len(wave) / SAMPLE_RATE:.1f}" if len(wave) else ""))
    text = recogniser.read([torch.rand(120 * SAMPLE_RATE)])[0]
    assert sum(map(float, text.split())) == pytest.approx(120, abs=0.3)
    assert recogniser.read([torch.zeros(0)]) == [""]
    assert recogniser.read([torch.zeros(3200)]) == ["0.2"]


# ------------------------------------------------------------------ hallucinations


def test_a_loop_is_read_again_in_a_long_window_and_else_is_nothing() -> None:
    loop = "thank you " * 30

    def recovers(wave: Tensor, seconds: float) -> Reading:
        return clear("the boat sank" if seconds == LONGEST else loop)

    assert Scripted(recovers).read([torch.zeros(SAMPLE_RATE)]) == ["the boat sank"]
    assert Scripted(lambda *_: clear(loop)).read([torch.zeros(SAMPLE_RATE)]) == [""]


def test_a_hallucination_on_silence_is_nothing_and_words_in_noise_are_words() -> None:
    assert Scripted(lambda *_: Reading("Thanks for watching!", 0.9, -1.5)).read([torch.zeros(8000)]) == [""]
    assert Scripted(lambda *_: Reading("the boat sank", 0.9, -0.2)).read([torch.zeros(8000)]) == ["the boat sank"]
    assert Scripted(lambda *_: Reading("the boat sank", 0.1, -1.5)).read([torch.zeros(8000)]) == ["the boat sank"]


# ------------------------------------------------------------------ error rates


@pytest.mark.parametrize("metric", [WER, CER])
def test_the_reference_is_the_text_else_the_transcript_of_the_source(metric: type[WER | CER]) -> None:
    recogniser = saying({0.1: "The boat sank.", 0.2: "a goat sank"})
    assert judged(metric, recogniser, text="A goat sank!") == 0
    assert 0 < (judged(metric, recogniser) or 0) < 1
    assert judged(metric, recogniser, converted=constant(0.1)) == 0
    assert judged(metric, recogniser, same_words=False) is None


def test_words_are_compared_as_the_authors_of_whisper_do() -> None:
    recogniser = saying({0.2: "20 boats, in color, um, it is"})
    assert judged(WER, recogniser, text="Twenty boats in COLOUR it's") == 0


def test_nothing_recognised_and_too_many_words_are_the_worst_and_no_more() -> None:
    assert judged(WER, saying({0.2: ""}), text="the boat sank") == WER.worst
    assert judged(WER, saying({0.2: "so very many other words were read"}), text="the boat sank") == WER.worst
    assert judged(WER, Scripted(lambda *_: clear("boat " * 60)), text="the boat sank") == WER.worst


def test_without_any_reference_there_is_no_score() -> None:
    assert judged(WER, saying({0.1: "", 0.2: "the boat"})) is None
    assert judged(WER, saying({0.1: "", 0.2: ""}), text="...") is None
    assert judged(WER, saying({0.1: "the boat", 0.2: "the boat"}), text="...") == 0


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_jiwer_and_torchaudio_count_the_same_errors(wanted: list[str], found: list[str]) -> None:
    assert min(1.0, WER.rate(" ".join(wanted), " ".join(found))) == pytest.approx(error_rate(wanted, found))


def kinds(reference: str, hypothesis: str) -> tuple[float, ...]:
    return tuple(kind.rate(reference, hypothesis) for kind in (Insertions, Deletions, Substitutions))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_the_kinds_of_word_errors_add_up_and_insertions_are_deletions_the_other_way_round(
    wanted: list[str], found: list[str]
) -> None:
    reference, hypothesis = " ".join(wanted), " ".join(found)
    insertions, deletions, substitutions = kinds(reference, hypothesis)
    assert insertions + deletions + substitutions == pytest.approx(WER.rate(reference, hypothesis))
    assert insertions - deletions == pytest.approx((len(found) - len(wanted)) / len(wanted))
    assert deletions + substitutions <= 1


def test_each_kind_of_word_error_is_measured_beside_the_word_error_rate() -> None:
    assert kinds("the boat sank slowly", "the boat sank") == (0, 0.25, 0)
    assert kinds("the boat sank", "the red boat sank") == (pytest.approx(1 / 3), 0, 0)
    recogniser = saying({0.1: "", 0.2: "the goat sank"})
    assert judged(Substitutions, recogniser, text="the boat sank") == pytest.approx(1 / 3)
    assert judged(Deletions, saying({0.2: ""}), text="the boat sank") == Deletions.worst == 1
    assert judged(Insertions, recogniser, source=constant(0.1)) is None
    assert Insertions.role == "", "only the error rates are measures of a verdict"


def test_a_block_of_conversions_is_read_in_one_batch(bench: Bench) -> None:
    resources = bench.resources(bench.study())
    recogniser = Scripted(lambda wave, _: clear(f"{float(wave.double().square().sum()):.4f}"))
    metric = WER()
    metric.recogniser = recogniser
    scores = score(systems.floor(resources.codec), resources.test, {"wer": metric})
    sources = {item.pair.source for item in resources.test.items if not item.pair.text}
    assert recogniser.batches == [(10.0, len(resources.test.items) + len(sources))]
    assert scores.pooled["wer"]["version"] == recogniser.version
    assert scores.pooled["wer"]["n_ok"] == len(resources.test.items)


# ------------------------------------------------------------------ what a study is told


def with_whisper(bench: Bench, recogniser: Whisper | None, **changes: Any) -> tuple[Any, list[str]]:
    """The study's resources with this recogniser, and what its console says."""
    resources, lines = bench.resources(bench.study(**changes)), []  # type: ignore[var-annotated]
    resources.console = RecordedConsole(lines)
    if recogniser is not None:
        vars(resources)["whisper"] = recogniser
    return resources, lines


def test_it_is_measured_where_it_is_at_hand_and_else_the_study_says_once_how_to_get_it(bench: Bench) -> None:
    recogniser = saying({})
    metrics, _ = wanted_metrics(with_whisper(bench, recogniser)[0])
    assert metrics["wer"].recogniser is metrics["cer"].recogniser is recogniser  # type: ignore[attr-defined]
    resources, lines = with_whisper(bench, None)
    for _ in range(2):
        metrics, missing = wanted_metrics(resources)
    assert "per" in metrics
    assert missing["wer"] == missing["cer"] == not_found("en")
    assert lines == [f"content is judged by the bundled phone recogniser: {not_found('en')}"]
    resources, lines = with_whisper(bench, None, exclude_metrics=("wer", "cer"))
    wanted_metrics(resources)
    assert lines == []


def test_the_former_name_of_the_metric_names_the_new_one(bench: Bench) -> None:
    with pytest.raises(UserError, match="extra_metrics: 'whisper_wer' is now 'wer'"):
        wanted_metrics(bench.resources(bench.study(extra_metrics=("whisper_wer",))))


def test_the_phone_recogniser_judges_english_only(bench: Bench) -> None:
    resources, lines = with_whisper(bench, None, language="de")
    metrics, missing = wanted_metrics(resources)
    assert not {"per", "per_above_half"} & metrics.keys()
    assert missing["per"] == "judges only en, and language = 'de'"
    assert lines == [f"content is not judged: {not_found('de')}"]
    assert "--whisper base)" in lines[0]


@pytest.mark.parametrize(
    ("language", "meant"), [("english", "en"), ("German", "de"), ("en-US", "en"), ("EN", "en"), ("klingon", "")]
)
def test_a_language_is_given_by_its_code(language: str, meant: str) -> None:
    with pytest.raises(UserError) as refused:
        checked(StudySettings, {"language": language}, "study")
    assert f"language = '{language}': expected the code of a language, such as en or de" in str(refused.value)
    assert ("did you mean" in str(refused.value)) == bool(meant)
    assert not meant or str(refused.value).endswith(f"did you mean '{meant}'?")


def test_a_whisper_that_cannot_be_used_stops_the_study_before_it_trains(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snac_runner.resources.find_whisper", find_whisper)
    with pytest.raises(UserError, match=r"'base.eng': no such folder.*did you mean 'base.en'"):
        bench.train([arm("phase4_decoder_film")], tmp_path / "runs", whisper="base.eng")
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_a_whisper_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"lacks model.bin, tokenizer.json; expected a Whisper in CTranslate2's format"):
        find_whisper(str(tmp_path), "en", CPU)
    for name in ("model.bin", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(
        UserError, match=r"does not load as a Whisper \(.*\); expected a Whisper in CTranslate2's format"
    ):
        find_whisper(str(tmp_path), "en", CPU)


def test_only_a_whisper_that_is_asked_for_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def download(name: str, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.delenv("SNAC_WHISPER", raising=False)
    monkeypatch.setattr("faster_whisper.download_model", download)
    assert find_whisper("", "en", CPU) is None
    assert find_whisper("", "de", CPU) is None
    with pytest.raises(UserError, match=r"Whisper small is not .* cannot be downloaded \(cannot reach the hub\)"):
        find_whisper("small", "en", CPU)
    assert asked == [("base.en", True), ("base", True), ("small", False)]
    monkeypatch.setenv("SNAC_WHISPER", "/none")
    with pytest.raises(UserError, match="whisper = '/none': no such folder"):
        find_whisper("", "en", CPU)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNAC_WHISPER", raising=False)
    monkeypatch.setattr("snac_runner.evaluate.whisper.PACKAGES", ("faster_whisper", "not_installed"))
    assert find_whisper("", "en", CPU) is None
    with pytest.raises(UserError, match=r"whisper = 'base' needs not_installed: .*\[judges\]"):
        find_whisper("base", "en", CPU)


def test_the_text_of_another_utterance_is_found_and_named() -> None:
    texts = {"a": "the boat sank slowly", "b": "two birds sing", "c": "a cold winter night", "d": "red shoes"}
    readings = {"a": "two birds sing", "b": "two birds sing", "c": "a cold winter's night", "d": "green apples grow"}
    words = str.split
    assert wrong_texts(texts, readings, list(texts.items()), words) == {"a": "b"}
    texts |= {"e": "yes it is", "f": "no", "g": "five cups"}
    readings |= {name: texts[name] for name in "efg"}
    assert wrong_texts(texts, readings, list(texts.items()), words) == {"a": "b", "d": ""}  # it reads the others well
    assert wrong_texts({"a": "x"}, {"a": ""}, [], words) == {}
    same = [("test/ann/1", "two birds sing"), ("test/bob/1", "two birds sing"), ("test/bob/2", "red shoes")]
    assert wrong_texts({"test/bob/2": "red shoes"}, {"test/bob/2": "two birds sing"}, same, words) == {
        "test/bob/2": "test/bob/1"  # of two speakers who say it, the same
    }


def test_a_study_warns_of_a_wrong_text_and_of_another_language() -> None:
    texts = {"a": "the boat sank slowly", "b": "two birds sing", "c": "a cold winter night"}
    said = {0.1: "two birds sing", 0.2: "two birds sing", 0.3: "a cold winter night"}
    items = [
        SimpleNamespace(
            audio=constant(value)[None], pair=SimpleNamespace(source=SimpleNamespace(utterance=u), text=text)
        )
        for value, (u, text) in zip(said, texts.items(), strict=True)
    ]
    lines: list[str] = []
    corpus = SimpleNamespace(split=lambda _: [SimpleNamespace(id=u, text=text) for u, text in texts.items()])
    resources: Any = SimpleNamespace(
        console=RecordedConsole(lines), test=SimpleNamespace(items=items, sample_rate=SAMPLE_RATE), corpus=corpus
    )
    metric = WER()
    metric.recogniser = recogniser = saying(said)
    check_speech(resources, {"wer": metric})
    assert lines == [
        "warning: the texts of 1 of 3 sources differ from what is said: a (says 'two birds sing', the text of b); "
        "correct them, or remove them to judge by the transcript"
    ]
    recogniser.spoken = {"de": 0.9, "en": 0.1}
    check_speech(resources, {"wer": metric})
    assert lines[-1].endswith("in 'de' (probability 0.90), and is read as 'en': give --language de")
    check_speech(resources, {"per": PER()})
    assert len(lines) == 3


# ------------------------------------------------------------------ with the real weights


@pytest.fixture(scope="module")
def folder() -> Path:
    """A multilingual Whisper."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "models" / "whisper-base"
    found = Path(os.environ.get("SNAC_WHISPER", shared))
    if not found.is_dir():
        pytest.skip("needs a multilingual Whisper (set SNAC_WHISPER to a folder with one)")
    return found


@pytest.fixture(scope="module")
def whisper(folder: Path) -> Whisper:
    """It, loaded."""
    return Whisper(folder)


@pytest.fixture(scope="module")
def spoken(bench: Bench) -> list[tuple[Tensor, str]]:
    """Synthetic speech with its text."""
    utterances = open_corpus(bench.speech).split("test")[:6]
    return [(load_audio(u, SAMPLE_RATE)[0], u.text or "") for u in utterances]


def test_it_reads_synthetic_speech_and_not_noise_or_silence(whisper: Whisper, spoken: list[tuple[Tensor, str]]) -> None:
    waves = [wave for wave, _ in spoken]
    rates = [judged(WER, whisper, source=wave, converted=wave, text=text) for wave, text in spoken]
    mismatched = [
        judged(WER, whisper, source=wave, converted=wave, text=text)
        for wave, (_, text) in zip(waves, [*spoken[1:], spoken[0]], strict=True)
    ]
    assert sum(map(float, rates)) / len(rates) < 0.5  # type: ignore[arg-type]
    assert sum(map(float, mismatched)) > sum(map(float, rates)) + 0.3 * len(rates)  # type: ignore[arg-type]
    noise = 0.05 * torch.randn(3 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    for nothing in (noise, torch.zeros(3 * SAMPLE_RATE)):
        assert (judged(WER, whisper, converted=nothing, text=spoken[0][1]) or 0) > 0.8


def test_a_transcript_does_not_depend_on_its_batch(whisper: Whisper, spoken: list[tuple[Tensor, str]]) -> None:
    waves = [wave for wave, _ in spoken[:3]]
    assert whisper.read(waves) == [whisper.read([wave])[0] for wave in waves]
    short = whisper.read([waves[0][: SAMPLE_RATE // 5], torch.zeros(0)])
    assert all(isinstance(text, str) for text in short)


def test_torch_keeps_its_threads_where_whisper_is_loaded(folder: Path, spoken: list[tuple[Tensor, str]]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Whisper(folder, workers=2).read([spoken[0][0]])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_it_knows_the_language_and_refuses_one_that_it_does_not_have(
    folder: Path, whisper: Whisper, spoken: list[tuple[Tensor, str]]
) -> None:
    found = whisper.languages([wave for wave, _ in spoken[:4]])
    assert sum(found.values()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(UserError, match=r"cannot read language = 'xx'; known: af, am"):
        Whisper(folder, language="xx")


@pytest.mark.slow
def test_on_recorded_speech_its_range_is_wide_enough(whisper: Whisper, librispeech_mini: Path) -> None:
    from snac_core.codec import SNAC
    from snac_runner.evaluate.systems import resynthesis

    codec = SNAC.from_pretrained("tiny").freeze()
    utterances = open_corpus(librispeech_mini).split("dev")[:10]
    waves = [load_audio(u, codec.sampling_rate, seconds=4.0) for u in utterances]
    said = [whisper.words(text) for text in whisper.read([wave[0] for wave in waves])]
    coded = [whisper.words(text) for text in whisper.read([resynthesis(codec, wave) for wave in waves])]
    bare = sum(error_rate(a, b) for a, b in zip(said, coded, strict=True))
    other = sum(error_rate(a, b) for a, b in zip([*said[1:], said[0]], coded, strict=True))
    assert other - bare >= 0.5 * len(said)
