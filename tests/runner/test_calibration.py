"""A judge is calibrated on verification trials of real speech."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_study import Bench, runner

from snac_core import SNAC, UserError, load_speaker_encoder
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.data.open_corpus import open_corpus
from snac_runner.evaluate.judges import ACCEPTANCE, QUANTILES, Calibration, calibrate, calibration_of


@pytest.fixture(scope="module")
def judge() -> SpeakerEncoder:
    return load_speaker_encoder("ge2e")


@pytest.fixture(scope="module")
def codec(bench: Bench) -> SNAC:
    return SNAC.from_pretrained(str(bench.base)).freeze()


@pytest.fixture(scope="module")
def calibrated(bench: Bench, judge: SpeakerEncoder, codec: SNAC) -> tuple[Calibration, Path]:
    return calibrate(judge, open_corpus(bench.speech), codec, base="small", splits=("train",))


def test_one_speaker_scores_higher_than_two_and_a_random_codec_makes_it_harder(
    calibrated: tuple[Calibration, Path],
) -> None:
    kinds = calibrated[0].kinds
    middle = QUANTILES.index(0.5)
    for kind in ("recorded", "reference x recorded"):
        assert kinds[kind].same[middle] > kinds[kind].different[middle]
    assert kinds["recorded"].eer < kinds["codec"].eer
    for scores in kinds.values():
        assert 0 <= scores.eer <= 1
        assert list(scores.same) == sorted(scores.same)
        assert list(scores.different) == sorted(scores.different)
        assert min(scores.trials) > 0


def test_misses_and_false_alarms_are_equal_at_the_threshold(
    calibrated: tuple[Calibration, Path],
) -> None:
    calibration = calibrated[0]
    assert calibration.threshold == calibration.kinds[ACCEPTANCE].threshold
    assert calibration.accepted([calibration.threshold, calibration.threshold - 0.01, 1.0, -1.0]) == 0.5


def test_it_is_stored_for_this_judge_this_speech_and_this_codec(
    calibrated: tuple[Calibration, Path], bench: Bench, judge: SpeakerEncoder, codec: SNAC
) -> None:
    calibration, path = calibrated
    corpus = open_corpus(bench.speech)
    assert calibration_of(judge, corpus, codec, ("train",)) == calibration
    assert calibration_of(judge, corpus, codec, ("dev",)) is None
    assert calibration_of(judge, corpus, SNAC.from_pretrained("tiny"), ("train",)) is None
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert calibration_of(judge, corpus, codec, ("train",)) is None
    path.write_bytes(whole)


def test_calibrating_again_gives_the_same_numbers(
    calibrated: tuple[Calibration, Path], bench: Bench, judge: SpeakerEncoder, codec: SNAC
) -> None:
    again, _ = calibrate(judge, open_corpus(bench.speech), codec, base="small", splits=("train",))
    assert again == calibrated[0]


def test_the_command_prints_the_table_and_its_file(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", bench.speech, "--base", bench.base, "--split", "train")
    assert runner("evaluate", "--calibrate", *options) == 0
    said = capsys.readouterr().out
    assert f"| {ACCEPTANCE} |" in said
    assert Path(said.splitlines()[-1].removeprefix("kept in ")).is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to evaluate; give one of"),
        (["--calibrate"], "no data: give a folder of speech with --data DIR"),
        (["--calibrate", "--data", "{speech}", "--judge", "ge2"], "did you mean 'ge2e'?"),
        (["--calibrate", "--data", "{speech}", "--split", "trian"], "unknown split 'trian'; did you mean 'train'?"),
    ],
)
def test_a_wrong_command_is_an_error_of_one_line(
    bench: Bench, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert runner("evaluate", *(option.format(speech=bench.speech) for option in options)) == 2
    assert said in capsys.readouterr().err


def test_speech_too_short_to_compare_speakers_by_is_the_users_error(
    tmp_path: Path, bench: Bench, judge: SpeakerEncoder, codec: SNAC
) -> None:
    import soundfile
    import torch

    for speaker in ("ann", "bob"):
        (tmp_path / "dev" / speaker).mkdir(parents=True)
        samples = torch.randn(16000, generator=torch.Generator().manual_seed(len(speaker) + ord(speaker[0]))) * 0.1
        soundfile.write(tmp_path / "dev" / speaker / "a.wav", samples.numpy(), 16000)
    with pytest.raises(UserError, match="no stretch of 2 s to compare speakers by"):
        calibrate(judge, open_corpus(tmp_path), codec, base="small")
